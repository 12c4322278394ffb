"""manifest.json: what lies in an export folder and what it was built with. numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import write_file
from flashhead_edge.codes import row_bytes
from flashhead_edge.costs import ERROR_BYTES, TOKEN_BYTES, fixed_bytes
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import HeadIndex

MANIFEST = "manifest.json"
FORMAT = 1
BUILT = ("tensorrt", "runtime", "cuda_driver", "driver", "gpu", "plugin_library", "plugin_sha256", "peak_host_bytes", "memory_cap_mib")  # null without engines
CHUNK = 1 << 24


def settings_of(index: HeadIndex, scale: float, softcap: float | None, context_length: int | None, embedding_rows: int) -> dict[str, Any]:
    """What a runtime must know of the head, and what a step of it reads."""
    return {
        "vocab_size": index.vocab_size,
        "hidden_size": index.hidden_size,
        "stages": len(index.stages),
        "scale": scale,
        "softcap": softcap,
        "context_length": context_length,
        "embedding_rows": embedding_rows,
        "fixed_bytes": fixed_bytes(index),
        "item_bytes": [row_bytes(s.rows) + ERROR_BYTES for s in index.stages] + [2 * index.hidden_size + TOKEN_BYTES],
    }


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    """Write a new manifest; keys of the build that are not there are null."""
    whole = {"format": FORMAT} | dict.fromkeys(BUILT) | {"engines": {}} | dict(document)
    write_file(folder / MANIFEST, [(json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export that engines shall be built in.

    Raises:
        CheckpointError: there is none, or it is of another version.
    """
    path = folder / MANIFEST
    again = "run flashhead export tensorrt again"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: the file is missing, expected a folder that flashhead export tensorrt --onnx-only wrote; name another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error}), expected a manifest; {again}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path}: the manifest has format {found}, expected {FORMAT}; {again} or install the flashhead-edge that wrote it")
    return document
