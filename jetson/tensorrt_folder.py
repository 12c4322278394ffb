"""What lies in a folder that `flashhead export tensorrt` wrote, and whether this machine can run it. Standard library only."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.errors import CheckpointError, EngineError
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.jetson.folder import ExportSettings
from flashhead_edge.program.fingerprint import fnv1a

FORMAT = 1
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
PARTS = ("decoder", "head", "head_logits")  # engines that a session runs
AGAIN = "run flashhead export tensorrt again"
MOST_HEADER = 1 << 28  # bytes
ENGINES = "build its engines on this machine with flashhead export engines"


@dataclass(frozen=True)
class Manifest:
    """What the folder says of itself."""

    folder: Path
    settings: ExportSettings
    layers: str  # plugin or native
    precision: str  # float16 or bfloat16
    context: int  # positions of the cache
    chunk: int  # tokens of a prompt that are read together, at most
    max_batch: int
    cached_layers: int
    kv_heads: int
    head_size: int
    stages: int
    tensorrt: str | None
    weights_fingerprint: str
    document: dict[str, Any]  # the whole of it

    def engine(self, part: str) -> Path:
        return self.folder / self.document["engines"][part]["file"]


def is_tensorrt(folder: str | Path) -> bool:
    """Whether a folder is an export for TensorRT."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest, without looking at anything beside it.

    Raises:
        CheckpointError: there is none, or it is of another version, or damaged.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing, expected a folder that flashhead export tensorrt wrote; check the path") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error}), expected a manifest; {AGAIN}") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path}: the manifest has format {found}, expected {FORMAT}; {AGAIN} or install the flashhead-edge that wrote it")
    try:
        s = document["settings"]
        for said in document["engines"].values():
            str(said["file"]), int(said["bytes"]), str(said["sha256"])
        if document["tensorrt"] is not None and document["layers"] == "plugin":
            str(document["plugin_sha256"]), str(document["plugin_library"])
        settings = ExportSettings(
            part="decoder",
            dialect="tensorrt-plugins" if document["layers"] == "plugin" else "tensorrt",
            fingerprint=str(document["fingerprint"]),
            vocab_size=int(s["vocab_size"]),
            hidden_size=int(s["hidden_size"]),
            context_length=int(document["context"]),
            scale=float(s["scale"]),
            softcap=None if s["softcap"] is None else float(s["softcap"]),
            cache="in_place",
            head_size=int(s["head_size"]),
            embedding_rows=int(s["embedding_rows"]),
            body_parameters=int(s["body_parameters"]),
            fixed_bytes=int(s["fixed_bytes"]),
            item_bytes=tuple(int(b) for b in s["item_bytes"]),
        )
        return Manifest(
            folder=folder,
            settings=settings,
            layers=str(document["layers"]),
            precision=str(document["precision"]),
            context=int(document["context"]),
            chunk=int(document["chunk"]),
            max_batch=int(document["max_batch"]),
            cached_layers=int(s["layers"]),
            kv_heads=int(s["kv_heads"]),
            head_size=int(s["head_size"]),
            stages=int(s["stages"]),
            tensorrt=document["tensorrt"],
            weights_fingerprint=str(document["weights_fingerprint"]),
            document=document,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest does not have the expected form ({error!r}); {AGAIN}") from error


def check_files(m: Manifest, *, contents: bool = False) -> None:
    """Whether the folder's files are those of its manifest.

    Args:
        contents: read the engines and the weights whole and compare their hashes, not only their sizes and headers.
    Raises:
        CheckpointError: a file is missing, cut off, changed, or of another model.
    """
    engines = m.document["engines"]
    missing = [part for part in PARTS if part not in engines]
    if missing:
        raise CheckpointError(f"{m.folder}: engines for {', '.join(missing)} are missing, expected {', '.join(PARTS)}; {ENGINES}")
    for said in engines.values():
        path = m.folder / str(said["file"])
        _check_size(path, int(said["bytes"]))
        if contents and _sha256(path, 0) != said["sha256"]:
            raise CheckpointError(f"{path}: the engine's bytes changed since it was built, expected sha256 {said['sha256'][:16]}; {ENGINES}")
    if m.layers != "plugin":
        return
    path = m.folder / WEIGHTS
    _check_size(path, int(m.document["weights_bytes"]))
    found = header_fingerprint(path)
    if found != m.weights_fingerprint:
        raise CheckpointError(f"{path}: the weights have fingerprint {found}, expected {m.weights_fingerprint}: another model's; restore the file, or {AGAIN}")
    if contents and _sha256(path, len(_header(path))) != m.document["weights_sha256"]:
        raise CheckpointError(f"{path}: the weights' bytes changed since they were written; restore the file, or {AGAIN}")
    config = m.folder / "config.json"
    sha256 = m.document.get("flashhead_config_fingerprint")
    if sha256 is not None and (not config.is_file() or _sha256(config, 0) != sha256):
        raise CheckpointError(f"{config}: the file is not the one that was exported, expected sha256 {sha256[:16]}; restore it, or {AGAIN}")


def check_machine(m: Manifest, facts: DeviceFacts, tensorrt: str, plugin_sha256: str | None) -> None:
    """Whether this GPU, TensorRT and plugin library are those that the engines were built with.

    Raises:
        EngineError: they are not; each mismatch has its sentence.
    """
    d = m.document
    if d["tensorrt"] is None:
        raise EngineError(f"{m.folder}: the folder holds models without engines, expected built ones; {ENGINES}")
    if d["tensorrt"] != tensorrt:
        raise EngineError(f"{m.folder}: the engines were built with TensorRT {d['tensorrt']}, found {tensorrt}, expected the same; {ENGINES}")
    for what, key, here in (("for the GPU", "gpu", facts.name), ("for capability", "capability", facts.capability)):
        if d[key] != here:
            raise EngineError(f"{m.folder}: the engines were built {what} {d[key]}, found {here}, expected the same; {ENGINES}")
    if d["multiprocessors"] != facts.multiprocessors:
        raise EngineError(
            f"{m.folder}: the head was planned for {d['multiprocessors']} multiprocessors, found {facts.multiprocessors}, expected the same "
            f"(a share of a GPU has fewer); {AGAIN}"
        )
    if m.layers == "plugin" and d["plugin_sha256"] != plugin_sha256:
        raise EngineError(
            f"{m.folder}: the engines were built with another build of {d['plugin_library']} (sha256 {str(d['plugin_sha256'])[:16]}, "
            f"found {str(plugin_sha256)[:16]}), expected the same; {ENGINES}, or name that library with --plugin"
        )


def header_fingerprint(path: Path) -> str:
    """The fingerprint of a file of weights, as the plugins have it: FNV-1a of its length word and JSON header.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    return fnv1a(_header(path))


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length < MOST_HEADER:
            raise CheckpointError(f"{path}: no safetensors file (its header has {length:,} bytes); restore the file, or {AGAIN}")
        return first + file.read(length)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing, expected {expected:,} bytes; restore it, or {AGAIN}")
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(f"{path}: the file has {found:,} bytes, expected {expected:,}: it is cut off or another one; restore it, or {AGAIN}")


def _sha256(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()
