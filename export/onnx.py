"""From a FlashHead checkpoint to a folder of ONNX models: the order of the work, and nothing else."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import flashhead_edge
from flashhead_edge.checkpoint.atomic import check_space, copy_file, replacing, write_file
from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.source import Source, open_source, weight_map
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.codes import row_bytes
from flashhead_edge.costs import ERROR_BYTES, TOKEN_BYTES, fixed_bytes
from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.export.body import GROUPS, PRECISIONS, Body, build_body
from flashhead_edge.export.body_dialects import to_dialect
from flashhead_edge.export.decoder import NotNative, decoder_model
from flashhead_edge.export.dialects import DIALECTS
from flashhead_edge.export.folder import check_folder, copied_files
from flashhead_edge.export.genai import genai_config
from flashhead_edge.export.graph import DOMAIN
from flashhead_edge.export.head import head_functions
from flashhead_edge.export.matrices import stored_matrix
from flashhead_edge.export.native import native_model
from flashhead_edge.export.parts import head_model, rescore_model, stage_models, whole_decoder
from flashhead_edge.export.storage import bytes_of, write_models
from flashhead_edge.index import HeadIndex
from flashhead_edge.progress import Progress, silent

FORMAT = "1"  # of the metadata
CONTRACT = ("target_agreement", "top1_agreement", "top1_agreement_interval", "positions", "reached", "bytes_per_step", "dense_bytes_per_step")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: str
    dialect: str
    body: str | None
    files: dict[str, int]  # bytes, by name
    fingerprint: str


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dialect: str = "onnxruntime",
    body: str | None = "int4",
    group: int = 32,
    stages: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a FlashHead checkpoint as ONNX models: body, head, whole decoder.

    Args:
        checkpoint: a folder that `flashhead convert` wrote.
        dialect: ``onnxruntime``, ``portable`` (ai.onnx alone) or ``tensorrt``.
        body: precision of the body's products, fp32, fp16, int8 or int4; None: the head alone.
        group: weights that share a scale, 32, 64 or 128.
        stages: write probe, score, rescore and decode as models of their own too.
    Raises:
        CheckpointError: no FlashHead checkpoint, or `out` exists.
        UnsupportedModelError: the body is of a family that cannot be exported; the head alone can.
        ExportError, SettingsError: see `build_body`.
        FlashHeadError: the disk is full; nothing is left half-written.
    """
    from flashhead_edge.checkpoint import read_head, read_index

    if dialect not in DIALECTS:
        raise SettingsError(f"export: the dialect is {dialect!r}, expected one of {', '.join(DIALECTS)}; choose one of them")
    if body is not None and (body not in PRECISIONS or group not in GROUPS):
        expected = f"{', '.join(PRECISIONS)} in groups of {', '.join(map(str, GROUPS))}"
        raise SettingsError(f"export: a body of {body} in groups of {group}, expected {expected}; choose one of them")
    folder, said = Path(checkpoint), DIALECTS[dialect]
    path = check_folder(out, folder, overwrite)
    source = open_source(folder)
    if "flash_head_cache_dir" not in source.config:
        raise CheckpointError(f"{folder}: the checkpoint has no head index (flash_head_assets), expected a FlashHead checkpoint; run flashhead convert first")
    progress("reading the head", None)
    weights = read_head(source)
    index = read_index(folder, weights)
    bias = None if weights.bias is None else weights.bias.float().numpy()
    name, scale, softcap = weights.name, weights.scale, weights.softcap
    del weights
    progress("unpacking the head's codes", None)
    functions = head_functions(index, head_rows(source, name), bias, said)
    above = next(p for p in path.parents if p.exists())
    if body is not None:  # the builder's own files, before ours
        check_space(above, sum(f.stat().st_size for f in set(weight_map(source.folder).values())), path)
    with tempfile.TemporaryDirectory(dir=above, prefix=f".{path.name}.flashhead-build-") as work:
        built = None
        if body is not None:
            built = build_body(source, Path(work), precision=body, group=group, progress=progress)
            to_dialect(built, dialect)
        settings = _settings(source, index, scale, softcap, built, dialect)
        about = metadata(index, dialect, settings)
        models = {
            "head.onnx": head_model(functions, index, said, about | {"flashhead.part": "head"}, logits=False),
            "head_logits.onnx": head_model(functions, index, said, about | {"flashhead.part": "head_logits"}, logits=True),
            "rescore.onnx": rescore_model(functions, index, said, about | {"flashhead.part": "rescore"}),
        }
        if dialect == "onnxruntime":
            models["head_native.onnx"] = native_model(index, head_rows(source, name), bias, about | {"flashhead.part": "head_native"})
        if stages:
            models |= {f"stages_{n}.onnx": m for n, m in stage_models(functions, index, said, about).items()}
        if built is not None:
            built.model.metadata_props.update(about | {"flashhead.part": "body"})
            models["model.onnx"] = whole_decoder(built.model, functions, index, scale, softcap, about | {"flashhead.part": "decoder"})
            models["body.onnx"] = built.model
            if dialect == "onnxruntime":
                try:
                    models["body_native.onnx"] = decoder_model(built.model, about | {"flashhead.part": "body_native"})
                except NotNative as why:
                    progress(f"no native body: {why}", None)
        for model in models.values():
            model.metadata_props["flashhead.opset"] = str(model.graph.opset_imports[""])
            model.metadata_props["flashhead.functions"] = json.dumps([name for domain, name, _ in model.functions if domain == DOMAIN])
        with replacing(path, bytes_of(models.values())) as new:
            progress("writing the models", None)
            write_models(new, models)
            for file in copied_files(folder):
                target = new / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                copy_file(file, target)
            if built is not None:
                config = genai_config(built.genai_config, shared_cache=dialect == "onnxruntime")
                write_file(new / "genai_config.json", [(json.dumps(config, indent=4) + "\n").encode()])
    return Exported(str(path), dialect, body, {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}, index.fingerprint)


