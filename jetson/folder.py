"""What lies in a folder that `flashhead export` wrote, and whether its parts belong together. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.errors import CheckpointError

FORMAT = "1"  # of the metadata
PARTS = ("body", "head", "head_logits", "rescore")  # the models that a session runs, each in a file of its name
AGAIN = "run flashhead export onnx again"


@dataclass(frozen=True)
class ExportSettings:
    """What the metadata of an exported model says."""

    part: str  # body, head, ...
    dialect: str  # onnxruntime, portable, ...
    fingerprint: str  # of the head's weights
    vocab_size: int  # tokens that can be returned
    hidden_size: int
    context_length: int | None  # positions that the model was made for
    scale: float  # the model multiplies its raw logits by this,
    softcap: float | None  # then caps them softly
    cache: str  # "in_place": past and present may be one buffer; "growing": each step returns a longer present
    head_size: int | None  # of a key, where the body's inputs do not say it
    embedding_rows: int  # tokens that can be fed
    body_parameters: int  # without embeddings; 0 where the head was exported alone
    fixed_bytes: int  # of a step of the head, whatever opens,
    item_bytes: tuple[int, ...]  # and of each slot scored by each code, and of each exact row


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds a part of an exported model."""
    return any((Path(folder) / f"{part}.onnx").is_file() for part in PARTS)


def part_file(folder: Path, part: str) -> Path:
    """The file of a part.

    Raises:
        CheckpointError: it is missing.
    """
    path = folder / f"{part}.onnx"
    if not path.is_file():
        named = ", ".join(f"{p}.onnx" for p in PARTS)
        raise CheckpointError(f"{path}: the file is missing, expected {named} in an exported folder; {AGAIN}, with a body")
    return path


def read_settings(path: Path, part: str, metadata: Mapping[str, str]) -> ExportSettings:
    """The settings of an exported model.

    Args:
        path: its file, for messages.
        part: what the file should be.
        metadata: the model's metadata_props.
    Raises:
        CheckpointError: the model comes from elsewhere, from another version, or is another part.
    """
    version = metadata.get("flashhead.format")
    if version is None:
        raise CheckpointError(f"{path}: the model does not come from flashhead export (its metadata has no flashhead.format); export a FlashHead checkpoint")
    if version != FORMAT:
        raise CheckpointError(f"{path}: the export has format version {version}, expected {FORMAT}; {AGAIN} or install the flashhead-edge that wrote it")
    found = metadata.get("flashhead.part")
    if found != part:
        raise CheckpointError(f"{path}: the model is the part {found!r}, expected {part!r}; {AGAIN}")
    try:
        s: dict[str, Any] = json.loads(metadata["flashhead.settings"])
        return ExportSettings(
            part=part,
            dialect=metadata["flashhead.dialect"],
            fingerprint=metadata["flashhead.fingerprint"],
            vocab_size=int(s["vocab_size"]),
            hidden_size=int(s["hidden_size"]),
            context_length=None if s["context_length"] is None else int(s["context_length"]),
            scale=float(s["scale"]),
            softcap=None if s["softcap"] is None else float(s["softcap"]),
            cache=str(s["cache"]),
            head_size=None if s.get("head_size") is None else int(s["head_size"]),
            embedding_rows=int(s["embedding_rows"]),
            body_parameters=int(s.get("body_parameters") or 0),
            fixed_bytes=int(s["fixed_bytes"]),
            item_bytes=tuple(int(b) for b in s["item_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata of the export does not have the expected form ({error!r}); {AGAIN}") from error


def check_belongs(path: Path, settings: ExportSettings, fingerprint: str, other: str) -> None:
    """Raise CheckpointError where a part was exported from another head than `other`, the thing with `fingerprint`."""
    if settings.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path}: the part was exported from a head with fingerprint {settings.fingerprint[:19]}, {other} has {fingerprint[:19]}; "
            f"{AGAIN}, all parts at once"
        )
