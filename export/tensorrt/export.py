"""From a FlashHead checkpoint to a folder for TensorRT: the order of the work, and nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.checkpoint.atomic import check_space, copy_file, replacing
from flashhead_edge.checkpoint.families import original_architecture, text_config
from flashhead_edge.checkpoint.source import Source, open_source, weight_map
from flashhead_edge.errors import CheckpointError, ExportError, SettingsError
from flashhead_edge.export.body import GROUPS, Body, build_body
from flashhead_edge.export.folder import check_folder, copied_files
from flashhead_edge.export.onnx import CONTRACT, head_rows
from flashhead_edge.export.passes.embedding import embedding_tensor
from flashhead_edge.export.tensorrt.engines import Build, add_engines, prepared
from flashhead_edge.export.tensorrt.folder import SPARE, stored_items, write_parts
from flashhead_edge.export.tensorrt.lowering import lower_body
from flashhead_edge.export.tensorrt.manifest import sha256_of, write_manifest
from flashhead_edge.index import HeadIndex
from flashhead_edge.jetson.tensorrt_folder import read_manifest
from flashhead_edge.program.head import MOST_ROWS, Device, head_part
from flashhead_edge.program.nodes import Decoder
from flashhead_edge.program.weights import PRECISIONS, float_item
from flashhead_edge.progress import Progress, silent

CONTEXT, CHUNK = 4096, 256  # positions of the cache, tokens of a prompt that are read together, where nobody says how many
LAYERS = ("plugin", "native")


@dataclass(frozen=True)
class ExportedTensorRT:
    """What was written."""

    folder: str
    layers: str
    files: dict[str, int]  # bytes, by name
    manifest: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Wanted:
    """What an export shall be."""

    layers: str
    precision: str
    group: int
    context: int
    batch: int
    chunk: int
    dense_head: bool


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a checkpoint."""

    index: HeadIndex
    bias: np.ndarray | None  # [V or more] float32
    name: str  # of its matrix in the checkpoint
    rows: int
    scale: float
    softcap: float | None


