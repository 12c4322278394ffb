"""Weights in 4 bits, a scale for each group of inputs: the grid, its ranges by output error, and its packing.

A weight is (code - zero) * scale, code and zero 0 to 15; a symmetric grid has zero 8. Ranges are those of
compressed-tensors (largest magnitude / 7.5, or the span / 15) times a ratio: 1 is round-to-nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

HALF = 8
RATIOS = (1.0, 1.07, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.62)  # of a group's range; 1.07: the largest weight is code 15
SWEEPS = 2  # over all groups


@dataclass(frozen=True, eq=False)
class Coded:
    """A matrix [N, K] in 4 bits."""

    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, K / group], in the dtype that is stored
    zeros: Tensor | None  # [N, K / group] uint8; None: 8

    def values(self) -> Tensor:
        """What it stands for, [N, K] float32, exactly."""
        n, k = self.codes.shape
        groups = self.codes.view(n, self.scales.shape[1], -1).float()
        zeros = HALF if self.zeros is None else self.zeros.float()[..., None]
        return ((groups - zeros) * self.scales.float()[..., None]).view(n, k)


def ranges(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group [..., group], 0 within: [...] each."""
    if symmetric:
        most = weight.abs().amax(-1)
        return -most, most
    return weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)


def grid(low: Tensor, high: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales (as `dtype` holds them, in float32) and zeros (float32) of ranges; a range of nothing has scale 1."""
    scale = ((high - low) / 15).to(dtype).float()
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.full_like(scale, HALF) if symmetric else (-low / scale).round().clamp(0, 15)
    return scale, zero


def rounded(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes nearest to weights [..., group], float32."""
    return ((weight / scale[..., None]).round() + zero[..., None]).clamp(0, 15)


def nearest(weight: Tensor, group: int, symmetric: bool, dtype: torch.dtype, ratios: Tensor | None = None) -> Coded:
    """Round to nearest.

    Args:
        weight: [N, K] float32, K a multiple of `group`.
        dtype: of the scales.
        ratios: [N, K / group] of each group's range; None: 1.
    """
    n, k = weight.shape
    groups = weight.view(n, k // group, group)
    low, high = ranges(groups, symmetric)
    if ratios is not None:
        low, high = low * ratios, high * ratios
    scale, zero = grid(low, high, symmetric, dtype)
    codes = rounded(groups, scale, zero).to(torch.uint8).view(n, k)
    return Coded(codes, scale.to(dtype), None if symmetric else zero.to(torch.uint8))


def output_error(delta: Tensor, moment: Tensor) -> Tensor:
    """Mean squared error of each output, [N]: delta [N, K] is what the weights are off, moment [K, K] the mean of x x^T over the states x."""
    return ((delta @ moment) * delta).sum(1).clamp(min=0)


def clipped(weight: Tensor, moment: Tensor, group: int, symmetric: bool, dtype: torch.dtype) -> Coded:
    """The ratios of `RATIOS` that lower the output error most, group after group, each seeing what all others are off.

    Starts at round-to-nearest; a step never raises an output's error.
    """
    n, k = weight.shape
    delta = nearest(weight, group, symmetric, dtype).values() - weight
    ratios = torch.ones(n, k // group, device=weight.device)
    tried = torch.tensor(RATIOS, device=weight.device)[:, None]
    for _ in range(SWEEPS):
        for g in range(k // group):
            at = slice(g * group, (g + 1) * group)
            own, w = moment[at, at], weight[:, at]
            cross = delta @ moment[:, at] - delta[:, at] @ own
            low, high = ranges(w, symmetric)
            scale, zero = grid(low * tried, high * tried, symmetric, dtype)  # [ratios, N]
            off = (rounded(w, scale, zero) - zero[..., None]) * scale[..., None] - w
            best = ((off @ own + 2 * cross) * off).sum(-1).argmin(0)
            delta[:, at] = off[best, torch.arange(n, device=off.device)]
            ratios[:, g] = tried[best, 0]
    return nearest(weight, group, symmetric, dtype, ratios)


def words(codes: Tensor) -> Tensor:
    """Codes [n, k] as int32 words along the last axis, the first in the lowest bits: [n, ceil(k / 8)]."""
    codes = pad(codes, (0, -codes.shape[1] % 8))
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)


def packed(coded: Coded) -> dict[str, Tensor]:
    """The tensors of compressed-tensors' pack-quantized form, by the end of their names."""
    codes = coded.codes.cpu()
    parts = {"weight_packed": words(codes), "weight_scale": coded.scales.cpu(), "weight_shape": torch.tensor(codes.shape, dtype=torch.int64)}
    if coded.zeros is not None:
        parts["weight_zero_point"] = words(coded.zeros.cpu().T.contiguous()).T.contiguous()
    return parts


def packed_bytes(n: int, k: int, group: int, symmetric: bool, item: int) -> int:
    """Bytes of the tensors of `packed`; `item` of a scale."""
    return n * k // 2 + n * (k // group) * item + 16 + (0 if symmetric else 4 * -(-n // 8) * (k // group))
