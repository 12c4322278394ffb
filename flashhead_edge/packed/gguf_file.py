"""A GGUF file: its values and where its tensors lie. numpy only.

The format: magic, version, counts; pairs of key and typed value; names, dimensions, types and offsets of tensors; their bytes
(https://github.com/ggml-org/ggml, docs/gguf.md). The gguf package reads it too, but walks token lists one array object at a time
(seconds of start), and loops for ever over a damaged length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.errors import CheckpointError
from flashhead_edge.packed.files import mapped

VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors, where general.alignment names no other
MOST_DIMENSIONS = 8
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}  # by type of value
NUMPY = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
# Types of tensors: name, values and bytes of a block. Those without a size are known by name alone, and refused.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
OTHERS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    kind: str  # a name of TYPES or OTHERS
    shape: tuple[int, ...]  # outermost first, as numpy has it
    start: int  # byte in the file


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A parsed header over the mapped file."""

    values: dict[str, Any]  # lists of numbers as arrays, lists of strings as their length
    tensors: dict[str, Tensor]
    data: np.ndarray  # [bytes] uint8, the whole file, read-only

    def blocks(self, name: str) -> np.ndarray:
        """A tensor's bytes, [rows, bytes a row] uint8, a view of the file; a vector is one row."""
        tensor = self.tensors[name]
        _, values, size = next(t for t in TYPES.values() if t[0] == tensor.kind)
        row = tensor.shape[-1] // values * size
        rows = prod(tensor.shape[:-1])
        return self.data[tensor.start : tensor.start + rows * row].reshape(rows, row)


def read_gguf(path: Path) -> GgufFile:
    """Parse a file's header; the tensors of the types in TYPES are checked to lie within the file.

    Raises:
        CheckpointError: it is no GGUF file, damaged or cut off.
    """
    data = mapped(path)
    try:
        values, tensors = _parsed(data.data)
    except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{path}: no GGUF file that can be read ({type(error).__name__}: {error}), expected version 2 or 3; fetch the file again"
        ) from error
    return GgufFile(values, tensors, data)


def _parsed(data: memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in VERSIONS:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    at, values = 24, dict[str, Any]()
    for _ in range(_counted(pairs, 13, data, at)):  # a pair has 13 bytes at least
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        if key in values:
            raise ValueError(f"two values are named {key!r}")
        values[key], at = _value(data, at + 4, kind)
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, not a power of two")
    found = []
    for _ in range(_counted(tensors, 24, data, at)):
        name, at = _text(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)[::-1]
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        at += 4 + 8 * dimensions + 12
        found.append((name, kind, shape, offset))
    first = -(-at // alignment) * alignment
    entries: dict[str, Tensor] = {}
    for name, kind, shape, offset in found:
        if name in entries:
            raise ValueError(f"two tensors are named {name!r}")
        entries[name] = _tensor(name, kind, shape, first + offset, len(data))
    return values, entries


def _tensor(name: str, kind: int, shape: tuple[int, ...], start: int, size: int) -> Tensor:
    if kind not in TYPES:
        return Tensor(OTHERS.get(kind, f"type {kind}"), shape, start)
    what, values, block = TYPES[kind]
    if shape[-1] % values or prod(shape) == 0:
        raise ValueError(f"{name} is {what} {list(shape)}, not whole blocks of {values}")
    end = start + prod(shape) // values * block
    if end > size:
        raise ValueError(f"{name} ends at byte {end:,} of a file of {size:,}")
    return Tensor(what, shape, start)


def _counted(count: int, least: int, data: memoryview, at: int) -> int:
    """A count of things of at least so many bytes, where the rest of the file can hold them."""
    if count * least > len(data) - at:
        raise ValueError(f"{count:,} entries at byte {at}, in a file of {len(data):,}")
    return count


def _text(data: memoryview, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + _counted(size, 1, data, at + 8)
    return bytes(data[at + 8 : end]).decode("utf-8", errors="replace"), end


def _value(data: memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _text(data, at)
    if kind in SCALARS:
        (value,) = struct.unpack_from(SCALARS[kind], data, at)
        return value, at + struct.calcsize(SCALARS[kind])
    if kind != ARRAY:
        raise ValueError(f"a value of type {kind} at byte {at}")
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner == STRING:
        for _ in range(_counted(count, 8, data, at)):
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8 + _counted(size, 1, data, at + 8)
        return count, at
    dtype = np.dtype(NUMPY[inner])
    end = at + _counted(count, dtype.itemsize, data, at) * dtype.itemsize
    return np.frombuffer(data[at:end], dtype), end