def export_tensorrt(
    checkpoint: str | Path,
    out: str | Path,
    *,
    layers: str = "plugin",
    precision: str = "float16",
    group: int = 32,
    context: int | None = None,
    batch: int = 1,
    chunk: int | None = None,
    dense_head: bool = False,
    device: Device | None = None,
    build: Build | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportedTensorRT:
    """Write a FlashHead checkpoint as weights and models for TensorRT, and build their engines.

    Args:
        checkpoint: a folder that `flashhead convert` wrote.
        layers: ``plugin``, or ``native``: TensorRT's own operators, the weights in the engine.
        precision: of activations and of all floats that plugins read, float16 or bfloat16.
        group: weights that share a scale, 32, 64 or 128.
        context: positions of the cache; None: the model's, 4,096 at most.
        batch: texts at once, at most; chunk: tokens of a prompt that are read together, at most; None: 256, or the context where that is smaller.
        dense_head: the same decoder with TensorRT's own head over the whole vocabulary too.
        device: plan the head for this device and build no engine; None: for the one that is there, whose engines are built as `build` says.
    Raises:
        CheckpointError: no FlashHead checkpoint, or `out` exists.
        UnsupportedModelError, ExportError, SettingsError: a family, an operator, a size or a value that has no plugin.
        DeviceError: no GPU, or too little memory. EngineError: TensorRT or the plugin library is missing or refuses.
        FlashHeadError: the disk is full; nothing is left half-written.
    """
    from flashhead_edge.checkpoint import read_head, read_index

    folder = Path(checkpoint)
    path = check_folder(out, folder, overwrite)
    source = open_source(folder)
    if "flash_head_cache_dir" not in source.config:
        raise CheckpointError(f"{folder}: the checkpoint has no head index (flash_head_assets), expected a FlashHead checkpoint; run flashhead convert first")
    wanted = _checked(source, Wanted(layers, precision, group, 0, batch, 0, dense_head), context, chunk)
    ready = None
    if device is None:
        ready = prepared(build or Build(), layers, precision)
        device = ready.device
    progress("reading the head", None)
    weights = read_head(source)
    index = read_index(folder, weights)
    head = Head(
        index, None if weights.bias is None else weights.bias.float().numpy(), weights.name, len(weights.weight), weights.scale, weights.softcap
    )  # fmt: skip
    del weights
    above = next(p for p in path.parents if p.exists())
    check_space(above, sum(f.stat().st_size for f in set(weight_map(source.folder).values())), path)  # the builder's own files, before ours
    with tempfile.TemporaryDirectory(dir=above, prefix=f".{path.name}.flashhead-build-") as work:
        body = build_body(source, Path(work), precision="int4", group=group, progress=progress)
        if layers == "native":
            from flashhead_edge.export.tensorrt.native import native_parts

            needed, write = native_parts(source, body, head.index, head_rows(source, head.name), head.bias, head.scale, head.softcap)
        else:
            needed, write = _plugin_parts(source, body, head, wanted, device, path, progress)
        with replacing(path, needed + SPARE) as new:
            manifest = {"family": original_architecture(str(source.config["architectures"][0])), "body": "int4", "group": body.group, "chunk": wanted.chunk}
            manifest |= {"layers": layers, "precision": precision, "max_batch": batch, "context": wanted.context}
            manifest |= {"capability": device.capability, "multiprocessors": device.multiprocessors, "shared_bytes": device.shared_bytes}
            manifest |= write(new)
            for file in copied_files(folder):
                target = new / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                copy_file(file, target)
            manifest["flashhead_config_fingerprint"] = sha256_of(new / "config.json")
            if ready is not None:
                manifest |= add_engines(ready, new, manifest, progress)
            write_manifest(new, manifest)
    return ExportedTensorRT(str(path), layers, {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}, read_manifest(path).document)


def _checked(source: Source, w: Wanted, context: int | None, chunk: int | None) -> Wanted:
    """The settings with context and chunk chosen.

    Raises:
        SettingsError: one is out of range.
    """

    def want(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"export tensorrt: {what} is {found}, expected {expected}; choose another")

    want(w.layers in LAYERS, "layers", w.layers, " or ".join(LAYERS))
    want(w.precision in PRECISIONS, "the precision", w.precision, " or ".join(PRECISIONS))
    want(w.layers == "plugin" or w.precision == "float16", "the precision of native layers", w.precision, "float16")
    want(w.layers == "plugin" or not w.dense_head, "a dense head beside native layers", "asked for", "it beside plugins")
    want(w.group in GROUPS, "the group", w.group, f"one of {', '.join(map(str, GROUPS))}")
    want(1 <= w.batch <= MOST_ROWS, "the batch", w.batch, f"1 to {MOST_ROWS}")
    text = text_config(source.config)
    most = int(text.get("max_position_embeddings") or CONTEXT)
    chosen = min(most, CONTEXT) if context is None else context
    want(2 <= chosen <= most, "the context", f"{chosen:,}", f"2 to the model's {most:,} positions")
    read = min(CHUNK, chosen) if chunk is None else chunk
    want(1 <= read <= chosen, "the chunk", f"{read:,}", f"1 to the context's {chosen:,}")
    return replace(w, context=chosen, chunk=read)


def _plugin_parts(source: Source, body: Body, head: Head, wanted: Wanted, device: Device, final: Path, progress: Progress) -> Any:
    """Bytes that will be written, and the function that writes them."""
    rows, tied = embedding_tensor(source)
    embedding = float_item("embedding", rows.numpy, tuple(rows.shape.numpy()), wanted.precision)
    exact = embedding
    if not tied:
        matrix = head_rows(source, head.name)
        exact = float_item("head.rows", matrix.numpy, tuple(matrix.shape.numpy()), wanted.precision)
    decoder = Decoder(wanted.precision, wanted.context)
    progress("lowering to plugin nodes", None)
    lower_body(body.model, embedding, decoder)
    if decoder.widths["hidden_states"] != head.index.hidden_size:
        raise ExportError(f"hidden_states: {decoder.widths['hidden_states']} columns, expected the head's {head.index.hidden_size}; report this model")
    part = head_part(head.index, exact, head.bias, device, wanted.batch, wanted.precision, head.scale, head.softcap)
    text = text_config(source.config)
    agreement = {name: head.index.summary.get(name) for name in CONTRACT}

    def write(new: Path) -> dict[str, Any]:
        return write_parts(
            new, final, decoder, part, context_length=text.get("max_position_embeddings"), embedding_rows=embedding.shape[0], agreement=agreement,
            dense_head=wanted.dense_head, progress=progress,
        )  # fmt: skip

    return sum(item.nbytes for item in stored_items(decoder, part)), write
