"""Export folders of random weights in the shapes of real models, for measuring where no weights can be had. numpy and onnx, no torch.

Activations stay of the size of a real model's: codes are uniform, scales about 1 / (4.6 sqrt(inputs)), norms multiply by one. The head has random
codes of a fitted plan's shape, whose margins open as many clusters and rows of states after such a norm as a calibrated head's do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.cases import FEW_CODES, SHAPES, Settings, case_of, made_index
from flashhead_edge.checkpoint.atomic import replacing, write_file
from flashhead_edge.codes import Coded
from flashhead_edge.errors import SettingsError
from flashhead_edge.index import Gate, HeadIndex, own_error
from flashhead_edge.kernels.packing import fields
from flashhead_edge.program.head import Device, head_part
from flashhead_edge.program.nodes import SILU, Attention, Decoder, HeadNorm
from flashhead_edge.program.weights import BLOCK_ROWS, STORED, Item, Matrix, rounded
from flashhead_edge.progress import Progress, silent

SPREAD = 4.6  # standard deviation of uniform codes of 4 bits
ROW = 0.05  # of the embedding's values
STATES = 64  # that margins are set for
DECODED_ROWS = 4096  # of a code, decoded together


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder like Llama's or Qwen3's."""

    hidden: int
    intermediate: int
    layers: int
    q_heads: int
    kv_heads: int
    head_size: int
    head_norms: bool
    theta: float
    activation: int = SILU
    post_norms: bool = False  # of attention's and the products' outputs too, as Gemma 3 has them
    window: int = 0  # of all layers but each sixth


MODELS = {
    "Llama-3.2-1B": Model(2048, 8192, 16, 32, 8, 64, False, 5e5),
    "Llama-3.2-3B": Model(3072, 8192, 28, 24, 8, 128, False, 5e5),
    "Qwen3-0.6B": Model(1024, 3072, 28, 16, 8, 128, True, 1e6),
    "Qwen3-1.7B": Model(2048, 6144, 28, 16, 8, 128, True, 1e6),
}


