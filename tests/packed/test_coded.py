"""Codes as floats, by the formula one number at a time; rounding to 4 bits against every simpler rounding."""

from __future__ import annotations

import numpy as np
import pytest

from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.packed import Coded4, Coded8, dense, requantised
from flashhead_edge.packed.coded import paired, some_rows, unpaired

N, K, GROUP = 6, 64, 16


def coded4(rng: np.random.Generator, kind: str) -> Coded4:
    codes = rng.integers(0, 256, (N, K // 2), dtype=np.uint8)
    scales = rng.normal(size=(N, K // GROUP)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 16, scales.shape, dtype=np.uint8) if kind in ("zeros", "order") else None
    minima = rng.normal(size=scales.shape).astype(np.float32) if kind == "minima" else None
    order = rng.permutation(K).astype(np.int32) if kind == "order" else None
    return Coded4(codes, scales, zeros, minima, GROUP, order)


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima", "order"])
def test_floats_are_the_formula(kind: str) -> None:
    coded = coded4(np.random.default_rng(0), kind)
    got = dense(coded)
    assert got.dtype == np.float32 and got.shape == (N, K)
    for n in range(N):
        for k in range(K):
            byte = int(coded.codes[n, k // 2])
            code, scale = np.float32(byte >> 4 if k % 2 else byte & 15), coded.scales[n, k // GROUP]
            if coded.minima is not None:
                want = code * scale + coded.minima[n, k // GROUP]
            else:
                want = (code - np.float32(8 if coded.zeros is None else coded.zeros[n, k // GROUP])) * scale
            assert got[n, k if coded.order is None else coded.order[k]] == want
    assert np.array_equal(dense(some_rows(coded, 2, 5)), got[2:5])


def test_floats_of_bytes() -> None:
    rng = np.random.default_rng(1)
    coded = Coded8(rng.integers(-128, 128, (N, K)).astype(np.int8), rng.normal(size=(N, K // GROUP)).astype(np.float32), GROUP)
    assert np.array_equal(dense(coded), coded.codes.astype(np.float32) * coded.scales.repeat(GROUP, 1))
    assert np.array_equal(dense(some_rows(coded, 1, 3)), dense(coded)[1:3])


def test_pairs_go_both_ways() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (3, 8), dtype=np.uint8)
    assert np.array_equal(unpaired(paired(codes)), codes)
    assert paired(np.array([[1, 2]], np.uint8))[0, 0] == 0x21  # the first in the low nibble


def squares(matrix: np.ndarray, coded: Coded4) -> np.ndarray:
    return np.square(matrix.astype(np.float64) - dense(coded)).reshape(len(matrix), -1, coded.group).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_errs_less_than_a_scale_by_the_largest_value(group: int) -> None:
    matrix = np.random.default_rng(3).standard_t(6, size=(40, 256)).astype(np.float32)
    coded = requantised(matrix, group)
    assert coded.zeros is coded.minima is coded.order is None and coded.group == group
    own = squares(matrix, coded)
    for largest in (7.0, 7.5, 8.0):  # the usual ranges; each group on its own, since each has its own scale
        groups = matrix.reshape(40, -1, group)
        scale = np.abs(groups).max(-1, keepdims=True) / largest
        plain = np.square(groups - np.clip(np.rint(groups / scale), -8, 7) * scale).sum(-1)
        # a range that is not among those tried may fit one group by chance; on the whole ours errs less (17 % or more on these weights)
        assert (own <= plain).mean() > 0.9 and own.sum() < 0.9 * plain.sum()


def test_rounding_is_to_the_nearest_code_of_the_best_scale_tried() -> None:
    matrix = np.random.default_rng(4).normal(size=(4, 64)).astype(np.float32)
    coded = requantised(matrix, 32)
    codes, scales = unpaired(coded.codes).astype(np.float32) - 8, coded.scales.repeat(32, 1)
    for other in (-1, 1):
        moved = np.clip(codes + other, -8, 7) * scales
        # equal distances within float32 rounding may go either way
        assert (np.abs(matrix - codes * scales) <= np.abs(matrix - moved) * (1 + 1e-5) + 1e-7).all()


def test_rounding_of_what_is_on_a_grid_changes_nothing() -> None:
    """Codes -8 to 7 times one scale: some range tried hits them, and the fit finds the scale to float32 rounding."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (8, 128)).astype(np.float32)
    codes[:, ::32] = -8  # the largest magnitude of each group
    matrix = codes * rng.uniform(0.5, 2, (8, 4)).astype(np.float32).repeat(32, 1)
    for sign in (1, -1):  # the range of either sign is found
        assert np.allclose(dense(requantised(sign * matrix, 32)), sign * matrix, rtol=1e-5, atol=0)


def test_rounding_of_zeros_and_of_the_smallest_numbers() -> None:
    matrix = np.zeros((2, 64), np.float32)
    matrix[1, 3] = 1e-42
    coded = requantised(matrix, 32)
    assert (dense(coded) == 0).all() and (coded.scales == 0).all() and (coded.codes == 0x88).all()


def test_symmetric_codes_stay_as_they_are() -> None:
    rng = np.random.default_rng(6)
    whole = Coded4(rng.integers(0, 256, (3, 64), dtype=np.uint8), rng.normal(size=(3, 1)).astype(np.float32), None, None, 128)
    assert np.array_equal(dense(requantised(whole, 32)), dense(whole))
    turned = Coded4(whole.codes, whole.scales.repeat(4, 1), None, None, 32, rng.permutation(128).astype(np.int32))
    assert requantised(turned, 32).order is None


def test_refusals_of_rounding() -> None:
    with pytest.raises(SettingsError, match=r"^group: 16 for a matrix \[2, 64\], expected 32, 64 or 128 and a divisor of 64; pass another group$"):
        requantised(np.zeros((2, 64), np.float32), 16)
    with pytest.raises(SettingsError, match=r"^group: 128 for a matrix \[2, 64\]"):
        requantised(np.zeros((2, 64), np.float32), 128)
    matrix = np.zeros((2, 64), np.float32)
    matrix[1, 1] = np.nan
    with pytest.raises(CheckpointError, match=r"^the matrix \[2, 64\] has a value that is not finite"):
        requantised(matrix, 32)
