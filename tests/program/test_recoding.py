"""What the kernels have a form for keeps its bits; the rest comes as near as it can, and says so."""

from __future__ import annotations

import numpy as np
import pytest
from small_programs import made_code, values_of

from flashhead_edge.packed.coded import Coded4, Coded8, dense, paired, requantised, unpaired
from flashhead_edge.program.recoding import EIGHT, FLOATS, GROUP, MINIMA, form_of, recoded, with_whole_zeros, with_zeros


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def with_minima(n: int = 48, k: int = 256, group: int = 32) -> Coded4:
    """Q4_1 of normal weights: the codes reach from a group's smallest weight to its largest."""
    values = random().standard_normal((n, k // group, group)).astype(np.float32)
    low = values.min(-1)
    scales = (values.max(-1) - low) / np.float32(15)
    codes = np.rint((values - low[..., None]) / scales[..., None]).astype(np.uint8)
    return Coded4(paired(codes.reshape(n, k)), scales, None, low, group, None)


@pytest.mark.parametrize("name", [f"layer {i}" for i in range(12)])  # all groups, with zero points and without
def test_what_has_a_kernel_keeps_its_bits(name: str) -> None:
    code = made_code(name, 32, 256)
    form = form_of(code, 64)
    assert (form.n, form.k, form.group, form.reason) == (32, 256, code.group, None) and form.symmetric == (code.zeros is None)
    for group in {32, code.group}:  # smaller groups say the same
        codes, scales, zeros = recoded(code, form, group)
        assert np.array_equal(codes, code.codes) and scales.shape == (32, 256 // group) and (zeros is None) == (code.zeros is None)
        assert np.array_equal(values_of(codes, scales, zeros), dense(code))


def test_rows_come_in_the_order_asked_for() -> None:
    code, rows = made_code("rows", 32, 128), random().permutation(32)
    assert np.array_equal(values_of(*recoded(code, form_of(code, 64), 32, rows)), dense(code)[rows])


def test_one_scale_for_all_inputs_is_one_for_each_group() -> None:
    code = Coded4(made_code("wide", 16, 384).codes, np.full((16, 1), 0.5, np.float32), None, None, 384, None)
    form = form_of(code, 32)
    assert (form.group, form.reason) == (128, None) and np.array_equal(values_of(*recoded(code, form, 128)), dense(code))


def test_floats_and_eight_bits_and_odd_groups_are_coded_anew() -> None:
    floats = random().standard_normal((32, 192)).astype(np.float32)
    eight = Coded8(random().integers(-127, 128, (32, 192), dtype=np.int8), random().uniform(0.01, 0.02, (32, 12)).astype(np.float32), 16)
    odd = Coded4(paired(random().integers(0, 16, (32, 192), dtype=np.uint8)), np.full((32, 12), 0.1, np.float32), None, None, 16, None)
    for matrix, reason in ((floats, FLOATS), (eight, EIGHT), (odd, GROUP)):
        form = form_of(matrix, 64)
        assert (form.n, form.k, form.group, form.symmetric, form.reason, form.order) == (32, 192, 64, True, reason, None)
        codes, scales, zeros = recoded(matrix, form, 64)
        want = requantised(matrix, 64)
        assert zeros is None and np.array_equal(codes, want.codes) and np.array_equal(scales, want.scales)


def test_an_order_that_changes_nothing_is_none() -> None:
    code = made_code("order", 16, 64)
    for order, kept in ((np.arange(64, dtype=np.int32), False), (np.arange(64, dtype=np.int32)[::-1], True)):
        form = form_of(Coded4(code.codes, code.scales, code.zeros, None, code.group, order), 32)
        assert (form.order is not None) == kept


def test_minima_that_are_whole_zero_points_are_kept_exactly() -> None:
    code = made_code("minima", 32, 256)
    zeros = random().integers(0, 16, code.scales.shape)
    codes = code.codes
    asked = Coded4(codes, code.scales, None, (-zeros * code.scales).astype(np.float32), code.group, None)
    assert form_of(asked, 32).reason == MINIMA and not form_of(asked, 32).symmetric
    found = with_whole_zeros(asked)
    # the step is fitted once more to codes that fit it already: the last bits of float32 sums
    assert np.array_equal(found.codes, codes) and np.array_equal(found.zeros, zeros) and np.allclose(found.scales, code.scales, rtol=1e-6, atol=0)


def test_minima_become_the_nearest_whole_zero_points() -> None:
    """Nearer than the same weights without zero points are (0.86 of their squared error was measured), and than the same codes with the zero point rounded."""
    asked = with_minima()
    want = dense(asked)
    found = with_whole_zeros(asked)
    assert found.zeros is not None and found.zeros.max() <= 15 and unpaired(found.codes).max() <= 15 and np.isfinite(found.scales).all()
    error = float(np.square(dense(found) - want).sum())
    whole = Coded4(asked.codes, asked.scales, np.clip(np.rint(-asked.minima / asked.scales), 0, 15).astype(np.uint8), None, 32, None)
    assert error < 0.9 * float(np.square(dense(requantised(want, 32)) - want).sum())
    assert error < 0.8 * float(np.square(dense(whole) - want).sum())


@pytest.mark.parametrize("low", [0.5, -20.0, 0.0])
def test_groups_on_one_side_of_zero_and_groups_of_one_value(low: float) -> None:
    """Minima that no zero point reaches: all weights above 0, or all far below it. Where all are equal one code says it."""
    codes = random().integers(0, 16, (16, 64), dtype=np.uint8)
    asked = Coded4(paired(codes), np.full((16, 2), 0.1, np.float32), None, np.full((16, 2), low, np.float32), 32, None)
    found, span = with_whole_zeros(asked), abs(low) + 1.5
    assert np.isfinite(dense(found)).all() and np.abs(dense(found) - dense(asked)).max() <= span / 15 + 1e-6  # a code's step over the whole span
    flat = Coded4(np.zeros((16, 32), np.uint8), np.zeros((16, 2), np.float32), None, np.full((16, 2), low, np.float32), 32, None)
    assert np.allclose(dense(with_whole_zeros(flat)), low, rtol=1e-6, atol=0)


def test_minima_become_zero_points_to_the_sixteenth() -> None:
    """Codes and scales stay; no weight moves by more than a thirty-second of its step."""
    asked = with_minima()
    form = form_of(asked, 32)
    assert form.reason == MINIMA and not form.symmetric
    codes, scales, zeros = recoded(asked, form, 32)
    assert np.array_equal(codes, asked.codes) and np.array_equal(scales, asked.scales) and zeros is not None and (zeros > 15).any()
    moved = np.abs(values_of(codes, scales, zeros) - dense(asked)) / scales.repeat(32, 1)
    assert 1 / 64 < moved.max() <= 1 / 32 + 1e-5  # float32 of values of some twenty steps


def test_groups_that_no_zero_point_reaches_are_coded_anew_alone() -> None:
    asked = with_minima()
    minima = asked.minima.copy()
    minima[3, 2], minima[5, 1] = 0.4, -20.0
    asked = Coded4(asked.codes, asked.scales, None, minima, 32, None)
    found, whole = with_zeros(asked), with_whole_zeros(asked)
    values, want = values_of(found.codes, found.scales, found.zeros).reshape(48, 8, 32), dense(asked).reshape(48, 8, 32)
    for row, group in ((3, 2), (5, 1)):
        assert np.array_equal(values[row, group], dense(whole).reshape(48, 8, 32)[row, group])
        values[row, group] = want[row, group]
    assert (np.abs(values - want) <= asked.scales[..., None] * (1 / 32 + 1e-5)).all()
