"""What an .onnx file says before anything is loaded: its metadata, its inputs, and where its weights lie. Standard library only.

A model's graph is a protobuf message; of its hundred fields the handful that a plan of memory needs are read here, so that a board
needs no onnx package for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flashhead_edge.errors import CheckpointError
from flashhead_edge.jetson.folder import AGAIN

ITEM_BYTES = {1: 4, 2: 1, 3: 1, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # of TensorProto.DataType
MOST = 1 << 28  # bytes of a graph without its weights


@dataclass(frozen=True)
class Input:
    """An input of the graph."""

    item_bytes: int | None  # None: a type that no cache has
    shape: tuple[int | str, ...]  # a name where a dimension is free


@dataclass(frozen=True)
class OnnxHeader:
    """A model without its weights."""

    metadata: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)
    external: dict[tuple[str, int], int] = field(default_factory=dict)  # bytes of weights, by file and offset: shared ones count once


def read_onnx_header(path: Path) -> OnnxHeader:
    """Read a model's header.

    Raises:
        CheckpointError: the file is missing, too large, or no ONNX model.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MOST else b""
    except OSError as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error.strerror}), expected an ONNX model; restore it, or {AGAIN}") from error
    if size > MOST:
        raise CheckpointError(f"{path}: the file has {size:,} bytes, expected a graph whose weights lie beside it; {AGAIN}")
    found, graph = OnnxHeader(), False
    try:
        for number, value in fields(data):
            if number == 14:
                key, text = pair(value)
                found.metadata[key] = text
            elif number == 7:
                graph = True
                _graph(value, found)
        if not graph:
            raise ValueError("it holds no graph")
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: no ONNX model that can be read ({error}); restore the file, or {AGAIN}") from error
    return found


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a protobuf message: number and bytes, an integer's as eight."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = varint(data, at)
            yield tag >> 3, struct.pack("<Q", number)
            continue
        if kind == 2:
            size, at = varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"the file ends inside of a field at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a byte, and the byte behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        if shift > 63:
            raise ValueError(f"a number without an end at byte {at}")


def integer(data: bytes) -> int:
    return int(struct.unpack("<q", data)[0])


def pair(data: bytes) -> tuple[str, str]:
    """A StringStringEntryProto."""
    found = {number: value.decode("utf-8", errors="replace") for number, value in fields(data)}
    return found.get(1, ""), found.get(2, "")


def _graph(data: bytes, found: OnnxHeader) -> None:
    for number, value in fields(data):
        if number == 11:
            name, entry = _input(value)
            found.inputs[name] = entry
        elif number == 5:
            external = dict(pair(v) for n, v in fields(value) if n == 13)
            if "location" in external:
                at = external["location"], int(external.get("offset", 0))
                found.external[at] = max(int(external.get("length", 0)), found.external.get(at, 0))


def _input(data: bytes) -> tuple[str, Input]:
    name, item, shape = "", None, []
    for number, value in fields(data):
        if number == 1:
            name = value.decode("utf-8", errors="replace")
        elif number == 2:
            for kind, tensor in fields(value):
                if kind != 1:  # no tensor
                    continue
                for part, inner in fields(tensor):
                    if part == 1:
                        item = ITEM_BYTES.get(integer(inner))
                    elif part == 2:
                        shape = [_dimension(d) for n, d in fields(inner) if n == 1]
    return name, Input(item, tuple(shape))


def _dimension(data: bytes) -> int | str:
    for number, value in fields(data):
        if number == 1:
            return integer(value)
        if number == 2:
            return value.decode("utf-8", errors="replace")
    return ""
