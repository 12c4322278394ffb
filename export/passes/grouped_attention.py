"""Attention as ai.onnx says it: ONNX Runtime's GroupQueryAttention in products, masks and a cache that grows.

Beside the operator itself, the attention mask counts here: a token stands at the place that it has among those that the
mask shows, and sees those alone, so that prompts of different lengths may be padded on their left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from flashhead_edge.errors import ExportError
from flashhead_edge.export.graph import Ops
from flashhead_edge.export.passes.attention import COS, SIN, attention_nodes
from flashhead_edge.export.passes.lowering import remove_unused

FLOAT, HALF, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64
HIDDEN = -1e30  # added to the score of a key that is not seen: nothing is left of it, and a row that sees no key stays finite
KNOWN = 9  # inputs of the operator that are spelt out here


@dataclass(eq=False)
class Step:
    """What the layers of one step share: [B, S] new tokens at the end of [B, T]."""

    op: Ops
    shown: ir.Value  # [B, 1, 1, 1, T] bool, what the mask shows
    distance: ir.Value  # [S, T] int64, from a query back to a key
    places: ir.Value  # [B, S] int64, of the new tokens
    biases: dict[int, ir.Value] = field(default_factory=dict)
    tables: dict[str, ir.Value] = field(default_factory=dict)

    def bias(self, window: int) -> ir.Value:
        """What is added to the scores, [B, 1, 1, S, T]: 0 where a query sees a key."""
        if window not in self.biases:
            op = self.op
            seen = op.GreaterOrEqual(self.distance, op.const(0, np.int64))
            if window > 0:
                seen = op.And(seen, op.Less(self.distance, op.const(window, np.int64)))
            self.biases[window] = op.Where(op.And(self.shown, seen), op.const(0.0), op.const(HIDDEN))
        return self.biases[window]

    def table(self, cache: ir.Value) -> ir.Value:
        """The rows of a table of cosines or sines at the new tokens' places, [B, 1, S, R / 2]."""
        name = str(cache.name)
        if name not in self.tables:
            self.tables[name] = self.op.Unsqueeze(self.op.Gather(cache, self.places, axis=0), self.op.ints(1))
        return self.tables[name]


def _step(graph: ir.Graph) -> Step:
    inputs = {str(v.name): v for v in graph.inputs}
    mask, op = inputs["attention_mask"], Ops()
    total = op.Shape(mask, start=1, end=2)
    past = op.Sub(total, op.Shape(inputs["input_ids"], start=1, end=2))
    all_places = op.Sub(op.CumSum(mask, op.const(1, np.int64)), op.const(1, np.int64))
    places = op.Max(op.Slice(all_places, past, total, op.ints(1)), op.const(0, np.int64))
    keys = op.Range(op.const(0, np.int64), op.Squeeze(total, op.ints(0)), op.const(1, np.int64))
    queries = op.Slice(keys, past, total, op.ints(0))
    distance = op.Sub(op.Unsqueeze(queries, op.ints(1)), op.Unsqueeze(keys, op.ints(0)))
    shown = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), op.ints(1, 2, 3))
    return Step(op, shown, distance, places)


def spell_out_attention(model: ir.Model, *, half: bool = False) -> None:
    """Put ai.onnx in the place of every GroupQueryAttention.

    Args:
        half: keys, values and products in float16, scores between them in float32.
    Raises:
        ExportError: an attention operator with something that is not spelt out here.
    """
    graph, nodes = model.graph, attention_nodes(model)
    if not nodes:
        return
    step = _step(graph)
    for node in nodes:
        _check(node)
        op = Ops()
        out, keys, values = _attend(op, node, step, half)
        op.rename(str(node.name))
        if half:
            for old in node.outputs[1:]:
                old.type = ir.TensorType(HALF)
        ir.convenience.replace_nodes_and_values(graph, node, [node], op.nodes, node.outputs, [out, keys, values])
    step.op.rename("attention_step")
    graph.insert_before(graph[0], step.op.nodes)
    graph.sort()
    if half:
        for value in graph.inputs:
            if str(value.name).startswith("past_key_values."):
                value.type = ir.TensorType(HALF)
    remove_unused(model)


