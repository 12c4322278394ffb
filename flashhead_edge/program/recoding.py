"""From what a checkpoint stores to what the W4A16 kernels read: 4 bits, zero points, groups of 32, 64 or 128, inputs as they come. numpy only.

What the kernels have no form for is coded anew, and told as a reason; the rest keeps its integers and scales bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashhead_edge.packed.coded import GROUPS, Coded4, Coded8, paired, requantised, unpaired

FLOATS = "stored as floats, coded in 4 bits here to the nearest (flashhead quantize codes them better)"
EIGHT = "stored in 8 bits, coded in 4 bits here to the nearest"
MINIMA = "with a minimum for each group, which became a zero point to the nearest sixteenth of a step"
ORDER = "whose inputs stand in an order of their own (act-order), coded anew in that of their layer"
GROUP = "in groups without a kernel, coded anew in groups that have one"


@dataclass(frozen=True, eq=False)
class Form:
    """How a matrix will lie in the program."""

    n: int
    k: int
    group: int  # the largest that it can have
    symmetric: bool
    reason: str | None  # why it is coded anew, None: it is not
    order: np.ndarray | None  # [K] of its inputs, where another layer's rows may take it


def form_of(matrix: Coded4 | Coded8 | np.ndarray, group: int) -> Form:
    """What `recoded` will make of a matrix as it is stored.

    Args:
        group: of matrices that are coded anew.
    """
    if isinstance(matrix, np.ndarray):
        n, k = matrix.shape
        return Form(n, k, group, True, FLOATS, None)
    if isinstance(matrix, Coded8):
        n, k = matrix.codes.shape
        return Form(n, k, group, True, EIGHT, None)
    n, k = len(matrix.codes), 2 * matrix.codes.shape[1]
    kept = next((g for g in sorted(GROUPS, reverse=True) if matrix.group % g == 0), None)
    if kept is None:
        return Form(n, k, group, True, GROUP, None)
    order = None if matrix.order is None or np.array_equal(matrix.order, np.arange(k)) else matrix.order
    return Form(n, k, kept, matrix.zeros is None and matrix.minima is None, None if matrix.minima is None else MINIMA, order)


def anew(form: Form, reason: str, group: int) -> Form:
    """The form of a matrix that has to be coded anew for another reason."""
    return replace(form, symmetric=True, reason=reason, group=group, order=None)


def recoded(matrix: Coded4 | Coded8 | np.ndarray, form: Form, group: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A matrix in the neutral layout: codes [N, K / 2], scales [N, K / group] float32, zeros [N, K / group] as bytes of w4a16.h or None.

    Args:
        form: as `form_of` or `anew` gave it.
        group: that of the stack, a divisor of the form's.
        rows: the order in which its rows shall stand; None: as they are.
    """
    if form.reason is not None and form.reason != MINIMA:
        found = requantised(matrix, group)
    else:
        assert isinstance(matrix, Coded4)
        found = matrix if matrix.minima is None else with_zeros(matrix)
    parts = (found.codes, _spread(found.scales, found.group, group), None if found.zeros is None else _spread(found.zeros, found.group, group))
    return parts if rows is None else (parts[0][rows], parts[1][rows], None if parts[2] is None else parts[2][rows])


def _spread(values: np.ndarray, group: int, smaller: int) -> np.ndarray:
    """Values of groups for smaller groups, which say the same."""
    return values if group == smaller else values.repeat(group // smaller, 1)


def with_zeros(coded: Coded4) -> Coded4:
    """A matrix codes * scales + minima as (codes - zeros) * scales, its zeros bytes of w4a16.h: whole in the low nibble, sixteenths in the high one.

    Codes and scales stay; a group whose zero point lies outside of 0 to 15 15/16 is coded anew with a whole one.
    """
    assert coded.minima is not None
    step = np.where(coded.scales == 0, np.float32(1), coded.scales)
    sixteenths = np.rint(-coded.minima / step * 16)
    inside = (coded.scales != 0) & (sixteenths >= 0) & (sixteenths <= 255)
    fine = np.where(inside, sixteenths, 0).astype(np.uint8)
    zeros = fine >> 4 | (fine & 15) << 4
    if inside.all():
        return replace(coded, zeros=zeros, minima=None)
    whole = with_whole_zeros(coded)
    assert whole.zeros is not None
    codes = np.where(inside.repeat(coded.group // 2, 1), coded.codes, whole.codes)
    return replace(coded, codes=codes, scales=np.where(inside, coded.scales, whole.scales), zeros=np.where(inside, zeros, whole.zeros), minima=None)


def with_whole_zeros(coded: Coded4) -> Coded4:
    """A matrix codes * scales + minima as (codes - zeros) * scales with zeros 0 to 15, each group as near as those tried.

    Its own step with the two nearest zero points, and those steps that bring the zero point to a whole number or reach both ends; then the step
    that fits the codes best (least squares).
    """
    assert coded.minima is not None
    n, groups = coded.scales.shape
    values = (unpaired(coded.codes).reshape(n, groups, -1) * coded.scales[..., None] + coded.minima[..., None]).astype(np.float32)
    low, high = values.min(-1), values.max(-1)
    step = np.where(coded.scales == 0, np.float32(1), coded.scales)
    exact = np.clip(-coded.minima / step, 0, 15)
    best = np.full((n, groups), np.inf, np.float32)
    codes, scales, zeros = np.zeros(values.shape, np.uint8), np.zeros_like(step), np.zeros((n, groups), np.uint8)
    for zero in (np.floor(exact), np.ceil(exact)):
        reach = np.maximum(np.where(zero > 0, -low / np.maximum(zero, 1), 0), np.where(zero < 15, high / np.maximum(15 - zero, 1), 0))
        for tried in (step, -coded.minima / np.maximum(zero, 1), reach):
            scale = np.where(np.isfinite(tried) & (tried != 0), tried, step).astype(np.float32)
            found = np.clip(np.rint(values / scale[..., None]) + zero[..., None], 0, 15)
            around = found - zero[..., None]
            power = np.square(around).sum(-1)
            scale = np.where(power > 0, (around * values).sum(-1) / np.maximum(power, 1), scale).astype(np.float32)
            error = np.square(around * scale[..., None] - values).sum(-1)
            better = error < best
            best = np.where(better, error, best)
            scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros).astype(np.uint8)
            codes = np.where(better[..., None], found, codes).astype(np.uint8)
    return Coded4(paired(codes.reshape(n, -1)), scales, zeros, None, coded.group, coded.order)
