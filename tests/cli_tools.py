"""Helpers of the command line's tests: a tiny model, its checkpoint, and a strict reader of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def write_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A random Llama over single bytes. It has no stop token: an answer is as long as it may be."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = template
    torch.manual_seed(5)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), max_position_embeddings=8192, **SIZES, **ids))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.7)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def write_flashhead(model: Path, out: Path) -> Path:
    """The model as a checkpoint whose head leaves nothing out: its greedy text is the dense head's."""
    import numpy as np
    from small_heads import everything_open, means_of

    from flashhead_edge.checkpoint import PublishedClusters, open_source, read_head, write_checkpoint

    source = open_source(model)
    head = read_head(source)
    index = everything_open(head.weight, cascade=True, vocab_size=head.vocab_size, fingerprint=head.fingerprint)
    assignments = np.empty(index.vocab_size, np.int64)
    for k, row in enumerate(index.token_table):
        assignments[row[row >= 0]] = k
    write_checkpoint(source, out, index, PublishedClusters(means_of(head.weight, index.token_table).numpy(), assignments, 4))
    return out


def one_document(stdout: str) -> Any:
    """stdout as strict JSON: one document, nothing before or after it, no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(stdout, parse_constant=refuse)
