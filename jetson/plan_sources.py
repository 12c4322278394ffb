"""How large a model is, from headers alone: an exported folder, an export for TensorRT, a checkpoint, a GGUF file. Nothing is loaded."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.errors import CheckpointError
from flashhead_edge.jetson.folder import AGAIN, is_exported, part_file
from flashhead_edge.jetson.onnx_header import OnnxHeader, read_onnx_header
from flashhead_edge.jetson.onnxruntime_sessions import parts_of
from flashhead_edge.jetson.plan import MIB, Layer, Need
from flashhead_edge.jetson.tensorrt_folder import is_tensorrt, read_manifest

FIRST_CAPACITY, PROMPT_BLOCK = 256, 512  # of onnxruntime_body, which needs numpy
PREPACKED = 1.4  # of the body's matrices that standard operators lay out anew: 230 MB of 164 (measured on another model)
# Runtimes, measured on x86-64 with two cores: what a process has before the first position, weights not counted (docs/jetson.md).
RUNTIME = {"onnxruntime": 87 * MIB, "torch": 420 * MIB, "tensorrt": 600 * MIB}
NOT_MEASURED = "the runtime's share of TensorRT was not measured on a board"
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type; 8 is a string, 9 an array


def need_of(model: str | Path, *, gpu: bool = False) -> Need:
    """What a model needs.

    Args:
        gpu: a checkpoint's weights lie on a GPU in 16 bits; else torch has them in float32, as `generate` does on a CPU.
    Raises:
        CheckpointError: no such model, or one whose headers cannot be read.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return gguf_need(path, gpu=gpu)
    if not path.is_dir():
        raise CheckpointError(f"{model}: no such folder or .gguf file, expected a checkpoint, a GGUF file or an export; check the path")
    if is_tensorrt(path):
        return tensorrt_need(path)
    if is_exported(path):
        return onnx_need(path)
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return gguf_need(files[0], gpu=gpu)
    return checkpoint_need(path, gpu=gpu)


# ---- exports


def onnx_need(folder: Path, parts: tuple[str, str] | None = None) -> Need:
    """An exported folder in ONNX Runtime.

    Args:
        parts: the body and the head that run; None: those that would here.
    """
    body_part, head_part = parts_of(folder) if parts is None else parts
    body, head, rows = (read_onnx_header(part_file(folder, part)) for part in (body_part, head_part, "rescore"))
    exact = dict(rows.external)
    index = {at: n for at, n in head.external.items() if at not in exact}
    weights = {at: n for at, n in body.external.items() if at not in exact and at not in index}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = text_config(config)
    native = body_part.endswith("_native")
    d, wide = int(text.get("hidden_size") or 0), int(text.get("intermediate_size") or 0)
    settings = _onnx_settings(folder / f"{body_part}.onnx", body)
    # the embedding is a table of rows, not a matrix that is laid out anew; where the model is tied it is among the exact rows
    table = max(weights.values(), default=0) if not set(exact) & set(body.external) else 0
    return Need(
        name=folder.name,
        kind="onnxruntime",
        weights=sum(weights.values()),
        index=sum(index.values()),
        exact_rows=sum(exact.values()),
        copies=0 if native else int(PREPACKED * (sum(weights.values()) - table)),
        runtime=RUNTIME["onnxruntime"],
        scratch=4 * PROMPT_BLOCK * (6 * d + 2 * wide),
        layers=_onnx_layers(folder / f"{body_part}.onnx", body),
        limit=settings.get("context_length"),
        first=FIRST_CAPACITY,
        doubled=settings.get("cache") != "in_place",
        tables=table,
        notes=(f"{'our native operators' if native else 'standard operators'}; weights are mapped: pages that no token has needed are not in memory yet",),
    )


