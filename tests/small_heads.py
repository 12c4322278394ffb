"""Head indexes for tiny random models, made by hand: one that leaves nothing out, and one that is bad on purpose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.codes import Coded
from flashhead_edge.coding import encode
from flashhead_edge.index import Gate, HeadIndex, Stage


def fingerprint_of(weight: Tensor, bias: Tensor | None = None) -> str:
    from flashhead_edge.checkpoint import fingerprint

    return fingerprint(weight.detach(), None if bias is None else bias.detach())


def gate(n: int, margin: float = np.inf, cap: int | None = None) -> Gate:
    return Gate(np.zeros(n, np.uint8), 1.0, margin, cap or n)


def table_of(vocab_size: int, cluster_size: int) -> np.ndarray:
    """Neighbouring ids in one cluster, [K, cluster_size] int32; the last cluster may be short."""
    k = -(-vocab_size // cluster_size)
    return np.where(np.arange(k * cluster_size) < vocab_size, np.arange(k * cluster_size), -1).astype(np.int32).reshape(k, cluster_size)


def means_of(weight: Tensor, table: np.ndarray) -> Tensor:
    filled = torch.from_numpy(table >= 0)
    rows = weight.detach().float()[torch.from_numpy(table).clamp(min=0).long()] * filled[:, :, None]
    return rows.sum(1) / filled.sum(1, keepdim=True)


def everything_open(weight: Tensor, cascade: bool = False, vocab_size: int | None = None, cluster_size: int = 8, fingerprint: str | None = None) -> HeadIndex:
    """Opens, keeps and rescores every token of a matrix [V or more, d]: the dense head, token for token.

    With `cascade` it has a rotation, two row codes and an always-scored token, as a fitted head has.
    """
    vocab_size, d = vocab_size or len(weight), weight.shape[1]
    table = table_of(vocab_size, cluster_size)
    means, k, slots = means_of(weight, table), len(table), table.size
    rotation, mean, stages, always = None, None, (), np.zeros(0, np.int32)
    if cascade:
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:, : d // 2]  # [d, r - 1], as the index keeps it
        rotation, mean, always = encode(basis, "int8/16"), np.full(d, 0.01, np.float32), np.array([0, vocab_size - 1], np.int32)
        rows = torch.zeros(slots, d)
        rows[torch.from_numpy(table.reshape(-1) >= 0)] = weight.detach().float()[:vocab_size]
        ones = torch.cat([rows @ torch.from_numpy(mean)[:, None], rows @ basis], 1)
        stages = tuple(Stage(encode(ones, code), gate(slots)) for code in ("int4/8", "int8/8"))
        means = torch.cat([means @ torch.from_numpy(mean)[:, None], means @ basis], 1)
    return HeadIndex(
        vocab_size, d, table, encode(means, "float16"), gate(k), stages, always, mean, rotation, 1.0, -1.0, fingerprint or fingerprint_of(weight)
    )  # fmt: skip


def few_probes(weight: Tensor, n: int, vocab_size: int | None = None, cluster_size: int = 8, fingerprint: str | None = None) -> HeadIndex:
    """A published head that opens `n` clusters of neighbouring ids: on a random matrix it is often wrong."""
    vocab_size = vocab_size or len(weight)
    table = table_of(vocab_size, cluster_size)
    means = means_of(weight, table)
    unit = means / means.norm(dim=1, keepdim=True).clamp(min=1e-6)
    centroids: Coded = encode(unit, "float16")
    return HeadIndex(
        vocab_size, weight.shape[1], table, centroids, gate(len(table), cap=min(n, len(table))), (), np.zeros(0, np.int32), None, None, 0.0, -1.0,
        fingerprint or fingerprint_of(weight),
    )  # fmt: skip
