"""Matrices of few bits in one layout, whatever file they come from: the data, its floats, and a rounding to 4 bits. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashhead_edge.errors import CheckpointError, SettingsError

HALF = 8  # the zero of a symmetric code
GROUPS = (32, 64, 128)  # inputs that share a scale in what `requantised` makes
TINY = np.finfo(np.float32).tiny
BLOCK = 1 << 16  # values worked on together: what a core's cache holds
# Ranges of a group that are tried, the largest magnitude in code -8 being 1. On made weights with long tails these eight err 25 % less than
# round-to-nearest by the largest magnitude (over 7.5); twice as many, and with the largest magnitude in code 8 as well, gain 0.2 % more.
RATIOS = np.linspace(0.68, 1.02, 8, dtype=np.float32)


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

    Scales of the ranges `RATIOS` are tried, each fitted to its codes by least squares; with the best the weights
    are rounded and fitted once more. The error of a group is the sum of its squared differences. Symmetric codes in order, of this
    group or multiples of it, stay as they are.

    Args:
        matrix: codes, or [N, K] floats of any kind.
        group: 32, 64 or 128 inputs.
    Raises:
        SettingsError: another group, or one that does not divide K.
        CheckpointError: a value is not finite.
    """
    n, k = matrix.shape if isinstance(matrix, np.ndarray) else (len(matrix.codes), matrix.scales.shape[1] * matrix.group)
    if group not in GROUPS or k % group:
        raise SettingsError(f"group: {group} for a matrix [{n}, {k}], expected 32, 64 or 128 and a divisor of {k}; pass another group")
    if isinstance(matrix, Coded4) and matrix.zeros is matrix.minima is matrix.order is None and matrix.group % group == 0:
        return Coded4(matrix.codes, matrix.scales.repeat(matrix.group // group, 1), None, None, group)
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // group), np.float32)
    step = max(1, BLOCK // k)
    for start in range(0, n, step):
        stop = min(n, start + step)
        values = np.asarray(matrix[start:stop], np.float32) if isinstance(matrix, np.ndarray) else dense(some_rows(matrix, start, stop))
        if not np.isfinite(values).all():
            raise CheckpointError(f"the matrix [{n}, {k}] has a value that is not finite in rows {start} to {stop}, expected floats; fetch the model again")
        found, fitted = _nearest(values.reshape(-1, group))
        scales[start:stop] = fitted.reshape(stop - start, k // group)
        codes[start:stop] = paired((found + HALF).astype(np.uint8).reshape(stop - start, k))
    return Coded4(codes, scales, None, None, group)


def _nearest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes -8 to 7 [n, group] and scales [n] of groups of float32 values, by the least squared error tried.

    With the scale fitted to codes c the error is |w|^2 - (w c)^2 / |c|^2: the best codes have the largest gain (w c)^2 / |c|^2.
    """
    most = np.take_along_axis(values, np.abs(values).argmax(-1)[:, None], -1)[:, 0]
    gain, scales = np.full(most.shape, -1.0, np.float32), np.zeros_like(most)
    for ratio in RATIOS:
        found, fitted = _fit(values, _rounded(values, most * (-ratio / HALF)))
        scales = np.where(found > gain, fitted, scales)
        gain = np.maximum(gain, found)
    scales = _fit(values, _rounded(values, scales))[1]
    return _rounded(values, scales), scales


def _rounded(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The codes nearest to values, as float32; 0 where the scale is, or is too small to divide by."""
    codes = values * np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > TINY)[:, None]
    return np.clip(np.rint(codes, out=codes), -HALF, HALF - 1, out=codes)


def _fit(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and scale of each group by least squares; 0 where all codes are."""
    products, squares = np.einsum("ng,ng->n", values, codes), np.einsum("ng,ng->n", codes, codes)
    scales = np.divide(products, squares, out=np.zeros_like(squares), where=squares > 0)
    return products * scales, scales
