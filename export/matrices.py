"""A matrix of a checkpoint as a tensor of a graph: read from its file when it is written, never held."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from flashhead_edge.checkpoint.tensors import Entry

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def stored_matrix(file: Path, entry: Entry, name: str) -> ir.LazyTensor:
    """The tensor at `entry` of a safetensors file in its own dtype, mapped.

    onnx-ir's own tensors of other files refuse a file that has a second name, as a checkpoint's have that shares weights with another one.
    """

    def mapped() -> ir.Tensor:
        values: np.ndarray = np.memmap(file, NUMPY[entry.dtype], "r", entry.start, entry.shape)
        return ir.Tensor(values, dtype=DTYPES[entry.dtype], name=name)

    return ir.LazyTensor(mapped, dtype=DTYPES[entry.dtype], shape=ir.Shape(entry.shape), name=name, cache=False)