def head_rows(source: Source, name: str) -> ir.LazyTensor:
    """The head's matrix [V, d] in its own type, read from its file when it is written."""
    file = weight_map(source.folder)[name]
    return stored_matrix(file, read_header(file)[name], "head.rows")


def metadata(index: HeadIndex, dialect: str, settings: dict[str, Any]) -> dict[str, str]:
    """What every model says of itself."""
    agreement = {name: index.summary.get(name) for name in CONTRACT}
    return {
        "flashhead.format": FORMAT,
        "flashhead.version": flashhead_edge.__version__,
        "flashhead.dialect": dialect,
        "flashhead.fingerprint": index.fingerprint,
        "flashhead.settings": json.dumps(settings, sort_keys=True),
        "flashhead.agreement": json.dumps(agreement, sort_keys=True),
    }


def _settings(source: Source, index: HeadIndex, scale: float, softcap: float | None, built: Body | None, dialect: str) -> dict[str, Any]:
    text = text_config(source.config)
    rows = text.get("vocab_size") or index.vocab_size
    settings: dict[str, Any] = {
        "vocab_size": index.vocab_size,
        "hidden_size": index.hidden_size,
        "n_clusters": index.n_clusters,
        "cluster_size": index.cluster_size,
        "stages": len(index.stages),
        "scale": scale,
        "softcap": softcap,
        "context_length": text.get("max_position_embeddings"),
        "embedding_rows": rows,
        "cache": "in_place" if dialect == "onnxruntime" else "growing",
        "fixed_bytes": fixed_bytes(index),
        "item_bytes": [row_bytes(s.rows) + ERROR_BYTES for s in index.stages] + [2 * index.hidden_size + TOKEN_BYTES],
    }
    if built is not None:
        settings |= {"body": built.precision, "group": built.group, "body_parameters": _body_parameters(source)}
        settings["head_size"] = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    return settings


def _body_parameters(source: Source) -> int:
    """Weights of the body, embeddings and head left out, by the shapes in the files' headers."""
    from math import prod

    from flashhead_edge.checkpoint.weights import EMBEDDINGS, HEADS

    total = 0
    for file in set(weight_map(source.folder).values()):
        for name, entry in read_header(file).items():
            if len(entry.shape) > 1 and not name.endswith((*EMBEDDINGS, *HEADS)):
                total += prod(entry.shape) * (8 if entry.dtype == "I32" else 1)  # packed integers of 4 bits
    return total
