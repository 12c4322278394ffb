"""Writing FlashHead checkpoints: whole, or not at all."""

from __future__ import annotations

import errno
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.assets import (
    ASSETS,
    CLUSTERS_CONFIG,
    CLUSTERS_FILE,
    INDEX_FILE,
    PublishedClusters,
    asset_folder,
    index_arrays,
    index_settings,
    to_json,
)
from flashhead_edge.checkpoint.atomic import check_space, copy_file, link_or_copy, named_errors, regular, replacing, write_file
from flashhead_edge.checkpoint.card import build_card, source_card
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.checkpoint.quiet import without_bars
from flashhead_edge.checkpoint.source import CODES, CODES_KEY, INDEX, PICKLES, Source, kept_codes, open_source, weight_map
from flashhead_edge.checkpoint.tensors import pack_arrays, read_header
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import HeadIndex

CARD = "README.md"
NOT_COPIED = (*PICKLES, "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.safetensors", "*.safetensors.index.json")
OURS = ("config.json", CARD)
FOLDERS = ("additional_chat_templates",)
SHARD = "4900MB"
QUANTIZED = "flashhead_quantize"  # the key of config.json under which `flashhead quantize` keeps its report
# The tools that ask for a creation time do not read it; a fixed one keeps equal commands equal to the byte.
CREATION_TIME = "1970-01-01T00:00:00"


def check_output(source: Source | None, out: str | Path, overwrite: bool = False) -> Path:
    """Whether OUT may be written, before any work is done: its absolute path.

    Raises:
        CheckpointError: it exists and may not be overwritten, or it is, holds or lies in the source.
        FlashHeadError: the disk has less room than the source takes.
    """
    path = Path(out).expanduser().resolve()
    if source is not None:
        here = source.folder.resolve()
        if path == here or path in here.parents or (here in path.parents and source.gguf is None):
            raise CheckpointError(f"{path}: the output folder is the source {here}, holds it or lies in it, expected a folder apart from it; choose another")
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise CheckpointError(f"{path}: the output folder exists already, expected a new one; choose another name or pass --overwrite")
        if not path.is_dir():
            raise CheckpointError(f"{path}: a file has this name, expected a folder; choose another name")
        if any(path.iterdir()) and not is_ours(path):
            raise CheckpointError(
                f"{path}: the folder is no FlashHead checkpoint, expected one, since only those are overwritten; choose another name or remove it yourself"
            )
    above = next(p for p in path.parents if p.exists())
    _check_writable(above, path)
    if source is not None:  # at the least; what is written is checked again when it is known
        check_space(above, sum(f.stat().st_size for f in ([source.gguf] if source.gguf else source_files(source))), path)
    return path


def check_update(folder: str | Path) -> Path:
    """Whether a checkpoint's index may be replaced, before any work is done: its absolute path.

    Raises:
        CheckpointError: it was not written by us, or its folder cannot be written.
        FlashHeadError: the disk has less room than another index takes.
    """
    path = Path(folder).expanduser().resolve()
    assets = _our_assets(path, read_json(path / "config.json"))
    _check_writable(path.parent, path)
    check_space(path.parent, (assets / INDEX_FILE).stat().st_size if regular(assets / INDEX_FILE) else 0, path)
    return path


def _check_writable(above: Path, path: Path) -> None:
    """Raise CheckpointError where nothing can be made in the folder `above`."""
    try:
        with tempfile.TemporaryFile(dir=above):  # it has no name, so that a killed run leaves nothing
            pass
    except OSError as error:
        raise CheckpointError(
            f"{path}: {above} cannot be written ({error.strerror}), expected a folder where a checkpoint may be made; choose another"
        ) from error


def _our_assets(path: Path, config: Any) -> Path:
    """The asset folder of a checkpoint that we wrote."""
    assets = asset_folder(path, config)
    if not isinstance(config.get("flash_head"), dict) or assets != path / ASSETS:
        raise CheckpointError(
            f"{path}: the checkpoint was not written by flashhead convert, expected one that was, whose index can be replaced; convert the model"
        )
    return assets


