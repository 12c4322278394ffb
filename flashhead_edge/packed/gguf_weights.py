"""A GGUF file as an opened checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from flashhead_edge.checkpoint.gguf_families import DROPPED, family_of, file_config, huggingface_name, row_order
from flashhead_edge.checkpoint.gguf_file import TYPES, GgufFile, read_gguf
from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.packed.coded import Coded4, Coded8, dense
from flashhead_edge.packed.gguf_blocks import READERS, coded, floats

READ = ", ".join(name for name, _, _ in TYPES.values())


class GgufWeights:
    """The parameters of a GGUF file (see `weights.Weights`)."""

    def __init__(self, path: Path) -> None:
        """Open a file and check its header.

        Raises:
            CheckpointError, UnsupportedModelError: as `open_weights`.
        """
        self._name = path.name
        self._file: GgufFile | None = read_gguf(path)
        tensors, values = self._file.tensors, self._file.values
        _, self._family = family_of(values, self._name)
        self._stored: dict[str, str] = {}
        for stored, tensor in tensors.items():
            if stored in DROPPED:
                continue
            name = huggingface_name(stored, self._family)
            if name is None:
                raise UnsupportedModelError(f"{self._name}: the tensor {stored}, expected those of {self._family.architecture} alone; choose another file")
            if tensor.kind not in {known for known, _, _ in TYPES.values()}:
                raise UnsupportedModelError(f"{self._name}: {stored} is quantised as {tensor.kind}, expected one of {READ}; choose another file")
            self._stored[name] = stored
        self.config = file_config(self._file, self._name)
        for name in self._stored:
            heads, shape = self._heads(name), self.shape(name)
            if heads and shape[0] % (2 * heads):
                raise CheckpointError(f"{self._name}: {name} has {shape[0]} rows for {heads} heads, expected pairs of them in each; fetch the file again")

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open().tensors[self._find(name)].shape

    def linear(self, name: str, rows: int | None = None) -> Coded4 | Coded8 | np.ndarray:
        shape = self.shape(f"{name}.weight")
        if len(shape) != 2:
            raise CheckpointError(f"{self._name}: {name}.weight has the shape {list(shape)}, expected a matrix; name a linear layer")
        return self._read(f"{name}.weight", 0, shape[0] if rows is None else min(rows, shape[0]))

    def floats(self, name: str) -> np.ndarray:
        shape = self.shape(name)
        read = self._read(name, 0, shape[0] if len(shape) > 1 else 1)
        values = read if isinstance(read, np.ndarray) else dense(read)
        if len(shape) == 1 and self._heads(name):
            values = values[:, row_order(shape[0], self._heads(name))]
        if self._family.raised and name.endswith("norm.weight"):
            values = values - np.float32(1)
        return values.reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self.shape(name)
        if len(shape) != 2 or not 0 <= start < stop <= shape[0]:
            raise CheckpointError(f"{self._name}: rows {start} to {stop} of {name} {list(shape)}, expected rows within a matrix; pass others")
        read = self._read(name, start, stop)
        return read if isinstance(read, np.ndarray) else dense(read)

    def close(self) -> None:
        self._file = None

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> GgufFile:
        if self._file is None:
            raise CheckpointError(f"{self._name}: the file has been closed, expected an open one; open it again")
        return self._file

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise CheckpointError(
                f"{self._name}: no parameter {name}, expected one of {len(self._stored)} such as {next(iter(self._stored), 'none')}; name another"
            )
        return self._stored[name]

    def _heads(self, name: str) -> int:
        """Heads by which a parameter's rows are permuted; 0: they are not."""
        if not self._family.permuted:
            return 0
        at = name.rpartition(".")[0]
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(at.rpartition(".")[2])
        return 0 if key is None else int(self.config[key])

    def _read(self, name: str, start: int, stop: int) -> Coded4 | Coded8 | np.ndarray:
        """Rows of a parameter in the model's order; a vector is one row."""
        file, stored = self._open(), self._find(name)
        blocks, kind = file.blocks(stored), file.tensors[stored].kind
        shape = file.tensors[stored].shape
        if len(shape) > 1 and self._heads(name):
            blocks = blocks[row_order(prod(shape[:-1]), self._heads(name))[start:stop]]
        else:
            blocks = blocks[start:stop]
        return coded(blocks, kind) if kind in READERS else floats(blocks, kind)
