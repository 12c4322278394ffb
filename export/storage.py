"""Several models over one file of weights: every tensor is stored once, and ONNX Runtime maps the file into memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flashhead_edge.errors import ExportError

DATA = "model.onnx.data"
ALIGNMENT = 4096  # bytes: a tensor begins on a page, as mapping wants it
SMALL = 256  # bytes up to which a tensor stands in the model file itself


def write_models(folder: Path, models: dict[str, ir.Model]) -> None:
    """Write models into a folder, their tensors into one file beside them. Tensors of one name are one tensor.

    Args:
        models: by file name.
    Raises:
        ExportError: two models mean different tensors by one name.
    """
    stored: dict[str, ir.ExternalTensor] = {}
    with (folder / DATA).open("xb") as file:
        for model in models.values():
            for name, value in _initializers(model):
                tensor: Any = value.const_value
                assert tensor is not None
                if tensor.nbytes <= SMALL:  # it may lie in a file of its own until now
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
                    continue
                known = stored.get(name)
                if known is None:
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    start = file.tell()
                    tensor.tofile(file)  # one that is mapped from another file goes from there, page by page
                    known = ir.ExternalTensor(DATA, start, file.tell() - start, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=folder)
                    stored[name] = known
                elif list(known.shape) != list(tensor.shape) or known.dtype != tensor.dtype:
                    raise ExportError(
                        f"{name}: two tensors of that name, {known.dtype} {list(known.shape)} and {tensor.dtype} {list(tensor.shape)}, expected one"
                    )
                value.const_value = known
        file.flush()
        os.fsync(file.fileno())
    for name, model in models.items():
        ir.save(model, folder / name)


def bytes_of(models: Iterable[ir.Model]) -> int:
    """Bytes that `write_models` will write, at most."""
    sizes = {name: value.const_value.nbytes for model in models for name, value in _initializers(model) if value.const_value is not None}
    return sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes.values()) + (32 << 20)


def _initializers(model: ir.Model) -> list[tuple[str, ir.Value]]:
    return [(name, value) for name, value in model.graph.initializers.items() if value.const_value is not None]
