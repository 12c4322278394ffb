"""The three dialects: how what the head's description asks for is said in operators.

The description (`head.py`) uses ai.onnx, and five things that dialects say differently: products with a coded matrix,
with blocks and with rows of it, each state's own places of a matrix, and the selection of what passes a gate.

* ``onnxruntime``: 8-bit integer products with activations in two 8-bit limbs, selections as wide as the step needs.
* ``portable``: ai.onnx only; weights dequantised in the graph, selections as wide as their caps.
* ``tensorrt``: like portable, within what TensorRT's parser takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.graph import Ops, opset

OPSET = 21  # the lowest with 4-bit integers, and the highest that ONNX Runtime 1.23 and TensorRT 10.3 read
MOST_TOPK = 3840  # TensorRT's limit on k
LIMB = 127.0  # the largest first limb
TINY = 1e-30  # a state of zeros is divided by this


class Selected(NamedTuple):
    """What passed a gate: its places among the items [N, k] int64, which of these k are real, and what else a step reports."""

    at: ir.Value | None  # None: all items, in their places
    valid: ir.Value  # [N, k] bool
    count: ir.Value  # type: ignore[assignment]  # [N] float32, items within the margin, before the cap
    capped: ir.Value  # [N] bool
    kept: ir.Value  # [N, W] bool: the same as a mask


@dataclass(frozen=True)
class Dialect:
    """A way of saying the head in operators. `W` is a matrix of whole numbers in 8 bits, or of float16."""

    name: str
    imports: dict[str, int]
    product: Callable[[Ops, ir.Value, str, np.ndarray], ir.Value]  # x [N, c], W [c, n] -> [N, n]
    block_product: Callable[[Ops, ir.Value, str, np.ndarray, ir.Value], ir.Value]  # x [N, c], W [K, c, n], at [N, P] -> [N, P, n]
    row_product: Callable[[Ops, ir.Value, str, np.ndarray, ir.Value], ir.Value]  # x [N, c], W [n, c], at [N, M] -> [N, M]
    pick: Callable[[Ops, ir.Value, ir.Value], ir.Value]  # x [N, W], at [N, k] -> [N, k]
    select: Callable[[Ops, ir.Value, ir.Value, ir.Value | None, int, int | None], Selected]  # gap, bound, valid, cap, width


def limbs(op: Ops, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x [N, c] as two 8-bit limbs: [N, 2, c] uint8 about 128, and what their sums become x by.

    With t = x LIMB / max |x| + 128.5, the first limb is t without its fraction, the second the fraction in 256ths:
    x LIMB / max |x| = (first - 128) + (second - 128) / 256 + e, e the mean 1/512 of what is cut off, give or take 1/512.
    Both come from one state alone, so that a batch changes nothing.

    Returns:
        The limbs, x's unit [N, 1], and the weights of the two limbs' sums [2, 1].
    """
    most = op.Max(op.ReduceMax(op.Abs(x), op.ints(1), keepdims=1), op.const(TINY))
    unit = op.Mul(most, op.const(1 / LIMB))
    t = op.Add(op.Div(x, unit), op.const(128.5))
    first = op.Cast(t, to=ir.DataType.UINT8)
    rest = op.Mul(op.Sub(t, op.Cast(first, to=ir.DataType.FLOAT)), op.const(256.0))
    second = op.Cast(rest, to=ir.DataType.UINT8)
    both = op.Concat(op.Unsqueeze(first, op.ints(1)), op.Unsqueeze(second, op.ints(1)), axis=1)
    return both, unit, op.const([[1.0], [1 / 256]])


def integer_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray) -> ir.Value:
    """x @ W by MatMulInteger, which keeps W in 8 bits and reads it once for both limbs."""
    if whole.dtype == np.float16:
        return op.MatMul(x, op.Cast(op.weight(name, whole), to=ir.DataType.FLOAT))
    both, unit, parts = limbs(op, x)
    sums = op.MatMulInteger(both, op.weight(name, _unsigned(whole)), op.const(128, np.uint8), op.const(128, np.uint8))
    return op.Mul(op.ReduceSum(op.Mul(op.Cast(sums, to=ir.DataType.FLOAT), parts), op.ints(1), keepdims=0), unit)


