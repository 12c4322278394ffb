"""What a matrix of a checkpoint is once it is read: its integers and their scales, whatever packed them. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

STEPS = 24  # scales that are tried for each group, from the one that reaches its largest weight down to about half of it


@dataclass(frozen=True, eq=False)
class Coded4:
    """W[n, k] = (codes[n, k] - zeros[n, k // group]) * scales[n, k // group], or codes * scales + minima where minima are given."""

    codes: np.ndarray  # [N, K / 2] uint8, two a byte along K, the low nibble first
    scales: np.ndarray  # [N, K / group] float32
    zeros: np.ndarray | None  # [N, K / group] uint8; None with minima None: 8
    minima: np.ndarray | None  # [N, K / group] float32
    group: int
    order: np.ndarray | None  # [K] int32: input k of the codes is the layer's input order[k]; None: as they are


@dataclass(frozen=True, eq=False)
class Coded8:
    """W = codes * scales."""

    codes: np.ndarray  # [N, K] int8
    scales: np.ndarray  # [N, K / group] float32
    group: int


class Weights(Protocol):
    """An opened checkpoint."""

    config: Mapping[str, Any]  # config.json, or what it would say

    def names(self) -> Iterable[str]: ...

    def linear(self, name: str) -> Coded4 | Coded8 | np.ndarray: ...

    def floats(self, name: str) -> np.ndarray: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K / 2], two a byte, as [N, K] uint8."""
    return np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)


def dense(coded: Coded4 | Coded8) -> np.ndarray:
    """The matrix as float32 [N, K], in the layer's own order of inputs."""
    group = coded.group
    if isinstance(coded, Coded8):
        return coded.codes.astype(np.float32) * coded.scales.repeat(group, 1)
    codes = nibbles(coded.codes).astype(np.float32)
    if coded.minima is not None:
        values = codes * coded.scales.repeat(group, 1) + coded.minima.repeat(group, 1)
    else:
        zeros = np.float32(8) if coded.zeros is None else coded.zeros.astype(np.float32).repeat(group, 1)
        values = (codes - zeros) * coded.scales.repeat(group, 1)
    if coded.order is None:
        return values
    out = np.empty_like(values)
    out[:, coded.order] = values
    return out


def requantised(matrix: np.ndarray, group: int) -> Coded4:
    """A matrix [N, K] of floats in symmetric 4 bits, to the nearest, each group with the scale that errs least among those tried."""
    n, k = matrix.shape
    values = matrix.astype(np.float32).reshape(n, k // group, group)
    ends = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]  # what the code that reaches furthest, -8, stands for
    best, chosen = np.full(ends.shape, np.inf, np.float32), np.zeros_like(ends)
    for step in range(STEPS):
        scales = ends / np.float32(-8) * np.float32(1.15 - 0.025 * step)
        codes = _codes(values, scales)
        error = np.square(codes * scales[..., None] - values).sum(-1)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, scales, chosen)
    codes = (_codes(values, chosen) + 8).astype(np.uint8).reshape(n, k)
    return Coded4(codes[:, ::2] | codes[:, 1::2] << 4, chosen, None, None, group, None)


def _codes(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    safe = np.where(scales == 0, np.float32(1), scales)[..., None]
    return np.clip(np.rint(values / safe), -8, 7)
