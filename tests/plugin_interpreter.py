"""Runs a decoder.onnx of plugin nodes in numpy, for tests: every node by what the contract says of it, its tensors found by the node's own strings.

The packed layout is taken apart here a second time, index by index, from the text of plugins_trt/kernels/w4a16.h. Arithmetic is float32 (`rounding`
"float32": nothing else is rounded; else every node's result is rounded to that type, as the kernels do it).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from flashhead_edge.reference import TorchHead

KINDS: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def fingerprint(path: Path) -> str:
    """FNV-1a 64 of the header, written anew."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    value = 0xCBF29CE484222325
    for byte in data[: 8 + length]:
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def unpack_codes(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """Codes [N, K] of tiles: for each output and input where w4a16.h says that its four bits lie."""
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    tile, chunk = row // 16, column // 64
    inside, word = column % 64, column % 32 // 8  # word t of a half holds k = 8 t .. 8 t + 7
    lane = row % 16 // 2 * 4 + word  # 4 g + t, g the pair of rows
    slot = inside // 32 * 2 + row % 2  # {row 2g, row 2g + 1} of the first 32, then of the last
    nibble = column % 8 // 2 + column % 2 * 4  # even ones first
    byte = lane * 16 + slot * 4 + nibble // 2
    return packed.reshape(n // 16, k // 64, 512)[tile, chunk, byte] >> nibble % 2 * 4 & 15


def unpack_groups(packed: np.ndarray, n: int, groups: int) -> np.ndarray:
    """Scales or zero points [N, groups]."""
    row, group = np.meshgrid(np.arange(n), np.arange(groups), indexing="ij")
    return packed.reshape(n // 16, groups, 16)[row // 16, group, row % 16]


def zero_points(zeros: np.ndarray) -> np.ndarray:
    """Bytes with sixteenths in the high nibble, as numbers."""
    return (zeros % 16 + zeros // 16 / 16).astype(np.float32)


class Interpreter:
    """A decoder.onnx over its folder's file of weights.

    Args:
        folder: where decoder.onnx and the file lie.
        head: stands in for the head's plugin; None leaves its outputs out.
        rounding: float32, or the type to which each result is rounded.
    """

    def __init__(self, folder: Path, head: TorchHead | None = None, rounding: str = "float32", model: str = "decoder.onnx") -> None:
        self.model = onnx.load(folder / model, load_external_data=False)
        self.folder, self.head, self.kind = folder, head, KINDS[rounding]
        self.data: dict[str, np.ndarray] = {}
        self.fingerprints: dict[str, str] = {}
        self.matrices: dict[str, np.ndarray] = {}
        self.constants = {i.name: self.constant(i) for i in self.model.graph.initializer}
        self.seen: set[str] = set()  # operators that ran

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. `past_key_values.*` are updated in place, as a runtime does it that binds one address twice."""
        values: dict[str, np.ndarray] = dict(self.constants) | {i.name: feeds[i.name] for i in self.model.graph.input if i.name in feeds}
        for node in self.model.graph.node:
            self.seen.add(node.op_type)
            at = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            inputs = [values.get(name) for name in node.input]
            if node.domain == "flashhead":
                assert (at["plugin_version"], at["plugin_namespace"]) == (b"1", b"flashhead")
            if node.op_type == "FlashHead" and self.head is None:
                continue
            found = getattr(self, node.op_type)(at, *inputs)
            for name, value in zip(node.output, found if isinstance(found, tuple) else (found,)):
                values[name] = value
        return {o.name: values[o.name] for o in self.model.graph.output if o.name in values}

    def constant(self, i: onnx.TensorProto) -> np.ndarray:
        """A tensor of the model; one beside it comes from where the model says."""
        if i.external_data:
            where = {e.key: e.value for e in i.external_data}
            i.raw_data = (self.folder / where["location"]).read_bytes()[int(where["offset"]) :][: int(where["length"])]
            i.data_location = onnx.TensorProto.DEFAULT
            del i.external_data[:]
        array = numpy_helper.to_array(i)
        return array if array.dtype == np.int64 else array.astype(np.float32)

    def tensor(self, at: dict[str, Any], name: str, dtype: Any) -> np.ndarray | None:
        """The tensor that an attribute names, flat; None for an empty string."""
        place = at[name].decode()
        if not place:
            return None
        offset, length = map(int, place.split(" "))
        file = at["file"].decode()
        if file not in self.data:
            self.data[file] = np.fromfile(self.folder / file, np.uint8)
            self.fingerprints[file] = fingerprint(self.folder / file)
        assert at["fingerprint"].decode() == self.fingerprints[file]
        return self.data[file][offset : offset + length].view(dtype)

    def floats(self, at: dict[str, Any], name: str) -> np.ndarray | None:
        found = self.tensor(at, name, ml_dtypes.bfloat16 if at["bf16"] else np.float16)
        return None if found is None else found.astype(np.float32)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.kind).astype(np.float32)

    def TokenEmbedding(self, at: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        rows = self.floats(at, "rows").reshape(at["vocab"], at["d"])
        return self.rounded(rows[ids] * np.float32(at["scale"]))

    def RmsNorm(self, at: dict[str, Any], x: np.ndarray, residual: np.ndarray | None = None) -> Any:
        weight = self.floats(at, "weight")
        assert weight.shape == (at["d"],) == x.shape[-1:]
        total = x if residual is None else self.rounded(x + residual)
        y = total / np.sqrt(np.mean(total**2, -1, keepdims=True) + np.float32(at["epsilon"])) * (np.float32(at["offset"]) + weight)
        return self.rounded(y) if residual is None else (self.rounded(y), total)

    def W4A16Linear(self, at: dict[str, Any], x: np.ndarray, residual: np.ndarray | None = None) -> Any:
        """The product, and around it what the node says, by the other plugins' own steps."""
        around = {"norm": b"", "first_norm": b"", "residual": 0, "gated": 0} | at
        assert around["residual"] == int(residual is not None)
        total = None
        for name, skipped in (("first_norm", None), ("norm", residual)):
            if around[name]:
                x = self.RmsNorm(at | {"weight": at[name], "d": at["k"]}, x, skipped)
                if skipped is not None:
                    x, total = x
        y = self.product(at, x)
        if around["gated"]:
            y = self.GatedProduct(at, y)
        return y if total is None else (y, total)

    def product(self, at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        key = at["codes"].decode()
        if key not in self.matrices:
            n, k, group = at["n"], at["k"], at["group"]
            scales = unpack_groups(self.floats(at, "scales"), n, k // group)
            zeros = self.tensor(at, "zeros", np.uint8)
            zero = np.full_like(scales, 8) if zeros is None else zero_points(unpack_groups(zeros, n, k // group))
            codes = unpack_codes(self.tensor(at, "codes", np.uint8), n, k).astype(np.float32)
            self.matrices[key] = (codes - zero.repeat(group, 1)) * scales.repeat(group, 1)
        return self.rounded(x @ self.matrices[key].T)

    def GatedProduct(self, at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        gate, up = np.split(x.astype(np.float64), 2, -1)
        if at["activation"]:
            active = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            active = gate / (1 + np.exp(-gate))
        return self.rounded((active * up).astype(np.float32))

    def DecodeAttention(self, at: dict[str, Any], qkv: np.ndarray, cache_k: np.ndarray, cache_v: np.ndarray, lengths: np.ndarray) -> Any:
        batch, new, _ = qkv.shape
        heads, kv, size = at["q_heads"], at["kv_heads"], at["head_size"]
        assert cache_k.shape == cache_v.shape == (batch, kv, at["max_length"], size)
        table = self.tensor(at, "rotations", np.float32).reshape(at["max_length"], size // 2, 2)
        parts = qkv.reshape(batch, new, heads + 2 * kv, size)
        q, k, v = np.split(parts, [heads, heads + kv], 2)
        out = np.empty((batch, new, heads, size), np.float32)
        for b in range(batch):
            positions = np.arange(lengths[b] - new, lengths[b])
            turned = []
            for x, norm in ((q[b], self.floats(at, "q_norm")), (k[b], self.floats(at, "k_norm"))):
                if norm is not None:
                    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + np.float32(at["epsilon"])) * (np.float32(at["norm_offset"]) + norm)
                c, s = table[positions, None, :, 0], table[positions, None, :, 1]
                first, second = np.split(x, 2, -1)
                turned.append(self.rounded(np.concatenate([first * c - second * s, second * c + first * s], -1)))
            cache_k[b, :, positions], cache_v[b, :, positions] = turned[1], v[b]
            for i, position in enumerate(positions):
                start = max(0, position + 1 - at["window"]) if at["window"] else 0
                keys, values = (c[b, :, start : position + 1].repeat(heads // kv, 0).astype(np.float32) for c in (cache_k, cache_v))
                scores = np.float32(at["scale"]) * np.einsum("hd,hpd->hp", turned[0][i], keys)
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                out[b, i] = np.einsum("hp,hpd->hd", shares / shares.sum(-1, keepdims=True), values)
        return self.rounded(out.reshape(batch, new, heads * size)), cache_k, cache_v

    def FlashHead(self, at: dict[str, Any], hidden: np.ndarray, *_: Any) -> tuple[np.ndarray, ...]:
        """The reference's step, over rows that must be those of the file; candidates in the order of their ids, which a plugin does not promise."""
        index = self.head.index
        assert (at["vocab"], at["hidden"], at["stages"]) == (index.vocab_size, index.hidden_size, len(index.stages))
        assert np.array_equal(self.floats(at, "rows").reshape(-1, at["hidden"]), self.head.weight)
        step = self.head.step(torch.from_numpy(hidden if hidden.ndim == 2 else hidden[:, -1]))
        ids, logits = np.full((len(hidden), at["candidates"]), -1, np.int32), np.full((len(hidden), at["candidates"]), -np.inf, np.float32)
        ids[:, : step.ids.shape[1]], logits[:, : step.ids.shape[1]] = step.ids, step.logits
        return step.token.numpy().astype(np.int32), ids, logits, step.counts.numpy().astype(np.int32), step.capped.numpy().astype(np.int32)

    def Add(self, _: dict[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self.rounded(x + y)

    def Mul(self, _: dict[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self.rounded(x * y)

    def Slice(self, _: dict[str, Any], x: np.ndarray, first: np.ndarray, end: np.ndarray, axis: np.ndarray) -> np.ndarray:
        assert axis == 1
        return x[:, int(first[0]) : min(int(end[0]), x.shape[1])]

    def Squeeze(self, _: dict[str, Any], x: np.ndarray, axis: np.ndarray) -> np.ndarray:
        return x.squeeze(int(axis[0]))

    def Gemm(self, at: dict[str, Any], x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        assert at["transB"] == 1
        return self.rounded(x @ w.T + (0 if bias is None else bias))

    def ArgMax(self, at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        assert at["keepdims"] == 0
        return x.argmax(at["axis"])

    def Cast(self, at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        assert at["to"] == onnx.TensorProto.INT32
        return x.astype(np.int32)


def decode_plugins(p: Interpreter, ids: np.ndarray, pieces: list[int]) -> dict[str, np.ndarray]:
    """All outputs of `ids` [B, S] read in pieces, over one cache of full length: hidden states of all tokens, other outputs one for each piece."""
    cache = {}
    for value in p.model.graph.input:
        if value.name.startswith("past_key_values."):
            _, *shape = (d.dim_value for d in value.type.tensor_type.shape.dim)
            cache[value.name] = np.full((len(ids), *shape), np.nan, np.float32)  # what was not written is not read
    found: dict[str, list[np.ndarray]] = {}
    start = 0
    for piece in pieces:
        start += piece
        now = {"input_ids": ids[:, start - piece : start].astype(np.int32), "lengths": np.full(len(ids), start, np.int32)}
        for name, value in p.run(now | cache).items():
            found.setdefault(name, []).append(value if name == "hidden_states" else value[..., None])
    return {name: np.concatenate(values, 1 if name == "hidden_states" else -1) for name, values in found.items() if not name.startswith("present.")}