def integer_block_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray, at: ir.Value) -> ir.Value:
    """The same for a block W[k] of each place: columns before rows, so that nothing is transposed."""
    if whole.dtype == np.float16:
        return float_block_product(op, x, name, whole, at)
    both, unit, parts = limbs(op, x)
    blocks = op.Gather(op.weight(name, _unsigned(whole)), at, axis=0)
    sums = op.MatMulInteger(op.Unsqueeze(both, op.ints(1)), blocks, op.const(128, np.uint8), op.const(128, np.uint8))
    wide = op.ReduceSum(op.Mul(op.Cast(sums, to=ir.DataType.FLOAT), parts), op.ints(2), keepdims=0)
    return op.Mul(wide, op.Unsqueeze(unit, op.ints(2)))


def float_row_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray, at: ir.Value) -> ir.Value:
    """Rows of W, made floats, times x: for few rows as fast as integers, and without a second rounding of x."""
    rows = op.Cast(op.Gather(op.weight(name, whole), at, axis=0), to=ir.DataType.FLOAT)
    return op.Squeeze(op.MatMul(rows, op.Unsqueeze(x, op.ints(2))), op.ints(2))


def _unsigned(whole: np.ndarray) -> np.ndarray:
    """Around 128: signed 8-bit weights saturate in the 16-bit sums of x86 processors without VNNI."""
    return (whole.astype(np.int16) + 128).astype(np.uint8)


def dynamic_select(op: Ops, gap: ir.Value, bound: ir.Value, valid: ir.Value | None, cap: int, width: int | None) -> Selected:
    """Gather what passes: for one state under its cap by compressing, else by TopK as wide as the widest state's choice."""
    passed = op.LessOrEqual(gap, bound)
    if valid is not None:
        passed = op.And(passed, valid)
    count = op.ReduceSum(op.Cast(passed, to=ir.DataType.FLOAT), op.ints(1), keepdims=0)
    capped = op.Greater(count, op.const(float(cap)))
    most = op.ReduceMax(count, op.ints(0), keepdims=0)
    rows = op.Shape(gap, start=0, end=1)
    single = op.And(
        op.Equal(op.Squeeze(rows, op.ints(0)), op.const(1, np.int64)), op.And(op.Not(op.Greater(most, op.const(float(cap)))), op.Greater(most, op.const(0.0)))
    )

    one = Ops()
    flat = one.Reshape(passed, one.ints(-1))
    every = one.Range(one.const(0, np.int64), one.Squeeze(one.Shape(flat), one.ints(0)), one.const(1, np.int64))
    one_out = [
        one.Unsqueeze(one.Compress(every, flat, axis=0), one.ints(0)),
        one.Unsqueeze(one.Compress(flat, flat, axis=0), one.ints(0)),
        one.Identity(passed),
    ]

    many = Ops()
    k = many.Reshape(many.Cast(many.Max(many.Min(most, many.const(float(cap))), many.const(1.0)), to=ir.DataType.INT64), many.ints(1))
    inside = many.Where(passed, gap, many.const(np.inf))
    _, at = many.TopK(inside, k, _outputs=2, largest=0, sorted=1)
    real = many.GatherElements(passed, at, axis=1)
    none = many.Expand(many.const(False, np.bool_), many.Shape(gap))
    many_out = [at, real, many.ScatterElements(none, at, real, axis=1)]

    def branch(part: Ops, outputs: list[ir.Value], name: str) -> ir.Graph:
        part.rename(f"{name}_{len(op.nodes)}")
        return ir.Graph([], outputs, nodes=part.nodes, name=name)

    at_, valid_, kept = op.If(single, _outputs=3, then_branch=branch(one, one_out, "one_state"), else_branch=branch(many, many_out, "capped_or_many"))
    return Selected(at_, valid_, count, capped, kept)


