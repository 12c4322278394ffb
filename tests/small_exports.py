"""A tiny model that ONNX Runtime's attention takes (heads of 16), its checkpoint, and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli_tools import write_model

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 8192,
}  # fmt: skip
VOCAB = 256


def write_exportable(folder: Path, **sizes: Any) -> Path:
    """A random Llama over single bytes, 0 to 255, with a chat template. It stops at 255, which no UTF-8 text holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_model(folder)  # for its tokenizer
    torch.manual_seed(5)
    ids = {"bos_token_id": 254, "eos_token_id": 255, "pad_token_id": 255}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **(SIZES | sizes), **ids))
    with torch.no_grad():  # the library's start is near zero: its logits are all alike
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 255}))
    return folder


def write_with_index(model: Path, out: Path, index_of: Callable[..., Any]) -> Path:
    """The model as a checkpoint with the index that `index_of(weight, fingerprint=...)` makes."""
    from small_checkpoints import clusters_of

    from flashhead_edge.checkpoint import open_source, read_head, write_checkpoint

    source = open_source(model)
    head = read_head(source)
    write_checkpoint(source, out, index_of(head.weight, fingerprint=head.fingerprint), clusters_of(head.weight, head.vocab_size))
    return out


def write_tied(folder: Path) -> Path:
    """A FlashHead checkpoint of a tied model in bfloat16, as `flashhead convert` writes one: folder/checkpoint."""
    import torch
    import transformers
    from small_checkpoints import save_tokenizer
    from small_heads import everything_open
    from small_programs import MODELS

    torch.manual_seed(0)
    MODELS["qwen3"](transformers).to(torch.bfloat16).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    # vocab_size: as many as the tokenizer names
    return write_with_index(folder / "model", folder / "checkpoint", lambda w, fingerprint: everything_open(w, vocab_size=127, fingerprint=fingerprint))