def is_ours(folder: Path) -> bool:
    """Whether a folder is one that may be overwritten: a FlashHead checkpoint, or what `flashhead quantize` has written."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return False
    return isinstance(config, dict) and ("flash_head_cache_dir" in config or QUANTIZED in config)


def write_checkpoint(
    source: Source, out: str | Path, index: HeadIndex, published: PublishedClusters, *, overwrite: bool = False, card: str | None = None
) -> None:
    """Write a model with its index as a FlashHead checkpoint. Until it is whole, `out` stays what it was.

    Body tensors are copied byte for byte; a GGUF file becomes safetensors in 16 bits, in shards under 5 GB, and is kept beside them where its codes can
    be run from.

    Args:
        out: the folder, new unless `overwrite`.
        published: clusters for tools that know the published method alone; over the same tokens as the index.
        overwrite: replace a FlashHead checkpoint (nothing else) that is there.
        card: our part of the model card, else made from `index.summary`.
    Raises:
        CheckpointError: `out` exists or is no checkpoint, or the source is damaged.
        FlashHeadError: the disk is full or refuses.
    """
    path = check_output(source, out, overwrite)
    if published.assignments.size != index.vocab_size or published.centroids.shape[1] != index.hidden_size:
        found = [published.assignments.size, published.centroids.shape[1]]
        raise CheckpointError(f"{path}: the published clusters are for a head {found}, expected {[index.vocab_size, index.hidden_size]}; cluster this head")
    arrays = index_arrays(index)
    clusters = {"centroids": np.ascontiguousarray(published.centroids.T)[None, None], "cluster_assignments": published.assignments}
    ours = sum(a.nbytes for a in (*arrays.values(), *clusters.values())) + (1 << 20)
    if source.gguf is not None:
        _write_gguf(source, path, index, published, card, arrays, clusters, ours)
        return
    files = source_files(source)
    original = original_card(source.folder)
    with replacing(path, ours + sum(f.stat().st_size for f in files)) as new:
        for file in files:
            target = new / file.relative_to(source.folder)
            if not target.parent.exists():
                target.parent.mkdir()
            copy_file(file, target)
        _write_ours(new, dict(source.config), source, index, published, arrays, clusters)
        write_file(new / CARD, [build_card(source.name, index, original, card).encode()])


def _write_gguf(
    source: Source,
    path: Path,
    index: HeadIndex,
    published: PublishedClusters,
    card: str | None,
    arrays: dict[str, np.ndarray],
    clusters: dict[str, np.ndarray],
    ours: int,
) -> None:
    """The same for a GGUF file: its tensors in 16 bits, its tokenizer repaired."""
    from flashhead_edge.checkpoint import gguf

    assert source.gguf is not None
    tokenizer = gguf.load_tokenizer(source.gguf)
    model = gguf.load(source.gguf, source.config)
    config = source.config | {"dtype": str(model.dtype).removeprefix("torch.")}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = source.gguf.stat().st_size if gguf.has_codes(source.gguf) else 0
    with replacing(path, ours + weights + codes + (64 << 20)) as new:
        _save_floats(model, tokenizer, new)
        if codes:
            copy_file(source.gguf, new / CODES)
            config |= {CODES_KEY: {"bytes": codes}}
        _write_ours(new, config, source, index, published, arrays, clusters)
        write_file(new / CARD, [build_card(source.name, index, "", card).encode()])


def _save_floats(model: Any, tokenizer: Any, new: Path) -> None:
    """A GGUF file's weights and its tokenizer in an empty folder, without config.json."""
    from safetensors import SafetensorError

    try:
        with without_bars():
            model.save_pretrained(new, max_shard_size=SHARD)
        tokenizer.save_pretrained(new)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "space" in str(error).lower() else errno.EIO, str(error)) from error
    for file in _files_below(new):  # some come readable to their owner alone
        file.chmod(stat.S_IMODE(new.stat().st_mode) & 0o666)
    # a class name that every version of transformers has, and that leaves tokenizer.json as it is
    settings = read_json(new / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("config.json", "tokenizer_config.json", CARD):
        (new / name).unlink(missing_ok=True)
    write_file(new / "tokenizer_config.json", [to_json(settings).encode()])


def save_floats(source: Source, folder: Path) -> Source:
    """A GGUF file as a model folder in 16 bits: what `write_checkpoint` makes of it, without a head index.

    Args:
        folder: an empty one, with room for two bytes a weight.
    Returns:
        The folder as a source, of the file's name.
    """
    from flashhead_edge.checkpoint import gguf

    assert source.gguf is not None
    tokenizer = gguf.load_tokenizer(source.gguf)
    model = gguf.load(source.gguf, source.config)
    check_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()), folder)
    with named_errors(folder):
        _save_floats(model, tokenizer, folder)
        config = source.config | {"dtype": str(model.dtype).removeprefix("torch.")}
        write_file(folder / "config.json", [to_json(config).encode()])
    return replace(open_source(folder), name=source.name)


