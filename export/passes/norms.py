"""Norms as ai.onnx says them: ONNX Runtime's fused ones in plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flashhead_edge.export.graph import ORT, Ops
from flashhead_edge.export.passes.lowering import Rule


def rms_norm(op: Ops, x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last axis. RMSNormalization exists from opset 23 on only."""
    mean = op.ReduceMean(op.Mul(x, x), op.ints(-1), keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, op.const(epsilon)))), gamma)  # type: ignore[no-any-return]


def _inputs(node: ir.Node, n: int) -> list[ir.Value]:
    """The first `n` inputs, which are there."""
    found = [value for value in node.inputs[:n] if value is not None]
    assert len(found) == n, f"{node.name} has {len(found)} inputs, expected {n}"
    return found


def _sum(op: Ops, node: ir.Node, bias: int) -> ir.Value:
    """The residual: input + skip, and the bias where there is one as input number `bias`."""
    x, skip = _inputs(node, 2)
    total: ir.Value = op.Add(x, skip)
    last = node.inputs[bias] if len(node.inputs) > bias else None
    return total if last is None else op.Add(total, last)


def _residual(node: ir.Node, norm: ir.Value, total: ir.Value) -> list[ir.Value | None]:
    """The four outputs of a norm with a residual, the second and third of which nothing reads."""
    return [norm, None, None, total][: len(node.outputs)]


def simplified_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value | None]:
    """SimplifiedLayerNormalization, which ONNX Runtime keeps in the name space of ai.onnx."""
    x, gamma = _inputs(node, 2)
    return [rms_norm(op, x, gamma, node.attributes.get_float("epsilon", 1e-5))]


def skip_simplified_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value | None]:
    """SkipSimplifiedLayerNormalization: the norm of input + skip, and that sum."""
    total = _sum(op, node, 3)
    return _residual(node, rms_norm(op, total, _inputs(node, 3)[2], node.attributes.get_float("epsilon", 1e-12)), total)


def skip_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value | None]:
    """SkipLayerNormalization."""
    total = _sum(op, node, 4)
    gamma, beta = _inputs(node, 4)[2:]
    norm = op.LayerNormalization(total, gamma, beta, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-12))
    return _residual(node, norm, total)


NORMS: dict[tuple[str, str], Rule] = {
    ("", "SimplifiedLayerNormalization"): simplified_norm,
    (ORT, "SkipSimplifiedLayerNormalization"): skip_simplified_norm,
    (ORT, "SkipLayerNormalization"): skip_norm,
}
