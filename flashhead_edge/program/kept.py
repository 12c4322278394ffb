"""The program of a FlashHead checkpoint: made once, and kept in the user's cache as long as the checkpoint stays what it is. numpy only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.assets import read_index
from flashhead_edge.checkpoint.source import weight_map
from flashhead_edge.checkpoint.tensors import Entry, read_header
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import HeadIndex
from flashhead_edge.packed import open_weights
from flashhead_edge.packed.names import text_name
from flashhead_edge.program.build import EMBEDDING, HEAD, build_program
from flashhead_edge.program.file import FORMAT, Program, read_program, write_program
from flashhead_edge.program.head import Device
from flashhead_edge.program.weights import FORMAT as WEIGHTS_FORMAT
from flashhead_edge.progress import Progress, silent

log = logging.getLogger(__name__)
LOOKED_AT = 1 << 20  # bytes of a file that make its key: a header of weights, or its beginning
BLOCK = 1 << 24  # bytes of a head, hashed together
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def cached_program(
    checkpoint: str | Path, *, precision: str, context: int, group: int, batch: int, device: Device, progress: Progress = silent
) -> Program:  # fmt: skip
    """The program of a checkpoint: the one that is kept for these settings, or a new one, kept from now on.

    Args:
        checkpoint: a folder that `flashhead convert` wrote.
        precision, context, group, batch, device: as `build_program` takes them.
    Raises:
        What `read_index`, `open_weights` and `build_program` raise. CheckpointError: the index is for another head.
        FlashHeadError: the disk is full or refuses; nothing is left half-written.
    """
    path = Path(checkpoint)
    settings = {"precision": precision, "context": context, "group": group, "batch": batch, "device": asdict(device)}
    folder = kept_folder(path, settings)
    if folder.exists():
        try:
            return read_program(folder)
        except CheckpointError as error:
            log.warning("%s; it is written again", error)
    progress("reading the head", None)
    index = own_index(path)
    with open_weights(path) as weights:
        built = build_program(
            weights, weights.config, index, precision=precision, context=context, group=group, device=device, batch=batch
        )  # fmt: skip
        return write_program(folder, built, device, {"checkpoint": str(path)} | settings, progress)


def is_kept(checkpoint: Path, *, precision: str, context: int, group: int, batch: int, device: Device) -> bool:
    """Whether `cached_program` has one already."""
    return kept_folder(checkpoint, {"precision": precision, "context": context, "group": group, "batch": batch, "device": asdict(device)}).exists()


def kept_folder(checkpoint: Path, settings: Mapping[str, Any]) -> Path:
    """Where the program of a checkpoint is kept, for settings and a device."""
    return programs_folder() / program_key(checkpoint, settings)


def own_index(checkpoint: Path) -> HeadIndex:
    """The index of a checkpoint's head.

    Raises:
        CheckpointError: there is none, or it is for another head.
    """
    index, found = read_index(checkpoint), head_fingerprint(checkpoint)
    if index.fingerprint != found:
        raise CheckpointError(
            f"{checkpoint}: the index was made for the head {index.fingerprint[:19]}..., found {found[:19]}...; run flashhead convert on this model"
        )
    return index


def programs_folder() -> Path:
    """Where programs are kept: under the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashhead-edge" / "programs"


def program_key(checkpoint: Path, settings: Mapping[str, Any], *, times: bool = True) -> str:
    """32 hex digits that change with the checkpoint's files (their names, sizes, times and first bytes), the settings and the layout.

    Args:
        times: False for a key that a copy of the checkpoint shares.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, WEIGHTS_FORMAT, settings], sort_keys=True).encode())
    for path in sorted(p for pattern in ("**/*.safetensors", "*.gguf", "*.json") for p in checkpoint.glob(pattern)):
        about = path.stat()
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(checkpoint)} {about.st_size} {about.st_mtime_ns if times else '-'} ".encode() + file.read(LOOKED_AT))
    return digest.hexdigest()[:32]


def head_fingerprint(checkpoint: Path) -> str:
    """The name of the head in a folder, as `checkpoint.fingerprint` gives it: SHA-256 of dtype, shape and bytes of its matrix and bias.

    Raises:
        CheckpointError: there is no head, or it is stored in another type than F32, F16 or BF16.
    """
    stored = {text_name(name): (name, file) for name, file in weight_map(checkpoint).items()}
    weight = next((name for name in (f"{HEAD}.weight", f"model.{EMBEDDING}") if name in stored), None)
    if weight is None:
        raise CheckpointError(f"{checkpoint}: neither {HEAD}.weight nor model.{EMBEDDING} is among its weights, expected a head; fetch the model again")
    digest = hashlib.sha256()
    for name in (weight, f"{HEAD}.bias"):
        if name in stored:
            tensor, file = stored[name]
            entry = read_header(file)[tensor]
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: {tensor} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}; use a checkpoint whose head is not quantised"
                )
            digest.update(f"{DTYPES[entry.dtype]} {list(entry.shape)}".encode())
            for block in _blocks(file, entry):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _blocks(path: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    with path.open("rb") as file:
        file.seek(entry.start)
        for at in range(entry.start, entry.end, BLOCK):
            yield file.read(min(BLOCK, entry.end - at))
