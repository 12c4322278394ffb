"""The index checks itself once: each rule of the format has a test that breaks it."""

import dataclasses

import numpy as np
import pytest
import torch
from small_heads import everything_open

from flashhead_edge.costs import bytes_per_step, dense_bytes, fixed_bytes
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import Gate, own_error, slot_of_token


@pytest.fixture(scope="module")
def index():
    weight = torch.randn(131, 16, generator=torch.Generator().manual_seed(0))
    return everything_open(weight, cascade=True)


def swapped(table):
    table = table.copy()
    table[0, 0] = table[0, 1]
    return table


def hole(table):
    table = table.copy()
    table[-1, 0], table[-1, 1] = -1, table[-1, 0]
    return table


BROKEN = [
    (lambda i: {"token_table": i.token_table.astype(np.int64)}, "token_table is int64 [17, 8], expected int32"),
    (lambda i: {"token_table": swapped(i.token_table)}, "expected each id 0 to 130 exactly once"),
    (lambda i: {"token_table": hole(i.token_table)}, "empty slots only at the end of a row"),
    (lambda i: {"vocab_size": 130}, "token_table is 131 tokens, expected each id 0 to 129 exactly once"),
    (lambda i: {"probe": dataclasses.replace(i.probe, cap=0)}, "probe cap is 0, expected 1 to 17"),
    (lambda i: {"probe": dataclasses.replace(i.probe, cap=18)}, "probe cap is 18, expected 1 to 17"),
    (lambda i: {"probe": dataclasses.replace(i.probe, margin=float("nan"))}, "probe margin is nan"),
    (lambda i: {"probe": dataclasses.replace(i.probe, margin=-1.0)}, "probe margin is -1.0, expected 0 or more"),
    (lambda i: {"probe": dataclasses.replace(i.probe, unit=0.0)}, "probe unit is 0.0, expected a positive number"),
    (lambda i: {"probe": Gate(np.zeros(3, np.uint8), 1.0, 1.0, 3)}, "probe error is uint8 [3], expected uint8 [17]"),
    (lambda i: {"always_scored": np.array([5, 5], np.int32)}, "always_scored is out of order or range"),
    (lambda i: {"always_scored": np.array([131], np.int32)}, "ascending ids below 131"),
    (lambda i: {"mean": None}, "rotation is given without mean"),
    (lambda i: {"mean": np.full(16, np.inf, np.float32)}, "mean is not finite"),
    (lambda i: {"hidden_size": 17}, "mean is float32 [16], expected float32 [17]"),
    (lambda i: {"rotation": dataclasses.replace(i.rotation, data=i.rotation.data[:-1], scale=i.rotation.scale[:-1])}, "rotation is 15 rows, expected 16"),
    (lambda i: {"tail_offset": float("inf")}, "tail is [1.0, inf], expected finite numbers"),
    (lambda i: {"state_power": 2.0}, "state_power is 2.0, expected 0 to 1"),
    (lambda i: {"stages": (dataclasses.replace(i.stages[0], rows=i.centroids),)}, "stage 1 rows is 17, expected 136"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[w for _, w in BROKEN])
def test_each_rule_is_checked(index, change, words):
    with pytest.raises(CheckpointError) as caught:
        dataclasses.replace(index, **change(index))
    assert words in str(caught.value)
    assert str(caught.value).startswith("head index: ")


def test_slots_and_errors(index):
    slots = slot_of_token(index)
    assert (index.token_table.reshape(-1)[slots] == np.arange(131)).all()
    gate = Gate(np.array([0, 8, 16], np.uint8), 0.5, 1.0, 3)
    assert own_error(gate).tolist() == [0.5, 1.0, 2.0]


def test_bytes_count_everything(index):
    """Added up by hand: rotation, mean, centroids and their errors, tables, always-scored ids; then what a step reads."""
    rotation = 16 * (8 + 1 * 2)  # 8 columns in int8 and one scale a row, 16 rows
    centroids = 17 * (9 * 2 + 1)  # 9 coordinates in float16 and an error byte
    assert fixed_bytes(index) == rotation + 16 * 4 + centroids + 2 * 4
    counts = np.array([[17, 131, 20, 3]])
    first, second = 5 + 3 * 2 + 1, 9 + 3 * 2 + 1  # int4 and int8 of 9 columns in groups of 3, with scales and an error byte
    assert bytes_per_step(index, counts, 32)[0] == fixed_bytes(index) + 131 * first + 20 * second + 3 * (32 + 4)
    assert dense_bytes(131, 16) == 2 * 131 * 16
