"""The codes of an index as arrays that ONNX operators can multiply. numpy and torch's decoder.

Every code is a grid: value(row, j) = scale[row] * steps[j] * (whole[row, j] + half), with `whole` in 8 bits. That holds
exactly for codes of bits, whose widths are at most 8, and for product codes, whose codebooks are such grids: nothing is
rounded again, the exported head has the values of the index. What is no grid (float16, integers with several scales a
row) keeps its values in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashhead_edge.codes import Coded
from flashhead_edge.coding import decode, to_torch


@dataclass(frozen=True, eq=False)
class Grid:
    """A coded matrix [n, columns], unpacked."""

    whole: np.ndarray  # [n, columns] int8, or float16: the values themselves, with steps and scale of one
    steps: np.ndarray  # [columns] float32
    scale: np.ndarray | None  # [n] float32; None: ones
    half: float

    @property
    def columns(self) -> int:
        return self.whole.shape[1]


def grid(coded: Coded) -> Grid:
    """Unpack a code without changing a value."""
    if coded.kind in ("bits", "product"):
        return _grid_of_fields(coded)
    if coded.kind == "int" and coded.scale is not None and coded.scale.shape[1] == 1 and coded.widths is not None:
        half = 2.0 ** (int(coded.widths.max(initial=1)) - 1)
        whole = _fields(coded.data, coded.widths.astype(np.int64)) - half
        return Grid(whole.astype(np.int8), np.ones(coded.columns, np.float32), coded.scale[:, 0].astype(np.float32), 0.0)
    values = decode(to_torch(coded)).numpy()
    return Grid(values.astype(np.float16), np.ones(coded.columns, np.float32), None, 0.0)


def _grid_of_fields(coded: Coded) -> Grid:
    assert coded.widths is not None and coded.steps is not None
    widths = coded.widths.astype(np.int64)
    half = np.where(widths > 0, 1 << np.maximum(widths - 1, 0), 0)
    if coded.kind == "product":
        assert coded.codebook is not None and coded.group_ends is not None
        entries = (_fields(coded.codebook, widths) - half).astype(np.int8)
        whole = np.empty((coded.n, coded.columns), np.int8)
        start = 0
        for g, end in enumerate(coded.group_ends.tolist()):
            whole[:, start:end] = entries[:, start:end][coded.data[:, g]]
            start = end
        scale = None
    else:
        whole = np.empty((coded.n, coded.columns), np.int8)
        for rows in np.array_split(np.arange(coded.n), max(1, coded.n // 8192)):
            whole[rows] = (_fields(coded.data[rows], widths) - half).astype(np.int8)
        scale = None if coded.scale is None else coded.scale[:, 0].astype(np.float32)
    return Grid(whole, np.where(widths > 0, coded.steps, 0).astype(np.float32), scale, 0.5)


def _fields(data: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Fields of packed rows, [n, columns] int64, whole numbers from 0 on; of no width: 0."""
    first = np.concatenate([[0], np.cumsum(widths)[:-1]])
    byte, shift = first // 8, first % 8
    padded = np.concatenate([data, np.zeros((len(data), 2), np.uint8)], 1).astype(np.int64)
    wide = padded[:, byte] | (padded[:, byte + 1] << 8)
    return (wide >> shift) & ((1 << widths) - 1)
