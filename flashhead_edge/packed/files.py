"""The safetensors files of a model folder, mapped: a tensor is read where it is used, and only the part that is."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.checkpoint.source import weight_map
from flashhead_edge.checkpoint.tensors import NUMPY, Entry, read_header
from flashhead_edge.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
EVERYTHING = (slice(None),)


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


class Files:
    """The tensors of a folder by the names in its files."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, each file's header and size checked.

        Raises:
            CheckpointError: no weights, a missing shard, a truncated file.
        """
        self._where = weight_map(folder)
        self._headers: dict[Path, dict[str, Entry]] = {file: read_header(file) for file in set(self._where.values())}
        self._maps: dict[Path, np.ndarray] | None = {}  # None: closed

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, its dtype and shape.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self._where:
            raise CheckpointError(f"{name}: no such tensor in the files, expected one for each parameter; fetch the model again")
        return self._headers[self._where[name]][name]

    def array(self, name: str) -> np.ndarray:
        """A tensor as it is stored, a view of the file; bfloat16 as uint16."""
        entry, file = self.entry(name), self._where[name]
        dtype = np.uint16 if entry.dtype == "BF16" else NUMPY.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has dtype {entry.dtype}, expected one of {', '.join([*NUMPY, 'BF16'])}; choose another checkpoint")
        if self._maps is None:
            raise CheckpointError(f"{file.parent}: the files have been closed, expected open ones; open the model again")
        if file not in self._maps:
            self._maps[file] = mapped(file)
        return self._maps[file][entry.start : entry.end].view(np.dtype(dtype).newbyteorder("<")).reshape(entry.shape)

    def floats(self, name: str, part: tuple[Any, ...] = EVERYTHING) -> np.ndarray:
        """A part of a tensor of floats as float32, which holds all values of the 16-bit types.

        Raises:
            CheckpointError: the tensor holds no floats.
        """
        entry = self.entry(name)
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{self._where[name]}: {name} has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}; choose another checkpoint")
        array = self.array(name)[part]
        if entry.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def close(self) -> None:
        """Let the mappings go; arrays that were given stay valid."""
        self._maps = None