def _onnx_settings(path: Path, header: OnnxHeader) -> dict[str, Any]:
    import json

    try:
        found = json.loads(header.metadata["flashhead.settings"])
        return {**found, "context_length": None if found["context_length"] is None else int(found["context_length"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata of the export does not have the expected form ({error!r}); {AGAIN}") from error


def _onnx_layers(path: Path, header: OnnxHeader) -> tuple[Layer, ...]:
    found, size = [], _onnx_settings(path, header).get("head_size")
    for name, value in header.inputs.items():
        if name.startswith("past_key_values.") and len(value.shape) == 4:
            heads, last = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else size
            if not isinstance(heads, int) or not isinstance(last, int) or value.item_bytes is None:
                raise CheckpointError(f"{path}: the cache's input {name} has the shape {list(value.shape)}, expected heads and head size fixed; {AGAIN}")
            found.append(Layer(heads * last * value.item_bytes))
    return tuple(found)


def tensorrt_need(folder: Path) -> Need:
    """An export for TensorRT: its cache is allocated whole, for the context and the batch that it was exported with."""
    m = read_manifest(folder)
    engines = m.document.get("engines")
    built = sum(int(e["bytes"]) for e in engines.values()) if isinstance(engines, dict) else 0
    weights = int(m.document.get("weights_bytes") or 0)
    per_layer = 2 * m.kv_heads * m.head_size * 2
    rows = 2 * m.settings.vocab_size * m.settings.hidden_size
    return Need(
        name=folder.name,
        kind="tensorrt",
        weights=max(0, weights - rows) + built,
        index=0,
        exact_rows=min(rows, weights),
        copies=0,
        runtime=RUNTIME["tensorrt"],
        scratch=2 * m.chunk * (6 * m.settings.hidden_size) * 2,
        layers=tuple(Layer(per_layer) for _ in range(m.cached_layers)),
        limit=m.context,
        fixed=(m.context, m.max_batch),
        notes=(NOT_MEASURED, "the head's index is part of the weights", *(() if built else ("its engines are not built yet",))),
    )


# ---- checkpoints


def checkpoint_need(folder: Path, *, gpu: bool = False) -> Need:
    """A model folder in torch, with its FlashHead index where it has one."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: a JSON {type(config).__name__}, expected an object; fetch the model again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file, expected a model's weights; fetch the model again")
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    quantised = isinstance(text_config(config).get("quantization_config") or config.get("quantization_config"), dict)
    item = 2 if gpu else 4
    stored = {name: (e.end - e.start if quantised and not e.dtype.startswith(("F", "BF")) else prod(e.shape) * item) for name, e in entries.items()}
    assets = folder / str(config.get("flash_head_cache_dir") or "flash_head_assets") / "index.safetensors"
    notes = ["a quantised body, counted as it is stored: torch may turn it into floats"] if quantised else []
    if not assets.is_file():
        notes.append("no FlashHead index: flashhead convert adds one, of some percent of the head")
    return _torch_need(folder.name, text_config(config), sum(stored.values()), assets.stat().st_size if assets.is_file() else 0, item, tuple(notes))


def gguf_need(path: Path, *, gpu: bool = False) -> Need:
    """A GGUF file in torch, which has all its weights as floats."""
    values, elements = read_gguf_header(path)
    kind = values.get("general.architecture")

    def value(key: str) -> int | None:
        found = values.get(f"{kind}.{key}")
        return int(found) if isinstance(found, (int, float)) else None

    heads, d = value("attention.head_count"), value("embedding_length")
    if not heads or not d or not value("block_count"):
        raise CheckpointError(f"{path}: the header names no layers, heads or width, expected a language model; fetch the file again")
    text = {
        "num_hidden_layers": value("block_count"), "num_attention_heads": heads, "num_key_value_heads": value("attention.head_count_kv") or heads,
        "head_dim": value("attention.key_length") or d // heads, "hidden_size": d, "vocab_size": value("vocab_size") or values.get("tokens"),
        "max_position_embeddings": value("context_length"),
    }  # fmt: skip
    item = 2 if gpu else 4
    note = "no FlashHead index: flashhead convert adds one, of some percent of the head"
    return _torch_need(path.name, text, elements * item, 0, item, (note,))


def _torch_need(name: str, text: Mapping[str, Any], weights: int, index: int, item: int, notes: tuple[str, ...]) -> Need:
    d, rows = int(text.get("hidden_size") or 0), int(text.get("vocab_size") or 0)
    exact = min(weights, d * rows * item)
    where = "torch, 16 bits on a GPU" if item == 2 else "torch, float32 on a CPU"
    return Need(
        name=name,
        kind="torch",
        weights=weights - exact,
        index=index,
        exact_rows=exact,
        copies=0,
        runtime=RUNTIME["torch"],
        scratch=0,
        layers=_config_layers(name, text, item),
        limit=int(text["max_position_embeddings"]) if isinstance(text.get("max_position_embeddings"), int) else None,
        scores=2 * int(text.get("num_attention_heads") or 0) * item,
        notes=(f"{where}; an export in 4 bits (flashhead export) takes less: plan it as well", *notes),
    )


def _config_layers(name: str, text: Mapping[str, Any], item: int) -> tuple[Layer, ...]:
    try:
        heads = int(text["num_attention_heads"])
        size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        per = 2 * int(text.get("num_key_value_heads") or heads) * size * item
        count = int(text["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{name}: config.json does not tell the size of the cache ({error!r}), expected layers, heads and width; plan an export"
        ) from error
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        return (Layer(per),) * count
    window = text.get("sliding_window")
    return tuple(
        Layer(per, int(window) if kind == "sliding_attention" and window else None) for kind in kinds if "linear" not in str(kind) and "mamba" not in str(kind)
    )  # fmt: skip


# ---- GGUF


def read_gguf_header(path: Path) -> tuple[dict[str, Any], int]:
    """A GGUF file's plain values, with the number of its tokens as "tokens", and the number of its weights.

    Raises:
        CheckpointError: it is no GGUF file, or cut off.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _gguf(data)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: no GGUF file that can be read ({type(error).__name__}: {error}); fetch the file again") from error


def _gguf(data: mmap.mmap) -> tuple[dict[str, Any], int]:
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    at, values = 24, dict[str, Any]()

    def text(at: int) -> tuple[str, int]:
        (size,) = struct.unpack_from("<Q", data, at)
        if at + 8 + size > len(data):
            raise ValueError("the file ends inside of its header")
        return data[at + 8 : at + 8 + size].decode("utf-8", errors="replace"), at + 8 + size

    for _ in range(pairs):
        key, at = text(at)
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == 8:
            values[key], at = text(at)
        elif kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if key == "tokenizer.ggml.tokens":
                values["tokens"] = count
            if inner == 8:
                for _ in range(count):
                    (size,) = struct.unpack_from("<Q", data, at)
                    at += 8 + size
            else:
                at += GGUF_SIZES[inner] * count
        else:
            form = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}[kind]
            (values[key],) = struct.unpack_from(form, data, at)
            at += GGUF_SIZES[kind]
    elements = 0
    for _ in range(tensors):
        _name, at = text(at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements += prod(struct.unpack_from(f"<{dimensions}Q", data, at + 4))
        at += 4 + 8 * dimensions + 12
    return values, elements
