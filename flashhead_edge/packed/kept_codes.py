"""A checkpoint in 16 bits that keeps the GGUF file it was made of: its matrices in their own codes, everything else as the checkpoint has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from flashhead_edge.errors import CheckpointError
from flashhead_edge.packed.coded import Coded4, Coded8
from flashhead_edge.packed.folder import FolderWeights
from flashhead_edge.packed.gguf_weights import GgufWeights


class KeptCodes:
    """The parameters of both (see `weights.Weights`): the head's rows are the folder's, since its index was made for them."""

    def __init__(self, folder: FolderWeights, codes: GgufWeights) -> None:
        """Put both together.

        Raises:
            CheckpointError: the file's matrices are another model's.
        """
        self._folder, self._codes = folder, codes
        self._coded = set(codes.names()) & set(folder.names())
        for name in sorted(self._coded):
            if tuple(codes.shape(name)) != tuple(folder.shape(name)):
                raise CheckpointError(f"{name}: {list(codes.shape(name))} in codes.gguf, expected {list(folder.shape(name))}; run flashhead convert again")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._folder.config

    def names(self) -> Iterable[str]:
        return self._folder.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._folder.shape(name)

    def linear(self, name: str, rows: int | None = None) -> Coded4 | Coded8 | np.ndarray:
        return self._codes.linear(name, rows) if f"{name}.weight" in self._coded else self._folder.linear(name, rows)

    def floats(self, name: str) -> np.ndarray:
        return self._folder.floats(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._folder.rows(name, start, stop)

    def close(self) -> None:
        self._folder.close()
        self._codes.close()

    def __enter__(self) -> KeptCodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
