"""Small model folders and checkpoints for tests: a real Llama saved by transformers, an index made by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_heads import everything_open, means_of, table_of
from small_models import VOCAB, small_model

from flashhead_edge.checkpoint import PublishedClusters, open_source, read_head, write_checkpoint

NAMED = 127  # tokens of the small tokenizer: the model's last four rows are padding


def save_tokenizer(folder: Path, named: int = NAMED) -> None:
    """A tokenizer of `named` words t0, t1, ... with the last one as an added token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(named - 1)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0, tokenizer: bool = True, **options: Any) -> Path:
    """A model folder as transformers writes it."""
    small_model(family, seed).to(dtype).save_pretrained(folder, **options)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def clusters_of(weight: torch.Tensor, vocab_size: int, n_probes: int = 3, cluster_size: int = 8) -> PublishedClusters:
    """Neighbouring ids in one cluster."""
    means = means_of(weight, table_of(vocab_size, cluster_size)).float().numpy()
    return PublishedClusters(means, np.arange(vocab_size) // cluster_size, n_probes)


def save_checkpoint(source_folder: Path, out: Path, margin: float = np.inf, **options: Any) -> Path:
    """A FlashHead checkpoint whose index leaves nothing out; `margin` tells two of them apart."""
    from dataclasses import replace

    source = open_source(source_folder)
    head = read_head(source)
    index = everything_open(head.weight, cascade=True, vocab_size=head.vocab_size, fingerprint=head.fingerprint)
    index = replace(index, probe=replace(index.probe, margin=margin), summary={"head": "fitted", "target_agreement": 0.995})
    write_checkpoint(source, out, index, clusters_of(head.weight, head.vocab_size), **options)
    return out


def content(folder: Path) -> str:
    """One hash of every file's name and bytes below a folder; `absent` where there is none."""
    if not folder.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


__all__ = ["NAMED", "VOCAB", "clusters_of", "content", "save_checkpoint", "save_model", "save_tokenizer"]