def _check(node: ir.Node) -> None:
    more = [i for i, value in enumerate(node.inputs) if i >= KNOWN and value is not None]
    flags = [name for name in ("rotary_interleaved", "smooth_softmax", "sliding_window_cache") if node.attributes.get_int(name, 0) > 0]
    if more or flags:
        found = ", ".join([*flags, *(f"input {i}" for i in more)])
        raise ExportError(f"{node.name}: attention with {found}, expected plain, windowed or capped scores; use the onnxruntime dialect")


def _attend(op: Ops, node: ir.Node, step: Step, half: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """One layer: what attention gives [B, S, H * D], and all keys and values [B, KV, T, D]."""
    at = node.attributes
    heads, kv = at.get_int("num_heads"), at.get_int("kv_num_heads")
    query, key, value, past_keys, past_values = node.inputs[:5]
    assert query is not None and past_keys is not None and past_values is not None and past_keys.shape is not None
    width = int(past_keys.shape[3])  # type: ignore[arg-type]
    if key is None:
        sizes = op.ints(heads * width, kv * width, kv * width)
        query, key, value = op.Split(query, sizes, axis=-1, _outputs=3)

    def by_head(x: ir.Value | None, n: int) -> ir.Value:
        return op.Transpose(op.Reshape(x, op.ints(0, 0, n, width)), perm=[0, 2, 1, 3])  # type: ignore[no-any-return]

    q, k, v = by_head(query, heads), by_head(key, kv), by_head(value, kv)
    if at.get_int("do_rotary", 0):
        cos, sin = node.inputs[COS], node.inputs[SIN]
        assert cos is not None and sin is not None
        turned = _rotary_width(cos)
        q, k = (_turn(op, x, step.table(cos), step.table(sin), turned, width) for x in (q, k))
    if half:
        q, k, v = (op.Cast(x, to=HALF) for x in (q, k, v))
    keys, values = op.Concat(past_keys, k, axis=2), op.Concat(past_values, v, axis=2)
    grouped = op.Reshape(q, op.ints(0, kv, heads // kv, -1, width))
    scores = op.MatMul(grouped, op.Unsqueeze(op.Transpose(keys, perm=[0, 1, 3, 2]), op.ints(2)))
    if half:
        scores = op.Cast(scores, to=FLOAT)
    scores = op.Mul(scores, op.const(at.get_float("scale", 0.0) or width**-0.5))
    cap = at.get_float("softcap", 0.0)
    if cap:
        scores = op.Mul(op.Tanh(op.Div(scores, op.const(cap))), op.const(cap))
    shares = op.Softmax(op.Add(scores, step.bias(at.get_int("local_window_size", -1))), axis=-1)
    if half:
        shares = op.Cast(shares, to=HALF)
    mixed = op.MatMul(shares, op.Unsqueeze(values, op.ints(2)))
    out = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), op.ints(0, 0, heads * width))
    return op.Cast(out, to=FLOAT) if half else out, keys, values


def _rotary_width(cos: ir.Value) -> int:
    """How many values of a head are turned: twice the table's width. A table chosen by its length comes from an If."""
    node = cos.producer()
    if node is not None and node.op_type == "If":
        cos = node.attributes["then_branch"].as_graph().outputs[cos.index() or 0]
    assert cos.shape is not None
    return 2 * int(cos.shape[1])  # type: ignore[arg-type]


def _turn(op: Ops, x: ir.Value, cos: ir.Value, sin: ir.Value, turned: int, width: int) -> ir.Value:
    """Turn the first `turned` values of each head [B, n, S, D]: the first half of them against the second."""
    half, rest = turned // 2, width - turned
    parts = op.Split(x, op.ints(half, half, *([rest] if rest else [])), axis=-1, _outputs=3 if rest else 2)
    a, b = parts[:2]
    return op.Concat(op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)), *parts[2:], axis=-1)  # type: ignore[no-any-return]
