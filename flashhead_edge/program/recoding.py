"""From what a checkpoint stores to what the W4A16 kernels read: 4 bits, zero points, groups of 32, 64 or 128, inputs as they come. numpy only.

What the kernels have no form for is coded anew, and told as a reason; the rest keeps its integers and scales bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashhead_edge.packed.coded import GROUPS, HALF, Coded4, Coded8, requantised, unpaired

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
        found = with_zeros(_spread(matrix, group))
    parts = (found.codes, found.scales, found.zeros)
    return parts if rows is None else (parts[0][rows], parts[1][rows], None if parts[2] is None else parts[2][rows])


def _spread(coded: Coded4, group: int) -> Coded4:
    """The same matrix in smaller groups."""
    times = coded.group // group
    if times == 1:
        return coded
    zeros, minima = (None if values is None else values.repeat(times, 1) for values in (coded.zeros, coded.minima))
    return replace(coded, scales=coded.scales.repeat(times, 1), zeros=zeros, minima=minima, group=group)


def with_zeros(coded: Coded4) -> Coded4:
    """A matrix of codes * scales + minima as (codes - zeros) * scales, its zeros bytes of w4a16.h: whole in the low nibble, sixteenths in the high one.

    Codes and scales stay; the few groups whose zero point lies outside of 0 to 15 15/16 are coded anew, symmetric. One without minima stays as it is.
    """
    if coded.minima is None:
        return coded
    sixteenths = np.rint(-coded.minima / np.where(coded.scales == 0, np.float32(1), coded.scales) * 16)
    outside = (coded.scales == 0) | (sixteenths < 0) | (sixteenths > 255)
    fine = np.where(outside, 0, sixteenths).astype(np.uint8)
    zeros = fine >> 4 | (fine & 15) << 4
    if not outside.any():
        return replace(coded, zeros=zeros, minima=None)
    codes, scales = coded.codes.reshape(*zeros.shape, -1).copy(), coded.scales.copy()
    anew = requantised(unpaired(codes[outside]) * scales[outside][:, None] + coded.minima[outside][:, None], coded.group)
    codes[outside], scales[outside], zeros[outside] = anew.codes, anew.scales[:, 0], HALF
    return replace(coded, codes=codes.reshape(coded.codes.shape), scales=scales, zeros=zeros, minima=None)
