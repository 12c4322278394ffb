"""Made programs of small sizes for the CUDA backend, and what they compute, in numpy: every node by what the kernels' headers say of it.

Each result is rounded to the program's type where the kernels round it; sums are float32 of numpy's order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import made_program
from flashhead_edge.export.tensorrt.made import Model
from flashhead_edge.program.file import Program
from flashhead_edge.program.head import Device
from flashhead_edge.program.nodes import GELU_TANH, PLAIN, Node, Stored
from flashhead_edge.program.weights import rounded, widened

ORIN = Device(16, 163 << 10, 87)  # the made driver's
VOCAB, CONTEXT, CHUNK = 5_003, 192, 64
MODELS = {  # sizes, group, precision
    "llama": (Model(256, 512, 3, 4, 2, 64, False, 1e4), 64, "float16"),
    "qwen": (Model(512, 768, 2, 4, 4, 128, True, 1e6), 128, "bfloat16"),
    "gemma": (Model(640, 1024, 7, 4, 1, 256, True, 1e6, GELU_TANH, True, 48), 32, "bfloat16"),
    "phi": (Model(384, 512, 2, 8, 2, 96, False, 1e4), 32, "float16"),
}


def small_program(folder: Path, name: str, device: Device = ORIN, batch: int = 4) -> Program:
    model, group, precision = MODELS[name]
    return made_program(folder, model, VOCAB, device, group=group, precision=precision, context=CONTEXT, batch=batch)


def unpacked(codes: np.ndarray, n: int, k: int) -> np.ndarray:
    """Codes [N, K] of tiles: where w4a16.h says that each one's four bits lie."""
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    lane = row % 16 // 2 * 4 + column % 32 // 8
    slot = column % 64 // 32 * 2 + row % 2
    nibble = column % 8 // 2 + column % 2 * 4
    return codes.reshape(n // 16, k // 64, 512)[row // 16, column // 64, lane * 16 + slot * 4 + nibble // 2] >> nibble % 2 * 4 & 15


class Truth:
    """A text in the middle: `feed` gives the states of more of its tokens, [S, d] float32."""

    def __init__(self, program: Program) -> None:
        self.p, self.data = program, np.fromfile(program.weights, np.uint8)
        self.length = 0
        self.caches: dict[str, np.ndarray] = {}
        self.matrices: dict[str, np.ndarray] = {}

    def tensor(self, stored: Any, dtype: Any) -> np.ndarray | None:
        assert isinstance(stored, Stored)
        if not stored.name:
            return None
        offset, size = self.p.places[stored.name]
        return self.data[offset : offset + size].view(dtype)

    def floats(self, stored: Any) -> np.ndarray | None:
        found = self.tensor(stored, np.float16 if self.p.precision == "float16" else np.uint16)
        return None if found is None else widened(found, self.p.precision)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return widened(rounded(x, self.p.precision, "truth"), self.p.precision)

    def feed(self, ids: list[int]) -> np.ndarray:
        values: dict[str, np.ndarray] = {"input_ids": np.array(ids)}
        self.length += len(ids)
        for node in self.p.nodes[:-1]:
            if node.domain == PLAIN:
                raise AssertionError(f"{node.name}: made programs have no such nodes")
            found = getattr(self, node.op)(node, node.attributes, *(values.get(name) for name in node.inputs))
            values |= dict(zip(node.outputs, found if isinstance(found, tuple) else (found,)))
        return values["hidden_states"]

    def TokenEmbedding(self, _: Node, a: Any, ids: np.ndarray) -> np.ndarray:
        return self.rounded(self.floats(a["rows"]).reshape(a["vocab"], a["d"])[ids] * np.float32(a["scale"]))

    def normed(self, x: np.ndarray, weight: np.ndarray, a: Any, offset: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + np.float32(a["epsilon"])) * (np.float32(a[offset]) + weight)

    def RmsNorm(self, _: Node, a: Any, x: np.ndarray, residual: np.ndarray | None = None) -> Any:
        total = x if residual is None else self.rounded(x + residual)
        y = self.rounded(self.normed(total, self.floats(a["weight"]), a, "offset"))
        return y if residual is None else (y, total)

    def W4A16Linear(self, node: Node, a: Any, x: np.ndarray) -> np.ndarray:
        if node.name not in self.matrices:
            n, k, groups = a["n"], a["k"], a["k"] // a["group"]
            row, group = np.meshgrid(np.arange(n), np.arange(groups), indexing="ij")
            scales = self.floats(a["scales"]).reshape(n // 16, groups, 16)[row // 16, group, row % 16]
            codes = unpacked(self.tensor(a["codes"], np.uint8), n, k).astype(np.float32) - 8
            self.matrices[node.name] = codes * scales.repeat(a["group"], 1)
        return self.rounded(x @ self.matrices[node.name].T)

    def GatedProduct(self, _: Node, a: Any, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(x.astype(np.float64), 2, -1)
        active = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) if a["activation"] else gate / (1 + np.exp(-gate))
        return self.rounded(active * up)

    def DecodeAttention(self, node: Node, a: Any, qkv: np.ndarray, *_: Any) -> np.ndarray:
        heads, kv, size, new = a["q_heads"], a["kv_heads"], a["head_size"], len(qkv)
        table = self.tensor(a["rotations"], np.float32).reshape(-1, size // 2, 2)
        q, k, v = np.split(qkv.reshape(new, heads + 2 * kv, size), [heads, heads + kv], 1)
        positions = np.arange(self.length - new, self.length)
        turned = []
        for x, norm in ((q, self.floats(a["q_norm"])), (k, self.floats(a["k_norm"]))):
            x = x if norm is None else self.normed(x, norm, a, "norm_offset")
            c, s = table[positions, None, :, 0], table[positions, None, :, 1]
            first, second = np.split(x, 2, -1)
            turned.append(self.rounded(np.concatenate([first * c - second * s, second * c + first * s], -1)))
        keys, values = (self.caches.setdefault(name, np.full((CONTEXT, kv, size), np.nan, np.float32)) for name in (f"{node.name}.k", f"{node.name}.v"))
        keys[positions], values[positions] = turned[1], v
        out = np.empty((new, heads, size), np.float32)
        for i, position in enumerate(positions):
            seen = slice(max(0, position + 1 - a["window"]) if a["window"] else 0, position + 1)
            scores = np.float32(a["scale"]) * np.einsum("hd,phd->hp", turned[0][i], keys[seen].repeat(heads // kv, 1))
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[i] = np.einsum("hp,phd->hd", shares / shares.sum(-1, keepdims=True), values[seen].repeat(heads // kv, 1))
        return self.rounded(out.reshape(new, -1))
