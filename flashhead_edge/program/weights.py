"""weights.safetensors: everything that the plugins read, in the layout in which the kernels read it. numpy only.

A tensor is declared (`Item`) before it is made, so that every place in the file is known beforehand; when the file is written one
block of rows at a time is in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from flashhead_edge.errors import ExportError
from flashhead_edge.program.fingerprint import fnv1a
from flashhead_edge.progress import Progress, silent

FORMAT = "1"
PRECISIONS = ("float16", "bfloat16")
STORED = {"float16": "F16", "bfloat16": "BF16"}  # safetensors' names
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
LARGEST = {"float16": float(np.finfo(np.float16).max), "bfloat16": 3.3895313892515355e38}
ALIGNMENT = 64  # bytes: where the tensors begin; each is a multiple of 16 long as the kernels want it, but the last
BLOCK_ROWS = 8192  # of a matrix, converted together
TILE_ROWS, CHUNK = 16, 64  # w4a16.h: outputs and inputs of a tile
UNTIL_HASHED = "0" * 64


@dataclass(frozen=True, eq=False)
class Item:
    """A tensor of the file."""

    name: str
    dtype: str  # U8, F16, BF16 or F32
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]  # its bytes in order, made when they are written; bfloat16 as uint16

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightsFile:
    """What has been written."""

    fingerprint: str  # of the header: FNV-1a 64, 16 lower-case hex digits
    size: int  # bytes
    sha256: str  # of all tensors' bytes in file order
    places: dict[str, tuple[int, int]]  # absolute byte offset and byte length, by tensor


def write_weights(path: Path, items: Sequence[Item], head_fingerprint: str, progress: Progress = silent) -> WeightsFile:
    """Write the file, tensor by tensor.

    Raises:
        ExportError: a value does not fit the type; two tensors have one name.
        OSError: the disk is full or refuses.
    """
    header, places = _header(items, head_fingerprint, UNTIL_HASHED)
    total, done, digest = sum(i.nbytes for i in items), 0, hashlib.sha256()
    with path.open("xb") as file:
        file.write(header)
        for item in items:
            progress(f"weights: {item.name}", done / max(1, total))
            start = file.tell()
            for block in item.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                digest.update(data)
                file.write(data)
            if file.tell() - start != item.nbytes:
                raise ExportError(
                    f"{item.name}: {file.tell() - start} bytes were made, expected {item.nbytes} for {item.dtype} {list(item.shape)}; report this"
                )
            done += item.nbytes
        header, _ = _header(items, head_fingerprint, digest.hexdigest())
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    return WeightsFile(fnv1a(header), len(header) + total, digest.hexdigest(), places)


def _header(items: Sequence[Item], head_fingerprint: str, sha256: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    about = {"flashhead.format": FORMAT, "flashhead.fingerprint": head_fingerprint, "flashhead.part": "weights", "flashhead.sha256": sha256}
    said: dict[str, object] = {"__metadata__": about}
    at = 0
    for item in items:
        if item.name in said:
            raise ExportError(f"{item.name}: two tensors have this name, expected one; report this model")
        said[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    places, at = {}, 8 + len(text)
    for item in items:
        places[item.name] = (at, item.nbytes)
        at += item.nbytes
    return struct.pack("<Q", len(text)) + text, places


# ---- floats


def rounded(values: np.ndarray, precision: str, name: str) -> np.ndarray:
    """Floats of any kind in the file's type, to the nearest, ties to even: float16, or bfloat16's bits as uint16.

    Raises:
        ExportError: a value is not finite, or beyond what the type holds.
    """
    wide = values.astype(np.float32)
    most = float(np.abs(wide).max(initial=0.0))
    if not most <= LARGEST[precision]:
        found = f"values up to {most:.3g}" if np.isfinite(most) else "values that are not finite"
        instead = (
            "pass --precision bfloat16 to flashhead export, or use the onnxruntime backend"
            if precision == "float16" and np.isfinite(most)
            else "repair the checkpoint"
        )
        raise ExportError(f"{name}: {found}, expected at most {LARGEST[precision]:.5g}, which {precision} holds; {instead}")
    if precision == "float16":
        return wide.astype(np.float16)
    bits = wide.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(values: np.ndarray, precision: str) -> np.ndarray:
    """The other way round: what is stored as float32."""
    if precision == "float16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def float_item(name: str, values: Callable[[], np.ndarray], shape: tuple[int, ...], precision: str) -> Item:
    """A vector or a matrix of floats, converted some rows at a time."""

    def blocks() -> Iterator[np.ndarray]:
        array = values()
        for start in range(0, len(array), BLOCK_ROWS):
            yield rounded(array[start : start + BLOCK_ROWS], precision, name)

    return Item(name, STORED[precision], shape, blocks)


def array_item(name: str, values: np.ndarray, precision: str) -> Item:
    """A small array of floats, which is kept."""
    return float_item(name, lambda: values, values.shape, precision)


def norm_item(name: str, weight: np.ndarray, precision: str) -> tuple[Item, float]:
    """A norm's weight, and the offset that is added to it: 1 where the type holds what is left more exactly.

    Gemma's norms multiply by 1 + weight, which exporters add up beforehand; about 1 bfloat16 has steps of 2^-7, about 0 much finer ones.
    """

    def error(offset: float) -> float:
        left = (weight - np.float32(offset)).astype(np.float32)
        return float(np.abs(widened(rounded(left, precision, name), precision).astype(np.float64) + offset - weight).max())

    offset = 1.0 if error(1.0) < error(0.0) else 0.0
    return array_item(name, weight - np.float32(offset), precision), offset


def rotation_item(name: str, cos: np.ndarray, sin: np.ndarray) -> Item:
    """Cosine and sine of each position and turned pair, [context, head_size / 2, 2] float32, from two tables [context, head_size / 2]."""
    return Item(name, "F32", (*cos.shape, 2), lambda: [np.stack([cos, sin], -1).astype(np.float32)])


def bytes_item(name: str, data: np.ndarray) -> Item:
    return Item(name, "U8", data.shape, lambda: [data])


# ---- W4A16 matrices


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of 4-bit weights in the neutral layout of w4a16.h; matrices of the same inputs may stand on top of each other.

    Functions give the arrays when they are written, a part of the matrix each: codes [n, K / 2] uint8, the low nibble first,
    scales [n, K / group] floats, zeros [n, K / group] uint8 or None.
    """

    name: str  # of its tensors in the file
    n: int
    k: int
    group: int
    symmetric: bool
    parts: Sequence[Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray | None]]]

    def check(self) -> None:
        """Raise ExportError where the kernels do not take the shape."""
        if self.n % TILE_ROWS or self.k % CHUNK or self.group not in (32, 64, 128) or self.k % self.group:
            raise ExportError(
                f"{self.name}: a matrix [{self.n}, {self.k}] in groups of {self.group}, expected outputs in multiples of {TILE_ROWS}, inputs in multiples of "
                f"{CHUNK} and of the group, groups of 32, 64 or 128, as the W4A16 kernels take it; pass a smaller --group to "
                "flashhead export, or --layers native, or use the onnxruntime backend"
            )

    def items(self, precision: str) -> list[Item]:
        """Its tensors in the packed layout."""
        groups = self.k // self.group
        rows = (self.n // TILE_ROWS, groups, TILE_ROWS)

        def scales() -> list[np.ndarray]:
            return [pack_groups(rounded(np.concatenate([part()[1] for part in self.parts]), precision, f"{self.name}.scales"))]

        def zeros() -> list[np.ndarray]:
            found = [part() for part in self.parts]
            return [pack_groups(np.concatenate([np.full(s.shape, 8, np.uint8) if z is None else z for _, s, z in found]))]

        items = [
            Item(f"{self.name}.codes", "U8", (self.n // TILE_ROWS, self.k // CHUNK, 512), lambda: [pack_codes(np.concatenate([p()[0] for p in self.parts]))]),
            Item(f"{self.name}.scales", STORED[precision], rows, scales),
        ]
        return items if self.symmetric else [*items, Item(f"{self.name}.zeros", "U8", rows, zeros)]


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K / 2] uint8, two of a row in a byte, to tiles [N / 16, K / 64, 512] uint8 (w4a16.h)."""
    n, half = codes.shape
    words = np.ascontiguousarray(codes).view("<u4")  # eight codes of a row
    even, odd = words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F
    packed = np.zeros_like(words)
    for nibbles, shift in ((even, 0), (odd, 16)):  # four bytes of one code each become 16 bits
        pairs = (nibbles | nibbles >> 4) & 0x00FF00FF
        packed |= ((pairs | pairs >> 8) & 0xFFFF) << shift
    # [tile, row / 2, row % 2, chunk, half of the chunk, word] -> a lane is (row / 2, word), its four words (half, row % 2)
    tiles = packed.reshape(n // TILE_ROWS, 8, 2, half // 32, 2, 4).transpose(0, 3, 1, 5, 4, 2)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(n // TILE_ROWS, half // 32, 512)


def pack_groups(values: np.ndarray) -> np.ndarray:
    """Scales or zero points [N, groups] to [N / 16, groups, 16]."""
    n, groups = values.shape
    return np.ascontiguousarray(values.reshape(n // TILE_ROWS, TILE_ROWS, groups).transpose(0, 2, 1))
