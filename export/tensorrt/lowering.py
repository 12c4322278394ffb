"""From the body's graph in the `onnxruntime` dialect to a decoder in plugin nodes, operator by operator, so that a family is data.

A product, an embedding, an activation is not recorded where it stands but where its value is wanted: then it is known what it is part of.
A product whose value attention takes is the layer's `qkv`, together with its neighbours where keys and values come from products of their
own; two products whose values an activation joins are the layer's `gate_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from flashhead_edge.errors import ExportError
from flashhead_edge.export.graph import ORT
from flashhead_edge.export.passes.products import Coded, coded_weights
from flashhead_edge.program.nodes import GELU_TANH, SILU, Attention, Decoder, HeadNorm
from flashhead_edge.program.weights import Item, Matrix

INSTEAD = "export with --layers native, or with flashhead export onnx"


@dataclass(frozen=True, eq=False)
class Row:
    """A value that is recorded, or some of its columns."""

    name: str
    offset: int
    width: int
    heads: int = 0  # columns of a head, where it has been parted into heads
    norm: HeadNorm | None = None  # of its heads, to be taken into the attention


@dataclass(frozen=True, eq=False)
class Product:
    """x W^T + bias, not recorded yet."""

    x: ir.Value
    codes: tuple[Coded, ...]  # on top of each other
    bias: np.ndarray | None  # [N] float32
    heads: int = 0
    norm: HeadNorm | None = None  # as of a row

    @property
    def n(self) -> int:
        return sum(c.n for c in self.codes)


@dataclass(frozen=True)
class Lookup:
    """The embedding, not recorded yet."""

    scale: float


@dataclass(frozen=True, eq=False)
class Activated:
    """An activation of a value, which waits for what it is multiplied with."""

    kind: int
    x: ir.Value


@dataclass(eq=False)
class Lowering:
    """A graph on its way."""

    graph: ir.Graph
    rows: Item  # of the embedding
    decoder: Decoder
    values: dict[ir.Value, Row | Product | Lookup | Activated] = field(default_factory=dict)
    sigmoids: dict[ir.Value, ir.Value] = field(default_factory=dict)  # what each is of
    made_by: dict[str, str] = field(default_factory=dict)  # the role of the node behind a name: attention, gated

    @property
    def layer(self) -> int:
        return len(self.decoder.attentions)

    def get(self, value: ir.Value | None, node: ir.Node) -> Row | Product | Lookup | Activated:
        found = None if value is None else self.values.get(value)
        if found is None:
            raise refused(node, f"an operand {None if value is None else value.name} that is no row of a layer")
        return found

    def row(self, value: ir.Value | None, node: ir.Node) -> Row:
        """A value as it lies in the graph, recorded now if it is not yet."""
        found = self.get(value, node)
        assert value is not None
        if isinstance(found, Activated):
            raise refused(node, "an activation that is not multiplied with its gate")
        if isinstance(found, Lookup):
            found = self._recorded(value, self.decoder.embedding("input_ids", self.rows, found.scale))
        if isinstance(found, Product):
            found = self.record(value, found, self.role(found), node)
        return found

    def whole(self, value: ir.Value | None, node: ir.Node) -> str:
        """The name of a value that is all of what is recorded."""
        row = self.row(value, node)
        if row.norm is not None or row.width != self.decoder.widths[row.name]:
            raise refused(node, "some columns of a value, where only attention and gated products take them apart")
        return row.name

    def _recorded(self, value: ir.Value, name: str, heads: int = 0, norm: HeadNorm | None = None) -> Row:
        row = Row(name, 0, self.decoder.widths[name], heads, norm)
        self.values[value] = row
        return row

    def record(self, value: ir.Value, p: Product, name: str, node: ir.Node) -> Row:
        """Record a product that nothing else is fused with."""
        return self._recorded(value, self.product(p, name, node), p.heads, p.norm)

    def role(self, product: Product) -> str:
        """The name of a product that nothing has fused: by what it reads."""
        x = self.values.get(product.x)
        made = self.made_by.get(x.name, "") if isinstance(x, Row) else ""
        known = {"attention": f"layers.{self.layer - 1}.o", "gated": f"layers.{self.layer - 1}.down"}.get(made, "")
        free = known and f"{known}.codes" not in self.decoder.items
        return known if free else f"layers.{self.layer}.{product.codes[0].name.strip('/').replace('/', '.')}"

    def product(self, p: Product, name: str, node: ir.Node) -> str:
        """Record a product, and the sum with its bias."""
        first = p.codes[0]
        if any(c.bits != 4 for c in p.codes):
            raise ExportError(f"{first.name}: codes of {first.bits} bits, expected 4, as the W4A16 kernels read them; {INSTEAD}")
        if len({c.group for c in p.codes}) > 1:
            raise refused(node, f"products in groups of {sorted({c.group for c in p.codes})} that belong together, where one group has a kernel")
        matrix = Matrix(name, p.n, first.k, first.group, all(c.symmetric for c in p.codes), [partial(neutral, c) for c in p.codes])
        out = self.decoder.linear(self.whole(p.x, node), matrix, name)
        return out if p.bias is None else self.decoder.plain("Add", out, p.bias, f"{out}.biased")


def refused(node: ir.Node, what: str) -> ExportError:
    return ExportError(f"{node.name}: {node.op_type} with {what}, expected an operator that has a plugin; {INSTEAD}")


def neutral(c: Coded) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes [N, K / 2], scales [N, groups], zeros [N, groups] or None: ONNX Runtime's layout is the neutral one where groups are full."""
    codes = c.codes.numpy().reshape(c.n, -1)[:, : c.k // 2]
    return codes, c.scales.numpy().reshape(c.n, c.groups), None if c.symmetric else np.ascontiguousarray(c.unpacked_zeros().T)


def lower_body(model: ir.Model, rows: Item, decoder: Decoder) -> None:
    """Record a body's nodes; its hidden states are called ``hidden_states``.

    Args:
        model: from `build_body`, in the `onnxruntime` dialect, products of 4 bits.
        rows: the embedding, as it will be stored.
    Raises:
        ExportError: an operator, a size or a code that the plugins do not have.
    """
    graph = model.graph
    lowering = Lowering(graph, rows, decoder)
    counts = counting(graph)
    for node in graph:
        if node in counts or node.op_type == "Constant":
            continue
        rule = RULES.get((node.domain, node.op_type))
        if rule is None:
            raise ExportError(f"{node.name}: {node.op_type} has no plugin, expected one of {', '.join(op for _, op in RULES)}; {INSTEAD}")
        rule(lowering, node)
    hidden = next(v for v in graph.outputs if v.name == "hidden_states")
    last = hidden.producer()
    assert last is not None
    decoder.rename(lowering.whole(hidden, last), "hidden_states")


def counting(graph: ir.Graph) -> set[ir.Node]:
    """Operators that count the mask's positions, which plugins know from `lengths`, and the choice of a rotary table by them."""
    known = {v for v in graph.inputs if v.name == "attention_mask"}
    found = set()
    for node in graph:
        values = [v for v in node.inputs if v is not None and constant(v) is None]
        if values and all(v in known for v in values):
            known.update(node.outputs)
            found.add(node)
    return found


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant."""
    node = None if value is None else value.producer()
    if node is not None:
        return node.attributes["value"].as_tensor().numpy() if node.op_type == "Constant" else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def weight(value: ir.Value | None, node: ir.Node) -> np.ndarray:
    array = constant(value)
    if array is None:
        raise refused(node, "a weight that is no constant")
    return array.astype(np.float32)


def named(value: ir.Value | None) -> str:
    """The name of a norm's weight in the file: the exporter's, without what is the same in all of them."""
    return str(None if value is None else value.name).removeprefix("model.").removesuffix(".weight")


# ---- a rule for each operator


def _embed(p: Lowering, node: ir.Node) -> None:
    matrix, ids = node.inputs
    if ids is None or ids.name != "input_ids" or matrix is None or matrix.const_value is None:
        raise refused(node, "something else than the embedding of input_ids")
    p.values[node.outputs[0]] = Lookup(1.0)


def _same(p: Lowering, node: ir.Node) -> None:
    p.values[node.outputs[0]] = p.get(node.inputs[0], node)


def _norm(p: Lowering, node: ir.Node) -> None:
    x, gamma = node.inputs[:2]
    array, epsilon = weight(gamma, node), node.attributes["epsilon"].as_float()
    found = p.get(x, node)
    if isinstance(found, (Row, Product)) and found.heads == len(array) and found.norm is None:
        p.values[node.outputs[0]] = replace(found, norm=HeadNorm(named(gamma), array, epsilon))
        return
    name = p.decoder.norm(p.whole(x, node), None, named(gamma), array, epsilon, named(gamma) + ".out")
    p.values[node.outputs[0]] = Row(name, 0, p.decoder.widths[name])


def _skip_norm(p: Lowering, node: ir.Node) -> None:
    """The norm of x + skip, and that sum."""
    residual, x, gamma, *bias = node.inputs
    if any(b is not None for b in bias):
        raise refused(node, "a bias of the sum")
    array, out = weight(gamma, node), named(gamma) + ".out"
    total = named(gamma) + ".sum"
    p.decoder.norm(p.whole(x, node), p.whole(residual, node), named(gamma), array, node.attributes["epsilon"].as_float(), out, total)
    for value, name in zip(node.outputs, (out, None, None, total)):
        if name is not None:
            p.values[value] = Row(name, 0, p.decoder.widths[name])


def _linear(p: Lowering, node: ir.Node) -> None:
    x = node.inputs[0]
    if x is None:
        raise refused(node, "no operand")
    p.get(x, node)
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    p.values[node.outputs[0]] = Product(x, (coded_weights(node),), None if bias is None else weight(bias, node))


def _add(p: Lowering, node: ir.Node) -> None:
    x, y = node.inputs
    if constant(x) is not None:
        x, y = y, x
    row, found = constant(y), p.get(x, node)
    out = f"layers.{p.layer}.{str(node.name).strip('/').replace('/', '.')}"
    if row is None:
        name = p.decoder.plain("Add", p.whole(x, node), p.whole(y, node), out)
    elif isinstance(found, Product) and row.shape == (found.n,):
        before = 0 if found.bias is None else found.bias
        p.values[node.outputs[0]] = replace(found, bias=row.astype(np.float32) + before)
        return
    else:
        name = p.decoder.plain("Add", p.whole(x, node), row, out)
    p.values[node.outputs[0]] = Row(name, 0, p.decoder.widths[name])


def _multiply(p: Lowering, node: ir.Node) -> None:
    x, y = node.inputs
    assert x is not None and y is not None
    if constant(x) is not None or isinstance(p.values.get(y), Activated) or p.sigmoids.get(x) is y:
        x, y = y, x
    factor, result = constant(y), node.outputs[0]
    if p.sigmoids.get(y) is x:
        p.values[result] = Activated(SILU, x)
        return
    found = p.get(x, node)
    if isinstance(found, Activated):
        p.values[result] = _gated(p, found, y, node)
        return
    if isinstance(found, Lookup) and factor is not None and factor.size == 1:
        p.values[result] = Lookup(found.scale * float(factor.reshape(())))
        return
    out = f"layers.{p.layer}.{str(node.name).strip('/').replace('/', '.')}"
    name = p.decoder.plain("Mul", p.whole(x, node), p.whole(y, node) if factor is None else factor, out)
    p.values[result] = Row(name, 0, p.decoder.widths[name])


def _gated(p: Lowering, activated: Activated, up: ir.Value, node: ir.Node) -> Row:
    """activation(gate) * up, from one fused product or from two over the same input."""
    gate, other = p.get(activated.x, node), p.get(up, node)
    layer = p.layer - 1
    if isinstance(gate, Product) and isinstance(other, Product):
        name = p.product(together([gate, other], node), f"layers.{layer}.gate_up", node)
    else:
        first, second = p.row(activated.x, node), p.row(up, node)
        name = first.name
        halves = (first.offset, second.offset, first.width, 2 * first.width) == (0, first.width, second.width, p.decoder.widths[name])
        if second.name != name or not halves or first.norm is not None or second.norm is not None:
            raise refused(node, "an activation that is multiplied with something else than the other half of its product")
    out = p.decoder.gated(name, activated.kind, f"layers.{layer}.gated")
    p.made_by[out] = "gated"
    return Row(out, 0, p.decoder.widths[out])


def together(products: Sequence[Product], node: ir.Node) -> Product:
    """Products over one input as one."""
    if len({id(p.x) for p in products}) > 1:
        raise refused(node, "operands from products of different inputs")
    bias = None
    if any(p.bias is not None for p in products):
        bias = np.concatenate([np.zeros(p.n, np.float32) if p.bias is None else p.bias for p in products])
    return Product(products[0].x, tuple(c for p in products for c in p.codes), bias)


def _sigmoid(p: Lowering, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    p.sigmoids[node.outputs[0]] = node.inputs[0]


def _gelu(p: Lowering, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    kind = node.attributes.get("approximate")
    if kind is None or kind.as_string() != "tanh":
        raise refused(node, "the exact error function")
    p.values[node.outputs[0]] = Activated(GELU_TANH, node.inputs[0])


def _split(p: Lowering, node: ir.Node) -> None:
    """Columns side by side: queries, keys and values, or gate and up, which get their name here."""
    value = node.inputs[0]
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    found = p.get(value, node)
    if isinstance(found, Product):
        assert value is not None
        role = f"layers.{p.layer}.qkv" if len(node.outputs) == 3 else f"layers.{p.layer - 1}.gate_up"
        p.record(value, found, role, node)
    row = p.row(value, node)
    widths = [row.width // len(node.outputs)] * len(node.outputs) if sizes is None else [int(s) for s in sizes]
    if sum(widths) != row.width or row.norm is not None:
        raise refused(node, "parts that are not all of a row")
    at = row.offset
    for out, width in zip(node.outputs, widths):
        p.values[out] = Row(row.name, at, width)
        at += width


def _reshape(p: Lowering, node: ir.Node) -> None:
    """Rows as heads side by side, or heads as rows: the columns stay where they are."""
    shape = constant(node.inputs[1])
    if shape is None or len(shape) != 3 or shape[0] != 0 or shape[1] != -1:
        raise refused(node, "a shape that does not part rows into heads")
    found = p.get(node.inputs[0], node)
    if not isinstance(found, (Row, Product)):
        raise refused(node, "a value that is no product")
    p.values[node.outputs[0]] = replace(found, heads=int(shape[2]))


def _attend(p: Lowering, node: ir.Node) -> None:
    q, k, v, past, _, _, _, cos, sin, *rest = [*node.inputs, *[None] * 9][: max(9, len(node.inputs))]
    a = node.attributes
    heads, kv = a["num_heads"].as_int(), a["kv_num_heads"].as_int()
    turned = bool(a["do_rotary"].as_int()) if "do_rotary" in a else False
    if any(value is not None for value in rest) or ("rotary_interleaved" in a and a["rotary_interleaved"].as_int()):
        raise refused(node, "interleaved positions, sinks or a bias of the scores")
    if "softcap" in a and a["softcap"].as_float():
        raise refused(node, f"scores capped at {a['softcap'].as_float():g}, for which the attention kernel has no code")
    if past is None or past.name != f"past_key_values.{p.layer}.key":
        raise refused(node, f"the cache {None if past is None else past.name} in layer {p.layer}")
    qkv, norms = _fused(p, q, k, v, node)
    size = p.decoder.widths[qkv] // (heads + 2 * kv)
    scale = a["scale"].as_float() if "scale" in a else 0.0
    window = a["local_window_size"].as_int() if "local_window_size" in a else -1
    cosines, sines = (_table(t, node, p.decoder.context) if turned else None for t in (cos, sin))
    attention = Attention(heads, kv, size, max(window, 0), scale or size**-0.5)
    layer = p.layer
    out = p.decoder.attention(qkv, attention, p.decoder.table(cosines, sines, size), *norms, f"layers.{layer}.attention")
    p.made_by[out] = "attention"
    p.values[node.outputs[0]] = Row(out, 0, p.decoder.widths[out])


def _fused(
    p: Lowering, q: ir.Value | None, k: ir.Value | None, v: ir.Value | None, node: ir.Node
) -> tuple[str, tuple[HeadNorm | None, HeadNorm | None]]:  # fmt: skip
    """Queries, keys and values as one recorded value, and the norms of queries and keys."""
    name = f"layers.{p.layer}.qkv"
    found = p.get(q, node)
    if k is None:
        if isinstance(found, Product):
            assert q is not None
            p.record(q, found, name, node)
        return p.whole(q, node), (None, None)
    parts = [part for part in (found, p.get(k, node), p.get(v, node)) if isinstance(part, Product)]
    if len(parts) == 3 and parts[2].norm is None:
        return p.product(together(parts, node), name, node), (parts[0].norm, parts[1].norm)
    rows = [p.row(value, node) for value in (q, k, v)]
    at = 0
    for row in rows:
        if row.name != rows[0].name or row.offset != at:
            raise refused(node, "queries, keys and values from different products, normalised")
        at += row.width
    if at != p.decoder.widths[rows[0].name] or rows[2].norm is not None:
        raise refused(node, "queries, keys and values that are not all of a product")
    return rows[0].name, (rows[0].norm, rows[1].norm)


def _table(value: ir.Value | None, node: ir.Node, context: int) -> np.ndarray:
    """A rotary table [positions, turned / 2]; of two that are chosen by the text's length, the one for short texts."""
    made = None if value is None else value.producer()
    if value is not None and made is not None and made.op_type == "If":
        condition = made.inputs[0].producer() if made.inputs[0] is not None else None
        limit = constant(condition.inputs[1]) if condition is not None and condition.op_type == "Greater" else None
        if limit is None or limit.size != 1:
            raise refused(node, "rotary tables that are chosen by something else than the text's length")
        most = int(limit.reshape(()))
        if context > most:
            raise ExportError(
                f"{node.name}: rotary positions that change for all of a text when it grows beyond {most:,} tokens (LongRoPE), "
                f"expected one table for the context of {context:,}; pass --context {most}, or export with flashhead export onnx"
            )
        value = made.attributes["else_branch"].as_graph().outputs[value.index() or 0]
    array = constant(value)
    if array is None:
        raise refused(node, "rotary tables that are no constants")
    return array.astype(np.float32)


RULES: dict[tuple[str, str], Callable[[Lowering, ir.Node], None]] = {
    ("", "Gather"): _embed,
    ("", "Cast"): _same,
    ("", "SimplifiedLayerNormalization"): _norm,
    (ORT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (ORT, "MatMulNBits"): _linear,
    ("", "Add"): _add,
    ("", "Mul"): _multiply,
    ("", "Sigmoid"): _sigmoid,
    ("", "Gelu"): _gelu,
    ("", "Split"): _split,
    ("", "Reshape"): _reshape,
    (ORT, "GroupQueryAttention"): _attend,
}
