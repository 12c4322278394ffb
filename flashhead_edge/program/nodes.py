"""A decoder as a list of nodes: what the lowering of an exporter's graph and the made models both write. numpy only.

A node is a record; where one of its attributes names a tensor of the file of weights, that is a `Stored` until the file is written.
`Decoder` is the recorder: one method for each plugin, which declares the tensors that its node reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashhead_edge.errors import ExportError
from flashhead_edge.program.weights import Item, Matrix, array_item, norm_item, rotation_item, rounded

HEAD_SIZES = (64, 96, 128, 256)  # attention.h
MOST_WIDTH = 16384  # elementwise.h: columns of a norm
SILU, GELU_TANH = 0, 1
PLAIN = ""  # the domain of ONNX's own operators
OURS = "flashhead"
Shape = tuple["int | str", ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file of weights, by name; "" is none."""

    name: str


Attribute = int | float | str | tuple[int, ...] | Stored


@dataclass(frozen=True)
class Node:
    """One operator."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    domain: str = OURS


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph."""

    name: str
    dtype: str  # float16, bfloat16, float32, int32
    shape: Shape


@dataclass(frozen=True, eq=False)
class Constant:
    """A small array that stands in the ONNX file itself; bfloat16 as uint16."""

    dtype: str
    array: np.ndarray


@dataclass(frozen=True, eq=False)
class External:
    """An array of the ONNX file that lies in the file of weights."""

    dtype: str
    shape: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True, eq=False)
class Graph:
    """A whole model. Nodes stand in an order in which they can run."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant | External]


@dataclass(frozen=True)
class Attention:
    """What an attention of a decoder does."""

    q_heads: int
    kv_heads: int
    head_size: int
    window: int  # the last positions that a query sees, 0 all
    scale: float  # of the scores


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm of queries or keys, a head at a time."""

    name: str
    weight: np.ndarray  # [head size] float32
    epsilon: float