def made_folder(
    out: str | Path,
    name: str,
    device: Device,
    *,
    precision: str = "float16",
    group: int = 128,
    context: int = 2048,
    batch: int = 16,
    chunk: int = 256,
    layers: int | None = None,
    dense_head: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Path:
    """Write an export folder without engines.

    Args:
        out: a new folder.
        name: one of `MODELS`.
        device: that the head is planned for.
        layers: of the decoder; None: as many as the model has.
    Raises:
        SettingsError: the name is not known. FlashHeadError: the disk is full; nothing is left half-written.
    """
    if name not in MODELS:
        raise SettingsError(f"made model: {name}, expected one of {', '.join(MODELS)}; name one of them")
    from flashhead_edge.export.tensorrt.folder import SPARE, stored_items, write_parts  # the onnx package
    from flashhead_edge.export.tensorrt.manifest import write_manifest

    m, path = MODELS[name], Path(out).expanduser().resolve()
    vocab, d = SHAPES[name]
    rows = Item("embedding", STORED[precision], (vocab, d), lambda: _rows(vocab, d, seed, precision))
    decoder = Decoder(precision, context)
    record_layers(decoder, m, rows, m.layers if layers is None else layers, group, seed)
    progress("making the head", None)
    index = with_margins(made_index(case_of(name, FEW_CODES), seed), FEW_CODES, seed)
    part = head_part(index, rows, None, device, batch, precision)
    with replacing(path, sum(i.nbytes for i in stored_items(decoder, part)) + SPARE) as new:
        manifest: dict[str, Any] = {"family": "made", "body": "int4", "group": group, "chunk": chunk, "made": name}
        manifest |= {"capability": device.capability, "multiprocessors": device.multiprocessors, "shared_bytes": device.shared_bytes}
        manifest |= write_parts(
            new, path, decoder, part, context_length=context, embedding_rows=vocab, agreement={}, dense_head=dense_head, progress=progress
        )  # fmt: skip
        write_file(new / "config.json", [json.dumps({"architectures": ["MadeForCausalLM"], "model_type": "made", "vocab_size": vocab}).encode()])
        write_manifest(new, manifest)
    return path


def record_layers(decoder: Decoder, m: Model, rows: Item, layers: int, group: int, seed: int) -> None:
    """The nodes of a decoder from its embedding to its hidden states."""
    x = decoder.embedding("input_ids", rows, 1.0)
    one, branch = np.ones(m.hidden, np.float32), ""
    angles = np.arange(decoder.context)[:, None] * m.theta ** (-np.arange(0, m.head_size, 2) / m.head_size)
    table = decoder.table(np.cos(angles), np.sin(angles), m.head_size)
    width = m.q_heads * m.head_size

    def norm(name: str) -> str:
        nonlocal x
        if not branch:
            return decoder.norm(x, None, name, one, 1e-5, f"{name}.out")
        out = decoder.norm(branch, x, name, one, 1e-5, f"{name}.out", f"{name}.sum")
        x = f"{name}.sum"
        return out

    def after(value: str, name: str) -> str:
        return decoder.norm(value, None, name, one, 1e-5, f"{name}.out")

    def linear(value: str, name: str, n: int, k: int) -> str:
        return decoder.linear(value, made_matrix(name, n, k, group, seed), name)

    for layer in range(layers):
        at = f"layers.{layer}"
        norms = [HeadNorm(f"{at}.attn.{part}_norm", np.ones(m.head_size, np.float32), 1e-6) if m.head_norms else None for part in "qk"]
        attention = Attention(m.q_heads, m.kv_heads, m.head_size, m.window if (layer + 1) % 6 else 0, m.head_size**-0.5)
        qkv = linear(norm(f"{at}.input_layernorm"), f"{at}.qkv", width + 2 * m.kv_heads * m.head_size, m.hidden)
        branch = linear(decoder.attention(qkv, attention, table, norms[0], norms[1], f"{at}.attention"), f"{at}.o", m.hidden, width)
        branch = after(branch, f"{at}.post_attention_norm") if m.post_norms else branch
        both = linear(norm(f"{at}.post_attention_layernorm"), f"{at}.gate_up", 2 * m.intermediate, m.hidden)
        branch = linear(decoder.gated(both, m.activation, f"{at}.gated"), f"{at}.down", m.hidden, m.intermediate)
        branch = after(branch, f"{at}.post_feedforward_norm") if m.post_norms else branch
    decoder.rename(norm(f"layers.{layers}.final_norm"), "hidden_states")


def made_matrix(name: str, n: int, k: int, group: int, seed: int) -> Matrix:
    """A symmetric matrix of random codes whose products with a normalised row are about one large."""

    def part() -> tuple[np.ndarray, np.ndarray, None]:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        codes = np.frombuffer(random.bytes(n * k // 2), np.uint8).reshape(n, k // 2)
        scales = random.uniform(0.5, 1.5, (n, k // group)).astype(np.float32) / np.float32(SPREAD * math.sqrt(k))
        return codes, scales, None

    return Matrix(name, n, k, group, True, [part])


def _rows(vocab: int, d: int, seed: int, precision: str) -> Iterator[np.ndarray]:
    for start in range(0, vocab, BLOCK_ROWS):
        random = np.random.default_rng([seed, start])
        values = random.standard_normal((min(BLOCK_ROWS, vocab - start), d), np.float32) * np.float32(ROW)
        yield rounded(values, precision, "embedding")


def with_margins(index: HeadIndex, settings: Settings, seed: int = 0) -> HeadIndex:
    """The index with margins such that normalised random states open and keep the settings' shares on the average, before any cap.

    Args:
        index: of codes of bits and one row code, as `FEW_CODES` has them.
    """
    assert index.rotation is not None and index.mean is not None and len(index.stages) == 1
    states = np.random.default_rng([seed, 1]).standard_normal((STATES, index.hidden_size)).astype(np.float32)
    z = (states - index.mean) @ decoded(index.rotation)
    unit = np.sqrt(np.mean(z**2, 1, keepdims=True)) ** index.state_power
    z = np.concatenate([np.ones_like(z[:, :1]), z], 1)
    clusters = _scores(index.centroids, z)
    gap = (clusters.max(1, keepdims=True) - clusters) / (own_error(index.probe) * unit)
    wanted = settings.mean[0] * index.vocab_size / index.cluster_size
    probe = dataclasses.replace(index.probe, margin=_margin(gap.reshape(-1), wanted))
    real = (gap <= probe.margin).repeat(index.cluster_size, 1) & (index.token_table.reshape(-1) >= 0)
    stage = index.stages[0]
    scores = np.where(real, clusters.repeat(index.cluster_size, 1) + _scores(stage.rows, z), -np.inf)
    near = (scores.max(1, keepdims=True) - scores) / (own_error(stage.gate) * unit)
    gate: Gate = dataclasses.replace(stage.gate, margin=_margin(near[real], settings.mean[1] * index.vocab_size))
    return dataclasses.replace(index, probe=probe, stages=(dataclasses.replace(stage, gate=gate),))


def _margin(gaps: np.ndarray, wanted: float) -> float:
    """The margin that lets `wanted` items of each state through."""
    ordered = np.sort(gaps)
    return float(ordered[min(len(ordered) - 1, max(0, round(wanted * STATES) - 1))]) * (1 + 1e-6)


def _scores(coded: Coded, z: np.ndarray) -> np.ndarray:
    """z [N, coordinates] times every row of a code, [N, n]."""
    part = np.ascontiguousarray(z[:, : coded.columns])
    return np.concatenate([part @ decoded(coded, slice(at, at + DECODED_ROWS)).T for at in range(0, coded.n, DECODED_ROWS)], 1)


def decoded(coded: Coded, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a code of bits as floats."""
    assert coded.kind == "bits" and coded.widths is not None and coded.steps is not None and coded.scale is not None
    half = np.where(coded.widths > 0, 2.0 ** (coded.widths.astype(int) - 1) - 0.5, 0)
    values = fields(coded, coded.data[rows]).astype(np.float32)
    return (values - half.astype(np.float32)) * coded.steps * coded.scale[rows].astype(np.float32)
