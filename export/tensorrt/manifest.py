"""manifest.json: what lies in an export folder and what it was built with. numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import write_file
from flashhead_edge.jetson.tensorrt_folder import FORMAT, MANIFEST

BUILT = ("tensorrt", "runtime", "cuda_driver", "driver", "gpu", "plugin_library", "plugin_sha256", "peak_host_bytes", "memory_cap_mib")  # null without engines
CHUNK = 1 << 24


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
