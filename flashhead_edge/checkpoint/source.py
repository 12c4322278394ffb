"""Where a model comes from: a folder, a GGUF file or a hub name, and what is refused before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.errors import CheckpointError, UnsupportedModelError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "flash_head_assets/*", "codes.gguf"]
INDEX = "model.safetensors.index.json"
CODES, CODES_KEY = "codes.gguf", "flash_head_codes"  # a GGUF source's own file in the checkpoint made of it, and what config.json says of that file


@dataclass(frozen=True, eq=False)
class Source:
    """A model that can be read. Nothing is loaded yet."""

    folder: Path
    gguf: Path | None  # the file, where the model is one
    config: dict[str, Any]  # config.json, or what a GGUF file says in its terms
    name: str  # for people: the hub name, or the folder's or file's name
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def native(self) -> bool:
        """Whether transformers has the model's code itself."""
        from transformers import CONFIG_MAPPING

        return self.config.get("model_type") in CONFIG_MAPPING


def open_source(model: str | Path | Source, *, trust_remote_code: bool = False, revision: str | None = None) -> Source:
    """Find a model and check that it can be read: its config, its head, each weight file's header and size.

    Args:
        model: a folder, a .gguf file (or a folder with nothing but one), or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct.
        trust_remote_code: run Python code that the model brings along.
        revision: branch, tag or commit of the hub name.
    Raises:
        CheckpointError: nothing there, pickled weights only, a missing or truncated weight file, untrusted remote code.
        UnsupportedModelError: the model has no head that can be replaced.
    """
    if isinstance(model, Source):
        return model
    path = Path(model).expanduser()
    name = path.resolve().name
    if not path.exists():
        text = str(model)
        if path.suffix == ".gguf" or not HUB_NAME.fullmatch(text):
            raise CheckpointError(f"{text}: no such file or folder, expected a model folder, a .gguf file or a hub name like owner/model; check the path")
        path, name = _snapshot(text, revision, trust_remote_code), text
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a single file of type {path.suffix or 'unknown'}, expected a model folder or a .gguf file; name the folder")
        return _gguf_source(path, name)
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf_source(files[0], name)
        found = f"{len(files)} .gguf files" if files else "no config.json"
        raise CheckpointError(f"{path}: the folder has {found}, expected a Hugging Face model folder or one .gguf file; name another folder or the file")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'}: a JSON {type(config).__name__}, expected an object; fetch the model again")
    source = Source(path, None, _normalise(config), name, trust_remote_code, revision)
    families.architecture(source.config, name)
    if not source.native and not trust_remote_code:
        kind = source.config.get("model_type")
        if "auto_map" in source.config:
            raise CheckpointError(
                f"{name}: model type {kind!r} brings its own Python code, expected leave to run it; read that code, then allow it with trust_remote_code"
            )
        raise UnsupportedModelError(
            f"{name}: model type {kind!r} is unknown, expected one that this version of transformers has; install a newer one or choose another model"
        )
    weight_map(path)
    return source


def _normalise(config: dict[str, Any]) -> dict[str, Any]:
    """Undo what older released checkpoints do to the model type, so that the base model's own code reads them."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind.startswith("flash_head_"):
        config = {k: v for k, v in config.items() if k != "auto_map"} | {"model_type": kind.removeprefix("flash_head_")}
    return config


def _gguf_source(path: Path, name: str) -> Source:
    from flashhead_edge.checkpoint import gguf

    config = gguf.read_config(path)
    families.architecture(config, name)
    return Source(path.parent, path, config, name)


def _snapshot(name: str, revision: str | None, code: bool) -> Path:
    """The folder of a hub model, fetched where it is not there yet."""
    from huggingface_hub import errors, snapshot_download

    wanted = HUB_FILES + (["*.py"] if code else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(f"{name}: neither a folder nor a model{at} on the hub; check the name, or log in with `hf auth login` if it is gated") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # HTTPError is the HTTP library's own: a connection that breaks
        raise CheckpointError(f"{name}: no such folder, and the hub cannot be reached; name a local folder, or try again with a network") from error


def kept_codes(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The GGUF file that a checkpoint was made of, where it keeps it for the codes: its 16-bit tensors are these codes' values. None: it keeps none.

    Raises:
        CheckpointError: config.json names one that is not there, or another one.
    """
    said = config.get(CODES_KEY)
    if said is None:
        return None
    path, want = folder / CODES, said.get("bytes") if isinstance(said, dict) else said
    found = path.stat().st_size if path.is_file() else None
    if found is None or found != want:
        there = "is missing" if found is None else f"has {found:,} bytes"
        raise CheckpointError(f"{path}: the file {there}, expected {want!r} bytes as config.json says under {CODES_KEY}; run flashhead convert again")
    return path


def weight_map(folder: Path) -> dict[str, Path]:
    """Each tensor's file, every file's header and size checked.

    Raises:
        CheckpointError: pickled weights only, no weights, a missing shard, a truncated file, a tensor not where the index says.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if not index.is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code when they are read, expected safetensors; convert them first"
            )
        raise CheckpointError(f"{folder}: no weights, expected model.safetensors or {INDEX}; fetch the model again")
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise CheckpointError(f"{index}: no usable weight_map, expected one file name for each tensor; fetch the model again")
    headers = {file: read_header(folder / file) for file in sorted(set(files.values()))}
    for tensor, file in files.items():
        if tensor not in headers[file]:
            raise CheckpointError(f"{folder / file}: {tensor} is missing, expected by {INDEX}; fetch the model again")
    return {tensor: folder / file for tensor, file in files.items()}
