"""safetensors files without torch: headers, numpy arrays, and a writer that streams.

The format: 8 bytes with the header's length (little endian), a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashhead_edge.errors import CheckpointError

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32,
    "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
NAMES = {np.dtype(v): k for k, v in NUMPY.items()}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
AGAIN = "fetch or write the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, checked against the file's size.

    Raises:
        CheckpointError: the file is absent, no safetensors file, or shorter or longer than its header says.
    """

    def broken(found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {found}, expected {expected}; {AGAIN}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise broken(f"the file has {size} bytes", "a safetensors file")
            (length,) = struct.unpack("<Q", first)
            if length > min(MAX_HEADER, size - 8):
                raise broken(f"the header is {length:,} bytes long in a file of {size:,}", "a whole safetensors file")
            header = json.loads(file.read(length))
        entries = {
            name: Entry(t["dtype"], tuple(map(int, t["shape"])), 8 + length + int(t["data_offsets"][0]), 8 + length + int(t["data_offsets"][1]))
            for name, t in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing, expected a safetensors file; {AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise broken("the header cannot be read", "a safetensors file") from error
    last = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in ITEM_BITS:
            raise broken(f"{name} has dtype {entry.dtype}", f"one of {', '.join(ITEM_BITS)}")
        want = (math.prod(entry.shape) * ITEM_BITS[entry.dtype] + 7) // 8
        if min(entry.shape, default=0) < 0 or entry.start != last or entry.end - entry.start != want:
            raise broken(f"{name} lies at bytes {entry.start} to {entry.end}", f"{want} bytes from {last} on")
        last = entry.end
    if last != size:
        raise broken(f"the file has {size:,} bytes", f"{last:,} as its header says")
    return entries


def read_array(path: Path, name: str, entry: Entry) -> np.ndarray:
    """One tensor in C order; bfloat16 comes as float32, which holds all its values.

    Raises:
        CheckpointError: the dtype has no numpy counterpart, or the file cannot be read.
    """
    dtype = np.dtype(np.uint16) if entry.dtype == "BF16" else NUMPY.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{path}: {name} has dtype {entry.dtype}, expected one of {', '.join([*NUMPY, 'BF16'])}; convert the model again")
    try:
        array = np.fromfile(path, dtype=dtype, count=math.prod(entry.shape), offset=entry.start)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror}); {AGAIN}") from error
    if array.size != math.prod(entry.shape):
        raise CheckpointError(f"{path}: {name} has {array.size} values, expected {math.prod(entry.shape)}; {AGAIN}")
    if entry.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(entry.shape)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file."""
    return {name: read_array(path, name, entry) for name, entry in read_header(path).items()}


def pack_arrays(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Iterator[bytes]:
    """The bytes of a file with these arrays, piece by piece: wide items first, so that every tensor is aligned."""
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        array = arrays[name]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield np.ascontiguousarray(arrays[name]).astype(arrays[name].dtype.newbyteorder("<"), copy=False).tobytes()


def mapped(path: Path) -> np.ndarray:
    """A file's bytes, read-only; the mapping lives as long as an array of it does.

    Raises:
        CheckpointError: the file is empty or cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be mapped ({error}), expected a file of weights; fetch the model again") from error