def pick_elements(op: Ops, x: ir.Value, at: ir.Value) -> ir.Value:
    """Of each state its own places."""
    return op.GatherElements(x, at, axis=1)  # type: ignore[no-any-return]


def pick_by_row(op: Ops, x: ir.Value, at: ir.Value) -> ir.Value:
    """The same by GatherND: onnx's own evaluator cannot gather elements among more than 64."""
    return op.GatherND(x, op.Unsqueeze(at, op.ints(2)), batch_dims=1)  # type: ignore[no-any-return]


def float_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray) -> ir.Value:
    """x @ W with W dequantised in the graph."""
    matrix = op.weight(name, whole)
    return op.MatMul(x, op.DequantizeLinear(matrix, op.const(1.0)) if whole.dtype == np.int8 else op.Cast(matrix, to=ir.DataType.FLOAT))  # type: ignore[no-any-return]


def float_block_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray, at: ir.Value) -> ir.Value:
    """The same for a block W[k] of each place; gathered weights are float16, since TensorRT gathers none in 8 bits."""
    blocks = _gathered(op, name, whole, at)
    return op.Squeeze(op.MatMul(op.Unsqueeze(x, op.ints(1, 2)), blocks), op.ints(2))  # type: ignore[no-any-return]


def half_row_product(op: Ops, x: ir.Value, name: str, whole: np.ndarray, at: ir.Value) -> ir.Value:
    """Rows of W, gathered in float16, times x."""
    return op.Squeeze(op.MatMul(_gathered(op, name, whole, at), op.Unsqueeze(x, op.ints(2))), op.ints(2))  # type: ignore[no-any-return]


def _gathered(op: Ops, name: str, whole: np.ndarray, at: ir.Value) -> ir.Value:
    return op.Cast(op.Gather(op.weight(name, whole.astype(np.float16)), at, axis=0), to=ir.DataType.FLOAT)  # type: ignore[no-any-return]


def static_width(cap: int, width: int) -> int:
    """Items that stay of `width` where widths are fixed: the cap, or all where no TopK can cut them."""
    return width if cap > MOST_TOPK else min(cap, width)


def static_select(op: Ops, gap: ir.Value, bound: ir.Value, valid: ir.Value | None, cap: int, width: int | None) -> Selected:
    """The `cap` smallest gaps; where TensorRT has no TopK so wide, all items stay, under a mask.

    Where such a cap binds, the mask lets through what the cap would cut off; that it binds is reported as elsewhere.
    """
    passed = op.LessOrEqual(gap, bound)
    if valid is not None:
        passed = op.And(passed, valid)
    count = op.ReduceSum(op.Cast(passed, to=ir.DataType.FLOAT), op.ints(1), keepdims=0)
    capped = op.Greater(count, op.const(float(cap)))
    assert width is not None
    if static_width(cap, width) == width:
        return Selected(None, passed, count, capped, passed)
    inside = op.Where(passed, gap, op.const(np.float32(3e38)))
    _, at = op.TopK(inside, op.ints(cap), _outputs=2, largest=0, sorted=1)
    real = pick_by_row(op, passed, at)
    none = op.And(passed, op.const(False, np.bool_))
    return Selected(at, real, count, capped, op.ScatterElements(none, at, real, axis=1))


DIALECTS = {
    "onnxruntime": Dialect("onnxruntime", opset(OPSET), integer_product, integer_block_product, float_row_product, pick_elements, dynamic_select),
    "portable": Dialect("portable", opset(OPSET), float_product, float_block_product, half_row_product, pick_by_row, static_select),
    "tensorrt": Dialect("tensorrt", opset(OPSET), float_product, float_block_product, half_row_product, pick_by_row, static_select),
}
