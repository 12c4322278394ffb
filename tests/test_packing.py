"""The kernel's image of an index, read as the kernel reads it, on the CPU: every array against the decoded code."""

import dataclasses

import numpy as np
import pytest

from flashhead_edge.calibration import options
from flashhead_edge.cases import CASES, FEW_CODES, FEWEST_BYTES, SHAPES, Case, case_of, made_bits, made_index, made_product
from flashhead_edge.coding import decode, to_torch
from flashhead_edge.devices import device_named
from flashhead_edge.errors import DeviceError
from flashhead_edge.kernels.packing import bit_weights, check_codes, factors, fields, pack, pack_book, pack_rotation, plans, row_records, table_bound


def decoded(coded):
    return decode(to_torch(coded)).double().numpy()


def rotation_of(d):
    return made_bits(np.random.default_rng(0), d, d * 5 // 8, d, 0.1)


def test_rotation_words_are_the_rotation():
    coded = rotation_of(64)
    assert {4, 5, 6} <= set(coded.widths.tolist())
    words, columns, reach = pack_rotation(coded)
    values = (words.transpose(1, 0, 2).reshape(8, 1, -1) >> (4 * np.arange(8)[None, :, None])) & 15  # [d / 8, 8, virtual columns]
    centred = (values.reshape(64, -1) - 7.5) * factors(coded, columns)
    found = np.zeros((64, coded.columns + 1))
    for v, j in enumerate(columns.reshape(-1)):
        if j > 0:
            found[:, j] += centred[:, v]
    assert np.allclose(found[:, 1:] * coded.scale.astype(float), decoded(coded), rtol=1e-6, atol=1e-9)
    assert (np.abs(found).max(0) <= reach * 1.0001).all()


def test_codebooks_lie_in_the_order_of_the_rotation():
    random = np.random.default_rng(1)
    coded = made_product(random, 10, 6, 65, 65, 1.0)
    _, columns, reach = pack_rotation(rotation_of(64))
    book, where, wide_chunks, chunks, names = pack_book(coded, columns)
    assert 0 < wide_chunks < chunks <= len(columns)
    entries = np.zeros((256, 65))
    for c, i in np.argwhere(where[..., 2].view(np.int32) >= 0):
        if c < wide_chunks:
            data = book[1024 * c + 256 * i :][:256]
        else:
            half = book[512 * (c + wide_chunks) + 128 * i :][:128]
            data = np.stack([half & 15, half >> 4], 1).reshape(-1)
        j = columns[c, i]
        step, centre, part, _ = where[c, i]
        entries[:, j] = (data - float(centre)) * float(step)
        assert coded.group_ends[names[part.view(np.int32)]] > j
    used = np.isin(np.arange(65), columns)
    assert np.allclose(entries[:, used], (to_torch(coded).arrays["entries"].double().numpy())[:, used], rtol=1e-6, atol=1e-9)
    slope, base = table_bound(coded, reach)
    assert np.abs(entries[:, 0]).max() <= base
    assert (np.abs(entries[:, 1:]).max(0) @ reach[1:]) <= slope


@pytest.mark.parametrize("size", [7, 30, 64])
def test_bits_of_a_record_add_up_to_the_row(size):
    random = np.random.default_rng(2)
    coded = made_bits(random, 12, size, 100, 1.0)
    error = random.integers(0, 256, 12, dtype=np.uint8)
    records, scale_at, inside = row_records(coded, error)
    assert records.shape[1] % 4 == 0
    assert np.array_equal(records[:, scale_at : scale_at + 2].copy().view(np.float16), coded.scale)
    assert not inside or np.array_equal(records[:, inside], error)
    z = random.standard_normal(coded.columns)
    weights = bit_weights(coded)
    half, coordinate = np.ascontiguousarray(weights[:, 0]).view(np.float32).astype(float), weights[:, 1].astype(int)
    bits = np.unpackbits(records[:, : len(weights) // 8], axis=1, bitorder="little", count=len(weights))
    found = ((2.0 * bits - 1) * half * z[coordinate]).sum(1) * coded.scale[:, 0]
    assert np.allclose(found, decoded(coded) @ z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fitted", "bits alone", "bits alone, caps hit", "centroids of bits, rows of products"])
def test_records_lie_where_the_header_says(name):
    """The first code's are interleaved within a cluster, word by word; later ones and the centroids' lie row by row."""
    index = made_index(next(c for c in CASES if c.name == name))
    packed = pack(index)
    words = packed.image.view(np.uint32)
    codes = [(index.centroids, None, packed.layout.centroid), *((s.rows, s.gate.error, at) for s, at in zip(index.stages, packed.layout.stage))]
    for i, (coded, error, stage) in enumerate(codes):
        records, size, inside = row_records(coded, error)
        records = records.view(np.uint32)
        assert (stage.stride, stage.bytes, stage.interleaved) == (4 * records.shape[1], size, int(i == 1))
        slot, word = np.arange(coded.n)[:, None], np.arange(records.shape[1])[None]
        cluster, place = slot // index.cluster_size, slot % index.cluster_size
        apart = cluster * index.cluster_size * records.shape[1] + word * index.cluster_size + place if stage.interleaved else slot * records.shape[1] + word
        assert np.array_equal(words[stage.rows_at // 4 + apart], records)
        if error is not None and not inside:
            assert np.array_equal(packed.image[stage.error_at :][: coded.n], error)
        assert error is None or stage.error_byte == (inside or -1)
    assert np.array_equal(packed.image[packed.layout.centroid.error_at :][: index.n_clusters], index.probe.error)


def test_fields_read_what_was_packed():
    coded = made_bits(np.random.default_rng(3), 5, 20, 40, 1.0)
    whole = fields(coded, coded.data)
    assert (whole < 2.0**coded.widths).all()


@pytest.mark.parametrize(
    "case",
    [*(c for c in CASES if c.vocab_size < 10_000), *(case_of(name, s) for name in SHAPES for s in (FEW_CODES, FEWEST_BYTES))],
    ids=lambda c: f"{c} {c.rows}",
)
def test_every_case_has_a_plan_for_every_board(case):
    packed = pack(made_index(case))
    for processors, shared in ((8, 163 << 10), (16, 163 << 10), (84, 98 << 10), (132, 226 << 10)):  # less what the kernel declares itself
        made = plans(packed, processors, shared, 32)
        for rows, one in enumerate(made, 1):
            assert one.shared_bytes <= shared and one.multiprocessors == processors
            share = max(1, processors // rows)
            assert share <= one.blocks <= processors
            assert -(-rows // (processors // one.blocks)) <= 2 * -(-rows // (processors // share))
            # plans share a workspace: a row's part of it is laid out alike
            for name in ("row_bytes", "row_messages", "row_tables", "row_z", "row_scores", "row_histograms"):
                assert getattr(one, name) == getattr(made[0], name), name


def test_a_code_without_a_kernel_is_refused():
    index = made_index(CASES[0])
    other = dataclasses.replace(index, rotation=dataclasses.replace(index.rotation, kind="int", scale=index.rotation.scale))
    with pytest.raises(DeviceError, match="rotation code is int"):
        pack(other)


def test_everything_that_calibration_may_choose_has_a_kernel():
    """Each choice by itself, on the largest vocabulary known, whose clusters are the most."""
    choices = dict(options(device_named("h100")))
    gemma_3 = Case("any", 262_208, 256, min(choices["cluster_size"]), ("bits30",), "product16", (1.0,) * 5, (1.0,) * 5)
    for name, field in (("cluster_size", "cluster_size"), ("centroids", "centroids"), ("codes", "rows")):
        for choice in choices[name]:
            check_codes(made_index(dataclasses.replace(gemma_3, **{field: choice})))