def source_files(source: Source) -> list[Path]:
    """What is copied from a source folder: its weights, tokenizer and settings; code only where it is trusted."""
    weights = sorted(set(weight_map(source.folder).values()))
    if len(weights) > 1 or weights[0].name != "model.safetensors":
        weights.append(source.folder / INDEX)
    code = source.trust_remote_code and "auto_map" in source.config
    inside = [p for name in FOLDERS for p in sorted((source.folder / name).glob("*"))]
    other = [
        p
        for p in [*sorted(source.folder.iterdir()), *inside]
        if regular(p) and not p.name.startswith(".") and p.name not in OURS and not any(p.match(x) for x in NOT_COPIED) and (code or p.suffix != ".py")
    ]
    codes = kept_codes(source.folder, source.config)
    return weights + other + ([codes] if codes is not None else [])


def original_card(folder: Path) -> str:
    """The card of the model in a folder, without what we put above it; empty where there is none."""
    path = folder / CARD
    return source_card(path.read_text(encoding="utf-8", errors="replace")) if regular(path) else ""


def _write_ours(
    new: Path,
    config: dict[str, Any],
    source: Source,
    index: HeadIndex,
    published: PublishedClusters,
    arrays: dict[str, np.ndarray],
    clusters: dict[str, np.ndarray],
) -> None:
    """The assets and config.json."""
    (new / ASSETS).mkdir()
    if not (source.trust_remote_code and "auto_map" in config):
        config.pop("auto_map", None)
    write_file(new / ASSETS / CLUSTERS_FILE, pack_arrays(clusters))
    about = {
        "format": "safetensors",
        "vocab_size": int(published.assignments.size),
        "hidden_size": int(published.centroids.shape[1]),
        "n_clusters": int(published.centroids.shape[0]),
        "creation_time": CREATION_TIME,
        "enforce_equal_cluster_sizes": True,
    }
    write_file(new / ASSETS / CLUSTERS_CONFIG, [to_json(about).encode()])
    config["architectures"] = [families.flash_architecture(families.architecture(config, source.name))]
    config |= {"flash_head_cache_dir": ASSETS, "n_clusters": about["n_clusters"], "n_probes": int(published.n_probes)}
    write_index(new, config, index, arrays)


def write_index(new: Path, config: dict[str, Any], index: HeadIndex, arrays: dict[str, np.ndarray]) -> None:
    """An index into the assets of a new folder, and `config` with what names it."""
    data = list(pack_arrays(arrays))
    write_file(new / ASSETS / INDEX_FILE, data)
    config |= {"flash_head_special_token_ids": index.always_scored.tolist(), "flash_head": index_settings(index, data)}
    write_file(new / "config.json", [to_json(config).encode()])


def update_index(folder: str | Path, index: HeadIndex, n_probes: int | None = None) -> None:
    """Put another index into a checkpoint of ours, for the same head: all or nothing.

    The body's files keep their bytes (second names of the same files, where the file system has links).

    Args:
        n_probes: clusters that other tools shall open from now on; unless told, as many as before.
    Raises:
        CheckpointError: the folder is no checkpoint of ours, or the index is for another head.
        FlashHeadError: the disk is full or refuses.
    """
    path = Path(folder).expanduser().resolve()
    config = read_json(path / "config.json")
    assets, ours = _our_assets(path, config), config["flash_head"]
    if ours.get("fingerprint") != index.fingerprint:
        found = f"{index.fingerprint[:19]}..., the checkpoint's head is {str(ours.get('fingerprint'))[:19]}..."
        raise CheckpointError(f"{path}: the new index was made for the head {found}; calibrate this checkpoint")
    read_header(assets / CLUSTERS_FILE)
    arrays = index_arrays(index)
    with named_errors(path):
        kept = [p for p in _files_below(path) if p not in (path / "config.json", path / CARD, assets / INDEX_FILE)]
        original = original_card(path)
    with replacing(path, sum(a.nbytes for a in arrays.values()) + (1 << 20)) as new:
        for file in kept:
            target = new / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
        write_index(new, config if n_probes is None else config | {"n_probes": n_probes}, index, arrays)
        write_file(new / CARD, [build_card(_named_in(path), index, original).encode()])


def _named_in(folder: Path) -> str:
    """The model's name in the card that we wrote."""
    head = "# "
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace") if regular(folder / CARD) else ""
    for line in text.splitlines():
        if line.startswith(head) and line.endswith(" with a FlashHead"):
            return line.removeprefix(head).removesuffix(" with a FlashHead")
    return folder.name


def _files_below(folder: Path) -> Iterable[Path]:
    return [p for p in sorted(folder.rglob("*")) if regular(p)]
