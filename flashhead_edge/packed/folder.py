"""A folder of safetensors as an opened checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError
from flashhead_edge.packed.coded import Coded4, dense
from flashhead_edge.packed.files import Files
from flashhead_edge.packed.layouts import packed_shape, read_codes
from flashhead_edge.packed.names import text_name
from flashhead_edge.packed.scheme import MARKS, PARTS, scheme_of


class FolderWeights:
    """The parameters of a model folder (see `weights.Weights`)."""

    def __init__(self, folder: Path) -> None:
        """Open a folder and check the headers of all its tensors.

        Raises:
            CheckpointError, UnsupportedModelError: as `open_weights`.
        """
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'}: a JSON {type(config).__name__}, expected an object; fetch the model again")
        self.config: dict[str, Any] = config
        self._name = folder.resolve().name
        self._files = Files(folder)
        self._scheme = scheme_of(config, folder, self._files, self._name)
        self._shapes: dict[str, tuple[int, int]] = {}  # of packed matrices, by their name in the files
        if self._scheme is not None:
            mark = MARKS[self._scheme.kind]
            stems = {tensor.removesuffix(mark) for tensor in self._files if tensor.endswith(mark)}
            if self._scheme.kind == "mlx":  # codes without the scales that tell them would be read as numbers
                stems |= {t.removesuffix(".weight") for t in self._files if t.endswith(".weight") and self._files.entry(t).dtype == "U32"}
            self._shapes = {stem: packed_shape(self._files, self._scheme, stem) for stem in sorted(stems)}
        parts = {stem + part for stem in self._shapes for part in PARTS[self._scheme.kind]} if self._scheme else set()
        stored = [tensor for tensor in self._files if tensor not in parts] + [f"{stem}.weight" for stem in self._shapes]
        self._stored = {text_name(tensor): tensor for tensor in stored}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._find(name)
        return self._shapes.get(stored.removesuffix(".weight")) or self._files.entry(stored).shape

    def linear(self, name: str, rows: int | None = None) -> Coded4 | np.ndarray:
        stored = self._find(f"{name}.weight")
        shape = self.shape(f"{name}.weight")
        if len(shape) != 2:
            raise CheckpointError(f"{self._name}: {name}.weight has the shape {list(shape)}, expected a matrix; name a linear layer")
        stop = shape[0] if rows is None else min(rows, shape[0])
        return self._coded(stored, 0, stop) if self._packed(stored) else self._files.floats(stored, (slice(stop),))

    def floats(self, name: str) -> np.ndarray:
        stored = self._find(name)
        return dense(self._coded(stored, 0, self.shape(name)[0])) if self._packed(stored) else self._files.floats(stored)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        stored, shape = self._find(name), self.shape(name)
        if not shape or not 0 <= start < stop <= shape[0]:
            raise CheckpointError(f"{self._name}: rows {start} to {stop} of {name} {list(shape)}, expected rows within it; pass others")
        return dense(self._coded(stored, start, stop)) if self._packed(stored) else self._files.floats(stored, (slice(start, stop),))

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FolderWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise CheckpointError(
                f"{self._name}: no parameter {name}, expected one of {len(self._stored)} such as {next(iter(self._stored), 'none')}; name another"
            )
        return self._stored[name]

    def _packed(self, stored: str) -> bool:
        return stored.endswith(".weight") and stored.removesuffix(".weight") in self._shapes

    def _coded(self, stored: str, start: int, stop: int) -> Coded4:
        assert self._scheme is not None
        return read_codes(self._files, self._scheme, stored.removesuffix(".weight"), start, stop)