@dataclass(eq=False)
class Decoder:
    """A decoder in the making, its values named by strings."""

    precision: str
    context: int  # positions of the cache
    nodes: list[Node] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    constants: dict[str, Constant | External] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # columns of each value
    attentions: list[Attention] = field(default_factory=list)
    tables: dict[bytes, str] = field(default_factory=dict)  # names of the rotary tables, by content
    parameters: int = 0  # weights of the matrices

    @property
    def bf16(self) -> int:
        return int(self.precision == "bfloat16")

    def _add(self, op: str, inputs: Sequence[str], outputs: Sequence[tuple[str, int]], attributes: Mapping[str, Attribute], domain: str = OURS) -> str:
        """Record a node; the outputs come with their columns."""
        for name, width in outputs:
            if name in self.widths:
                raise ExportError(f"{name}: two values have this name, expected one; report this model")
            self.widths[name] = width
        names = tuple(name for name, _ in outputs)
        self.nodes.append(Node(op, f"{names[0]}/{op}", tuple(inputs), names, dict(attributes), domain))
        return names[0]

    def store(self, item: Item) -> Stored:
        """Declare a tensor; declared twice under one name it is one."""
        self.items.setdefault(item.name, item)
        return Stored(item.name)

    def embedding(self, ids: str, rows: Item, scale: float, out: str = "embedding") -> str:
        """Rows of a matrix [V', d]."""
        vocab, d = rows.shape
        return self._add(
            "TokenEmbedding", [ids], [(out, d)], {"rows": self.store(rows), "vocab": vocab, "d": d, "bf16": self.bf16, "scale": float(scale)}
        )  # fmt: skip

    def norm(self, x: str, residual: str | None, name: str, weight: np.ndarray, epsilon: float, out: str, total: str = "") -> str:
        """y, or with a residual y and, as `total`, the rounded sum whose norm it is."""
        d = self.widths[x]
        if weight.shape != (d,) or d % 8 or d > MOST_WIDTH:
            raise ExportError(
                f"{name}: a norm of {d} columns with a weight {list(weight.shape)}, expected a multiple of 8 up to {MOST_WIDTH:,}, as the kernel takes it; "
                "export with --layers native (flashhead export tensorrt), or use the onnxruntime backend"
            )
        item, offset = norm_item(name, weight, self.precision)
        attributes: dict[str, Attribute] = {"weight": self.store(item), "d": d, "offset": offset, "epsilon": float(epsilon), "bf16": self.bf16}
        if residual is None:
            return self._add("RmsNorm", [x], [(out, d)], attributes)
        return self._add("RmsNorm", [x, residual], [(out, d), (total, d)], attributes)

    def linear(self, x: str, matrix: Matrix, out: str) -> str:
        matrix.check()
        stored = {item.name.rsplit(".", 1)[1]: self.store(item) for item in matrix.items(self.precision)}
        self.parameters += matrix.n * matrix.k
        attributes: dict[str, Attribute] = {
            "codes": stored["codes"], "scales": stored["scales"], "zeros": stored.get("zeros", Stored("")),
            "n": matrix.n, "k": matrix.k, "group": matrix.group, "bf16": self.bf16,
        }  # fmt: skip
        return self._add("W4A16Linear", [x], [(out, matrix.n)], attributes)

    def gated(self, x: str, activation: int, out: str) -> str:
        width = self.widths[x] // 2
        if width % 8:
            raise ExportError(
                f"{out}: a gated product of {width} columns, expected a multiple of 8, as the kernel takes it; "
                "export with --layers native (flashhead export tensorrt), or use the onnxruntime backend"
            )
        return self._add("GatedProduct", [x], [(out, width)], {"activation": activation, "bf16": self.bf16})

    def table(self, cos: np.ndarray | None, sin: np.ndarray | None, head_size: int) -> Stored:
        """The rotary table of an attention, [context, head size / 2, 2]; without one it turns by nothing."""
        if cos is None or sin is None:
            cos, sin = np.ones((self.context, head_size // 2), np.float32), np.zeros((self.context, head_size // 2), np.float32)
        if cos.shape[1] * 2 != head_size:
            raise ExportError(
                f"rotary positions: {2 * cos.shape[1]} of a head's {head_size} values are turned, expected all of them, as the attention kernel does it; "
                "export with --layers native (flashhead export tensorrt), or use the onnxruntime backend"
            )
        if len(cos) < self.context:
            raise ExportError(f"rotary positions: the model's table has {len(cos):,} positions, expected {self.context:,}; pass --context {len(cos)}")
        cos, sin = (np.ascontiguousarray(t[: self.context], np.float32) for t in (cos, sin))
        key = cos.tobytes() + sin.tobytes()
        name = self.tables.setdefault(key, f"rotations.{len(self.tables)}")
        return self.store(rotation_item(name, cos, sin))

    def attention(self, qkv: str, a: Attention, rotations: Stored, q_norm: HeadNorm | None, k_norm: HeadNorm | None, out: str) -> str:
        """Attention of the next layer, over the cache of that number."""
        if a.head_size not in HEAD_SIZES:
            raise ExportError(
                f"{out}: attention heads of {a.head_size} values, expected one of {', '.join(map(str, HEAD_SIZES))}, as the kernel takes them; "
                "export with --layers native (flashhead export tensorrt), or use the onnxruntime backend"
            )
        if self.widths[qkv] != (a.q_heads + 2 * a.kv_heads) * a.head_size or a.q_heads % a.kv_heads:
            raise ExportError(
                f"{out}: {a.q_heads} query and {a.kv_heads} key-value heads of {a.head_size} values in {self.widths[qkv]} columns, expected queries, keys and "
                "values side by side, and heads that share keys evenly; report this model"
            )
        layer = len(self.attentions)
        self.attentions.append(a)
        norms, offsets, epsilons = self._head_norms([n for n in (q_norm, k_norm) if n is not None])
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        attributes: dict[str, Attribute] = {
            "q_heads": a.q_heads, "kv_heads": a.kv_heads, "head_size": a.head_size, "max_length": self.context, "window": a.window, "scale": float(a.scale),
            "rotations": rotations, "q_norm": norms.get("" if q_norm is None else q_norm.name, Stored("")),
            "k_norm": norms.get("" if k_norm is None else k_norm.name, Stored("")),
            "norm_offset": offsets, "epsilon": epsilons, "bf16": self.bf16,
        }  # fmt: skip
        present = [(f"present.{layer}.{part}", a.head_size) for part in ("key", "value")]
        return self._add("DecodeAttention", [qkv, *past, "lengths"], [(out, a.q_heads * a.head_size), *present], attributes)

    def _head_norms(self, norms: list[HeadNorm]) -> tuple[dict[str, Stored], float, float]:
        """Norms of queries and keys, which share offset and epsilon: tensors by name, offset, epsilon."""
        if not norms:
            return {}, 0.0, 0.0
        if len({n.epsilon for n in norms}) > 1:
            raise ExportError(f"{norms[0].name}: norms of queries and keys with epsilons {sorted({n.epsilon for n in norms})}, expected one; report this model")
        _, offset = norm_item(norms[0].name, np.concatenate([n.weight for n in norms]), self.precision)
        left = {n.name: n.weight - np.float32(offset) for n in norms}
        stored = {name: self.store(array_item(name, weight, self.precision)) for name, weight in left.items()}
        return stored, offset, norms[0].epsilon

    def plain(self, op: str, x: str, y: str | np.ndarray, out: str) -> str:
        """Add or Mul of ONNX, with another value or with a small constant."""
        if isinstance(y, np.ndarray):
            name = f"{out}.constant"
            self.constants[name] = Constant(self.precision, rounded(y, self.precision, name))
            y = name
        return self._add(op, [x, y], [(out, self.widths[x])], {}, PLAIN)

    def rename(self, old: str, new: str) -> None:
        """Give a value another name."""

        def named(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new if n == old else n for n in names)

        self.nodes = [Node(n.op, n.name, named(n.inputs), named(n.outputs), n.attributes, n.domain) for n in self.nodes]
        self.widths[new] = self.widths.pop(old)

    def inputs(self) -> list[Tensor]:
        """Of the decoder without its head."""
        return [Tensor("input_ids", "int32", ("batch", "sequence")), Tensor("lengths", "int32", ("batch",)), *self.cache("past_key_values")]

    def cache(self, name: str) -> list[Tensor]:
        return [
            Tensor(f"{name}.{i}.{part}", self.precision, ("batch", a.kv_heads, self.context, a.head_size))
            for i, a in enumerate(self.attentions)
            for part in ("key", "value")
        ]
