"""Codes: what is written is read back, at the rate that theory asks, and bad arrays are refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead_edge import coding
from flashhead_edge.codes import Coded, packed_bytes, row_bytes, table_bytes, total_bytes
from flashhead_edge.coding import _pack, _unpack, decode, encode, encode_bits, to_torch, water_level
from flashhead_edge.errors import CheckpointError


def falling(n: int = 2000, columns: int = 48) -> torch.Tensor:
    """Rows whose columns' variances fall, as those of coordinates do."""
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, columns)


def error_of(values: torch.Tensor, code: str) -> float:
    back = decode(to_torch(encode(values, code)))
    back = torch.nn.functional.pad(back, (0, values.shape[1] - back.shape[1]))
    return float((values - back).norm() / values.norm())


@pytest.mark.parametrize("code", ["float16", "int8/16", "int4/16", "int3/16", "bits12", "bits24", "product4", "product12"])
def test_rows_decode_alone_as_among_all(code):
    coded = to_torch(encode(falling(), code))
    rows = torch.tensor([3, 1999, 0, 3])
    assert torch.equal(decode(coded, rows), decode(coded)[rows])
    assert torch.equal(decode(coded, slice(5, 9)), decode(coded)[5:9])


@pytest.mark.parametrize(
    ("coarse", "fine"), [("int3/16", "int4/16"), ("int4/16", "int8/16"), ("bits6", "bits12"), ("product3", "product6"), ("bits24", "float16")]
)
def test_more_bits_are_closer(coarse, fine):
    assert error_of(falling(), fine) < 0.8 * error_of(falling(), coarse)


def test_bits_follow_the_rate_of_water_filling():
    """A Gaussian source at water level D has mean distortion min(D, variance); scalar quantisers lose 1.53 dB at most a
    bit's granularity more: within a factor 2.5 of the bound here."""
    values = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, 32)
    variance, bits = values.double().var(0), 8 * 10
    owed = water_level(variance, bits)
    bound = float((variance * 2 ** (-2 * owed)).sum())
    coded = encode_bits(values, 10)
    back = torch.nn.functional.pad(decode(to_torch(coded)), (0, 32 - coded.columns))
    measured = float((values - back).square().sum(1).mean())
    assert bound < measured < 2.5 * bound
    assert coded.data.shape[1] <= 10


def test_product_code_beats_scalar_bits_at_equal_bytes():
    """The reason that product codes are there (RESULTS of the maps: about twice as sharp)."""
    values = falling(8000) @ torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(2))).Q * torch.logspace(0, -2, 48)
    assert error_of(values, "product8") < error_of(values, "bits6")  # bits6 and its scale are 8 bytes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_packed_fields_come_back(widths, seed):
    generator = np.random.default_rng(seed)
    fields = np.stack([generator.integers(0, 2**w, 7) for w in widths], 1)
    data = _pack(torch.from_numpy(fields), np.array(widths))
    assert data.shape == (7, packed_bytes(np.array(widths)))
    bit = 0
    for j, w in enumerate(widths):
        if w:
            assert np.array_equal(_unpack(torch.from_numpy(data), bit, w, 1)[:, 0].numpy(), fields[:, j])
        bit += w


def test_encoding_is_reproducible():
    for code in ("product8", "bits16", "int4/16"):
        a, b = encode(falling(), code, seed=3), encode(falling(), code, seed=3)
        assert np.array_equal(a.data, b.data)


@pytest.mark.parametrize("n", [1, 3, 300])
def test_few_rows_and_constant_rows(n):
    """Fewer rows than codebook entries, and rows that are all the same, are coded without error."""
    values = torch.full((n, 6), 0.5)
    for code in ("product4", "product40"):
        assert error_of(values, code) < 0.01  # an entry is stored in 8 bits of its column's largest
    assert error_of(torch.zeros(n, 6) + 1e-3, "int4/3") < 0.01


def test_a_codebook_in_few_bits_loses_what_it_may(monkeypatch):
    """Against entries in 8 bits: the squared error grows by ENTRY_NOISE and what chance adds, a twentieth here; the table shrinks."""
    values = falling(8000)
    coarse = encode(values, "product8")
    monkeypatch.setattr(coding, "ENTRY_NOISE", 0.0)
    fine = encode(values, "product8")
    assert fine.widths.tolist() == [8] * fine.columns
    assert table_bytes(coarse) < 0.7 * table_bytes(fine)

    def square(coded):
        return float((values[:, : coded.columns] - decode(to_torch(coded))).square().sum())

    assert square(coarse) < (1 + 0.2 + 0.05) * square(fine)


def test_sizes_are_those_of_the_arrays():
    coded = encode(falling(), "product8")
    assert row_bytes(coded) == 8
    assert table_bytes(coded) == coded.codebook.nbytes + coded.widths.nbytes + coded.steps.nbytes + coded.group_ends.nbytes
    assert total_bytes(coded) == 2000 * 8 + table_bytes(coded)
    assert row_bytes(encode(falling(), "int4/16")) == 48 // 2 + 3 * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "zip"}, "kind is zip, expected one of float16"),
        ({"data": np.zeros((4, 3), np.int8)}, "data is int8 [4, 3], expected uint8"),
        ({"codebook": np.zeros((255, 9), np.uint8)}, "codebook is uint8 [255, 9], expected uint8 [256,"),
        ({"codebook": None}, "codebook is absent"),
        ({"group_ends": np.array([2, 1, 3, 4], np.int32)}, "group_ends is"),
    ],
)
def test_bad_arrays_are_refused(change, words):
    coded = encode(falling(), "product4")
    with pytest.raises(CheckpointError) as caught:
        dataclasses.replace(coded, **change)
    assert words in str(caught.value)


def test_not_finite_is_refused():
    coded: Coded = encode(falling(), "int4/16")
    scale = coded.scale.copy()
    scale[5, 0] = np.nan
    with pytest.raises(CheckpointError, match="scale is not finite"):
        dataclasses.replace(coded, scale=scale)
