"""Matrices of few bits in one layout, whatever file they come from: the data, its floats, and a rounding to 4 bits. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashhead_edge.errors import CheckpointError, SettingsError

HALF = 8  # the zero of a symmetric code
GROUPS = (32, 64, 128)  # inputs that share a scale in what `requantised` makes
ROWS = 1024  # of a matrix, worked on together: what bounds the memory of a large one
RATIOS = np.linspace(0.65, 1.1, 19, dtype=np.float32)  # of the range of a group that are tried, the largest magnitude in code -8 being 1


@dataclass(frozen=True, eq=False)
class Coded4:
    """A matrix of 4-bit codes: W[n, k] = (code - zero) * scale, or code * scale + minimum where minima are given."""

    codes: np.ndarray  # [N, K / 2] uint8, two a byte along K, the low nibble first
    scales: np.ndarray  # [N, K / group] float32, exactly the file's values
    zeros: np.ndarray | None  # [N, K / group] uint8; None with minima None: 8
    minima: np.ndarray | None  # [N, K / group] float32
    group: int  # inputs that share a scale
    order: np.ndarray | None = None  # [K] int32: input k of the codes is the layer's input order[k]; None: as they are


@dataclass(frozen=True, eq=False)
class Coded8:
    """A matrix of codes of up to 8 bits: W[n, k] = code * scale."""

    codes: np.ndarray  # [N, K] int8
    scales: np.ndarray  # [N, K / group] float32, exactly the file's values
    group: int


def paired(codes: np.ndarray) -> np.ndarray:
    """Codes [..., K] of 4 bits, one a byte, as [..., K / 2] uint8: two a byte, the low nibble first."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpaired(codes: np.ndarray) -> np.ndarray:
    """The other way round: [..., K / 2] to [..., K] uint8."""
    out = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.uint8)
    np.bitwise_and(codes, 15, out=out[..., ::2])
    np.right_shift(codes, 4, out=out[..., 1::2])
    return out


def dense(coded: Coded4 | Coded8) -> np.ndarray:
    """The floats that codes stand for, [N, K] float32, in the layer's own order of inputs.

    Exact where the scales are 16-bit floats: a product of one with 4 or 8 bits fits into float32. Scales of more digits (Q4_K's
    and Q6_K's own products) and minima round once, as the float32 formula of the format does.
    """
    if isinstance(coded, Coded8):
        n, k = coded.codes.shape
        values = coded.codes.reshape(n, -1, coded.group) * coded.scales[..., None]
        return np.asarray(values, np.float32).reshape(n, k)
    n, k = coded.codes.shape[0], coded.codes.shape[1] * 2
    groups = unpaired(coded.codes).astype(np.float32).reshape(n, k // coded.group, coded.group)
    if coded.minima is not None:
        groups *= coded.scales[..., None]
        groups += coded.minima[..., None]
    else:
        groups -= np.float32(HALF) if coded.zeros is None else coded.zeros.astype(np.float32)[..., None]
        groups *= coded.scales[..., None]
    values = groups.reshape(n, k)
    if coded.order is None:
        return values
    placed = np.empty_like(values)
    placed[:, coded.order] = values
    return placed


def some_rows(coded: Coded4 | Coded8, start: int, stop: int) -> Coded4 | Coded8:
    """Rows start to stop of a matrix, without a copy."""
    if isinstance(coded, Coded8):
        return Coded8(coded.codes[start:stop], coded.scales[start:stop], coded.group)
    zeros = None if coded.zeros is None else coded.zeros[start:stop]
    minima = None if coded.minima is None else coded.minima[start:stop]
    return Coded4(coded.codes[start:stop], coded.scales[start:stop], zeros, minima, coded.group, coded.order)


def requantised(matrix: Coded4 | Coded8 | np.ndarray, group: int) -> Coded4:
    """A matrix in symmetric 4 bits, in its own order of inputs: each group with the scale that errs least, weights rounded to nearest.

    Scales of both signs and of the ranges `RATIOS` are tried; each is then fitted to its codes by least squares, and the weights
    are rounded once more. The error of a group is the sum of its squared differences.

    Args:
        matrix: codes, or [N, K] floats of any kind.
        group: 32, 64 or 128 inputs.
    Raises:
        SettingsError: another group, or one that does not divide K.
        CheckpointError: a value is not finite.
    """
    coded = not isinstance(matrix, np.ndarray)
    n, k = matrix.shape if isinstance(matrix, np.ndarray) else (len(matrix.codes), matrix.scales.shape[1] * matrix.group)
    if group not in GROUPS or k % group:
        raise SettingsError(f"group: {group} for a matrix [{n}, {k}], expected 32, 64 or 128 and a divisor of {k}; pass another group")
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // group), np.float32)
    for start in range(0, n, ROWS):
        stop = min(n, start + ROWS)
        values = dense(some_rows(matrix, start, stop)) if coded else np.asarray(matrix[start:stop], np.float32)  # type: ignore[arg-type]
        if not np.isfinite(values).all():
            raise CheckpointError(f"the matrix [{n}, {k}] has a value that is not finite in rows {start} to {stop}, expected floats; fetch the model again")
        found, scales[start:stop] = _nearest(values.reshape(stop - start, k // group, group))
        codes[start:stop] = paired((found + HALF).astype(np.uint8).reshape(stop - start, k))
    return Coded4(codes, scales, None, None, group)


def _nearest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes -8 to 7 [rows, groups, group] and scales [rows, groups] of float32 values, by the least squared error tried."""
    most = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]
    best = np.full(most.shape, np.inf, np.float32)
    scales = np.zeros_like(most)
    for ratio in np.concatenate([RATIOS, -RATIOS]):
        scale = _fitted(values, _rounded(values, -most * ratio / HALF))
        error = np.square(values - _rounded(values, scale) * scale[..., None]).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
    return _rounded(values, scales), scales


def _rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The codes nearest to values; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(values * inverse[..., None]), -HALF, HALF - 1)


def _fitted(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The scale of each group by least squares: sum of value * code, divided by the sum of squared codes; 0 where all codes are."""
    squares = np.square(codes).sum(-1)
    return np.divide((values * codes).sum(-1), squares, out=np.zeros_like(squares), where=squares > 0)
