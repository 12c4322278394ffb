"""An opened checkpoint: its config and its parameters, whatever it stores them as. torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from flashhead_edge.checkpoint.source import kept_codes
from flashhead_edge.errors import CheckpointError
from flashhead_edge.packed.coded import Coded4, Coded8
from flashhead_edge.packed.folder import FolderWeights
from flashhead_edge.packed.gguf_weights import GgufWeights
from flashhead_edge.packed.kept_codes import KeptCodes


class Weights(Protocol):
    """A model's parameters, by the names that Hugging Face's model of the text alone has, whatever they are stored as.

    Files are mapped: what is not asked for is not read. Arrays may be views of a file, and read-only; they stay valid after `close`.
    Every function raises CheckpointError for a name that is not there.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, or what it would say."""
        ...

    def names(self) -> Iterable[str]:
        """Of all parameters, such as model.layers.0.self_attn.q_proj.weight; a tied head is not among them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, as floats: [N, K] of a packed matrix."""
        ...

    def linear(self, name: str, rows: int | None = None) -> Coded4 | Coded8 | np.ndarray:
        """A matrix by its layer's name, without ".weight": its codes, or [N, K] float32 where it is not packed; with `rows` that many of its first ones."""
        ...

    def floats(self, name: str) -> np.ndarray:
        """A parameter as float32."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop (one at least) of a matrix, [stop - start, K] float32; the others are not read."""
        ...

    def close(self) -> None:
        """Let the files go."""
        ...

    def __enter__(self) -> Weights: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_weights(path: Path) -> Weights:
    """Open a folder of safetensors with its config.json, or a GGUF file (or a folder with nothing but one). A folder that keeps the GGUF file it was made of
    gives that file's matrices as they are coded there.

    Every header is read and checked: dtypes and shapes of all parts of all packed matrices.

    Raises:
        CheckpointError: nothing there, a damaged or truncated file, a part of a matrix missing or of another shape.
        UnsupportedModelError: a format, a variant of one, a width or an architecture that is not read, by its name.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a single file of type {path.suffix or 'unknown'}, expected a model folder or a .gguf file; name the folder")
        return GgufWeights(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder, expected a model folder or a .gguf file; check the path")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GgufWeights(files[0])
        found = f"{len(files)} .gguf files" if files else "no config.json"
        raise CheckpointError(f"{path}: the folder has {found}, expected a Hugging Face model folder or one .gguf file; name another folder or the file")
    folder = FolderWeights(path)
    codes = kept_codes(path, folder.config)
    return folder if codes is None else KeptCodes(folder, GgufWeights(codes))
