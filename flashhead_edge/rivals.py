"""What a head is measured against: the dense head as judge, dense heads in fewer bits, and the published method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.coding import TorchCoded, decode, encode_int, to_torch
from flashhead_edge.evaluation.measures import Contender, Found, HeadContender
from flashhead_edge.index import default_probes
from flashhead_edge.reference import dense_tokens, torch_head

BLOCK_NUMBERS = 4 << 20  # rows are turned into float32 in blocks of about this many numbers
DENSE_CODES = ((8, None), (8, 32), (4, 32), (4, 128))  # bits, columns that share a scale (None: the row)
PUBLISHED_PROBES = 256


def products(hidden: Tensor, rows: Callable[[slice], Tensor], bias: Tensor | None, vocab_size: int) -> Tensor:
    """Logits [N, V] float32 of rows that are made in blocks: `rows(slice)` -> [n, d]."""
    h = hidden.float()
    out = torch.empty(len(h), vocab_size, device=h.device)
    block = max(1, BLOCK_NUMBERS // h.shape[1])
    for start in range(0, vocab_size, block):
        part = slice(start, min(start + block, vocab_size))
        out[:, part] = h @ rows(part).float().T
    return out if bias is None else out.add_(bias[:vocab_size].float())


@dataclass(frozen=True, eq=False)
class DenseHead:
    """The dense head from the weights as stored, padding left out: the judge of `evaluation.Dense`."""

    weight: Tensor  # [V or more, d]
    bias: Tensor | None  # [V or more]
    vocab_size: int

    def tokens(self, hidden: Tensor) -> np.ndarray:
        return dense_tokens(self.weight, self.bias, hidden, self.vocab_size).cpu().numpy()

    def logits(self, hidden: Tensor) -> np.ndarray:
        return products(hidden, lambda part: self.weight[part], self.bias, self.vocab_size).cpu().numpy()


@dataclass(frozen=True, eq=False)
class CodedDense:
    """The dense head with its rows in few bits, symmetric, rounded to nearest: a contender that scores every token."""

    bits: int
    group: int  # columns that share a scale; the last group of a row may be shorter
    hidden_size: int
    vocab_size: int
    rows: TorchCoded  # [V, d, filled up with zeros to whole groups]
    bias: Tensor | None

    @property
    def name(self) -> str:
        return f"dense int{self.bits}, " + ("one scale a row" if self.group == self.hidden_size else f"groups of {self.group}")

    @property
    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "scales": "float16"}

    def find(self, hidden: Tensor, full: bool = True) -> Found:
        logits = products(hidden, lambda part: decode(self.rows, part)[:, : self.hidden_size], self.bias, self.vocab_size)
        values = logits.cpu().numpy()
        return Found(values.argmax(1), None, None, None, None, values if full else None)

    def cost(self, counts: np.ndarray | None, n: int) -> np.ndarray:
        groups = -(-self.hidden_size // self.group)
        row = -(-self.hidden_size * self.bits // 8) + 2 * groups
        return np.full(n, self.vocab_size * row, np.int64)


def coded_dense(weight: Tensor, bias: Tensor | None, vocab_size: int, bits: int, group: int | None = None) -> CodedDense:
    """Code the dense head's rows [V or more, d] in `bits` bits with a float16 scale for each `group` columns, or for the row."""
    d = weight.shape[1]
    group = d if group is None else min(group, d)
    fill, block = -d % group, max(1, BLOCK_NUMBERS // d)
    parts = [encode_int(torch.nn.functional.pad(rows.float(), (0, fill)), bits, group) for rows in weight[:vocab_size].split(block)]
    scales = [p.scale for p in parts if p.scale is not None]
    coded = dataclasses.replace(parts[0], data=np.concatenate([p.data for p in parts]), scale=np.concatenate(scales))
    return CodedDense(bits, group, d, vocab_size, to_torch(coded, weight.device), bias)


def published_heads(folder: Path, head: Any, weight: Tensor, bias: Tensor | None) -> list[Contender]:
    """The published method on a checkpoint's clusters: at 256 probes, and at its default of a sixteenth of the clusters.

    Args:
        head: the checkpoint's `checkpoint.HeadWeights`.
        weight, bias: the same matrix where it is to be computed.
    """
    from flashhead_edge.checkpoint import read_published
    from flashhead_edge.checkpoint.assets import published_index

    clusters = read_published(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    k = len(clusters.centroids)
    out: list[Contender] = []
    some, default = min(PUBLISHED_PROBES, k), default_probes(k)
    for name, probes in ((f"published, {some} probes", some), (f"published, default {default} probes", default)):
        index = published_index(dataclasses.replace(clusters, n_probes=probes), folder, config, head)
        # its full-width logits have no calibrated tail: what it says of all tokens would say nothing of the method
        out.append(HeadContender(name, torch_head(index, weight, bias), 2 * weight.shape[1], full_width=False))
    return out


def rivals_of(folder: Path, head: Any, weight: Tensor, bias: Tensor | None, progress: Callable[[str, float | None], None]) -> list[Contender]:
    """All rivals of the head in `folder`, cheapest idea first."""
    out: list[Contender] = []
    d = weight.shape[1]
    for bits, group in dict.fromkeys((bits, min(group or d, d)) for bits, group in DENSE_CODES):  # of a narrow head two may be one
        progress(f"coding the dense head in int{bits}", None)
        out.append(coded_dense(weight, bias, head.vocab_size, bits, group))
    return out + published_heads(folder, head, weight, bias)
