"""What the kernels have a form for keeps its bits; the rest comes as near as it can, and says so."""

from __future__ import annotations

import numpy as np
import pytest
from plugin_interpreter import zero_points
from small_programs import made_code, values_of

from flashhead_edge.packed.coded import Coded4, Coded8, dense, paired, requantised
from flashhead_edge.program.recoding import EIGHT, FLOATS, GROUP, MINIMA, form_of, recoded, with_zeros


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


def test_minima_that_are_zero_points_are_kept_exactly() -> None:
    """Every sixteenth from 0 to 15 15/16."""
    code = made_code("minima", 32, 256)
    sixteenths = np.arange(code.scales.size).reshape(code.scales.shape) * 7 % 256
    asked = Coded4(code.codes, code.scales, None, (-sixteenths / 16 * code.scales).astype(np.float32), code.group, None)
    assert form_of(asked, 32).reason == MINIMA and not form_of(asked, 32).symmetric
    codes, scales, zeros = recoded(asked, form_of(asked, 32), code.group)
    assert zeros is not None and np.array_equal(codes, code.codes) and np.array_equal(scales, code.scales)
    assert np.array_equal(zero_points(zeros), sixteenths / 16)


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
    """All weights above 0, all far below it, or all equal: symmetric, each as near as half a step; the others keep their bits."""
    asked = with_minima()
    scales, minima = asked.scales.copy(), asked.minima.copy()
    minima[3, 2], minima[5, 1], scales[7, 0] = 0.4, -20.0, 0.0
    asked = Coded4(asked.codes, scales, None, minima, 32, None)
    found = with_zeros(asked)
    error = np.abs(values_of(found.codes, found.scales, found.zeros) - dense(asked)).reshape(48, 8, 32).max(-1)
    outside = np.zeros((48, 8), bool)
    outside[[3, 5, 7], [2, 1, 0]] = True
    assert (found.zeros[outside] == 8).all() and np.array_equal(found.scales[~outside], scales[~outside])
    assert (error[~outside] <= scales[~outside] * (1 / 32 + 1e-5)).all()
    assert (error[outside] <= np.abs(found.scales[outside]) * 0.75).all() and error[7, 0] < 1e-6  # the scale that errs least cuts the ends off a little
    assert np.array_equal(found.codes.reshape(48, 8, 16)[~outside], asked.codes.reshape(48, 8, 16)[~outside])


def test_minima_of_large_groups_are_those_of_smaller_ones() -> None:
    asked = with_minima(16, 512, 256)
    form = form_of(asked, 32)
    assert form.group == 128
    codes, scales, zeros = recoded(asked, form, 64)
    assert scales.shape == (16, 8) and zeros is not None and zeros.shape == (16, 8)
    assert (np.abs(values_of(codes, scales, zeros) - dense(asked)) <= scales.repeat(64, 1) * (1 / 32 + 1e-5)).all()
