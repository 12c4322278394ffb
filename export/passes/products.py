"""Products with weights: coded ones by DequantizeLinear, 16-bit storage, 16-bit arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from flashhead_edge.errors import ExportError
from flashhead_edge.export.graph import Ops
from flashhead_edge.export.passes.lowering import Rule

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST_HALF = float(np.finfo(np.float16).max)
SIGNED = {4: (ir.DataType.INT4, ml_dtypes.int4), 8: (ir.DataType.INT8, np.int8)}
UNSIGNED = {4: (ir.DataType.UINT4, ml_dtypes.uint4), 8: (ir.DataType.UINT8, np.uint8)}


@dataclass(frozen=True, eq=False)
class Coded:
    """The weights of a MatMulNBits: codes [N, groups, bytes], the first of a byte in its low bits."""

    name: str
    n: int
    k: int
    bits: int
    group: int
    codes: ir.TensorProtocol
    scales: ir.TensorProtocol  # [N, groups] float32
    zeros: ir.TensorProtocol | None  # [N, groups] packed like the codes; None: half the range

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def unpacked(self) -> np.ndarray:
        """Codes [K, N] uint8: inputs before outputs, as a product's second operand lies."""
        return np.ascontiguousarray(_fields(self.codes.numpy().reshape(self.n, -1), self.bits)[:, : self.k].T)

    def unpacked_zeros(self) -> np.ndarray:
        """Zero points [groups, N] uint8."""
        if self.zeros is None:
            return np.full((self.groups, self.n), 2 ** (self.bits - 1), np.uint8)
        return np.ascontiguousarray(_fields(self.zeros.numpy().reshape(self.n, -1), self.bits)[:, : self.groups].T)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None or bool((self.unpacked_zeros() == 2 ** (self.bits - 1)).all())


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [N, b] as codes [N, b * 8 / bits]."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


def _bytes(fields: np.ndarray, bits: int) -> np.ndarray:
    """The other way round; a last byte that is not full is filled up with 0."""
    if bits == 8:
        return fields
    even = np.pad(fields, ((0, 0), (0, fields.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4


def take_back_raised_zeros(model: ir.Model, second: bool) -> None:
    """Lower the zero points of a GPTQ checkpoint that stores them as they are (version 2): the builder raises all of them by one, as version 1 needs it.

    Args:
        second: what the checkpoint's config says. A symmetric file tells by its zeros, as in `checkpoint.quantised.dequantise_gptq`.
    """
    for node in model.graph:
        zeros = node.inputs[3] if node.op_type == "MatMulNBits" and len(node.inputs) > 3 else None
        if zeros is None or zeros.const_value is None:
            continue
        at = node.attributes
        n, bits, groups = at.get_int("N"), at.get_int("bits", 4), -(-at.get_int("K") // at.get_int("block_size"))
        stored = zeros.const_value.numpy()
        raised, half = _fields(stored.reshape(n, -1), bits)[:, :groups], 2 ** (bits - 1)
        as_they_are = bool(raised[0, 0] == half + 1) if (raised == half).all() or (raised == half + 1).all() else second
        if as_they_are:
            zeros.const_value = ir.tensor(_bytes(raised - 1 & 2**bits - 1, bits).reshape(stored.shape), name=zeros.name)


def coded_weights(node: ir.Node) -> Coded:
    """Read a MatMulNBits node.

    Raises:
        ExportError: its columns are in another order (g_idx), its zero points are floats, or it has codes of another width.
    """
    at = node.attributes
    bits = at.get_int("bits", 4)
    values = [None if v is None else v.const_value for v in node.inputs[1:5]] + [None] * 4
    codes, scales, zeros, order = values[:4]
    if codes is None or scales is None or bits not in SIGNED or order is not None or (zeros is not None and zeros.dtype != ir.DataType.UINT8):
        found = f"{bits}-bit codes" + (", columns in another order" if order is not None else "") + ("" if zeros is None else f", zero points of {zeros.dtype}")
        raise ExportError(
            f"{node.name}: {found}, expected codes of 4 or 8 bits in the order of the columns; use the onnxruntime dialect, or an unquantised checkpoint"
        )
    return Coded(node.name or "MatMulNBits", at.get_int("N"), at.get_int("K"), bits, at.get_int("block_size"), codes, scales, zeros)


def _scales(c: Coded) -> np.ndarray:
    """Scales [groups, N] float32: in 8 bits without a sign, which TensorRT's parser refuses."""
    scales = np.ascontiguousarray(c.scales.numpy().reshape(c.n, c.groups).T)
    return np.abs(scales) if c.bits == 8 and c.symmetric else scales


def _codes(c: Coded, signed: bool) -> np.ndarray:
    """Codes [K, N], about 0 where they are signed.

    In 8 bits they take over the sign that the scale leaves out; what would be 128 becomes 127, an error of one step
    in the largest weight of such a group. In 4 bits a step is an eighth of it, and the scale keeps its sign.
    """
    codes = c.unpacked()
    if not signed:
        return codes
    codes = codes.astype(np.int16) - 2 ** (c.bits - 1)
    if c.bits == 8:
        flipped = np.repeat(c.scales.numpy().reshape(c.n, c.groups).T < 0, c.group, axis=0)[: c.k]
        codes = np.minimum(np.where(flipped, -codes, codes), 127)
    return codes


def lazy(name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]) -> ir.Value:
    """An initializer whose array is made when it is written: one at a time is in memory."""
    tensor = ir.LazyTensor(lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def _declare(node: ir.Node, value: ir.Value) -> ir.Value:
    assert node.graph is not None and value.name is not None
    node.graph.initializers[value.name] = value
    return value


def _check_range(array: np.ndarray, name: str) -> None:
    """Raise ExportError where float16 cannot hold a value. Before anything is written: onnx-ir wraps what a lazy tensor raises."""
    most = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
    if most > LARGEST_HALF:
        raise ExportError(f"{name} has values up to {most:.3g}, expected at most {LARGEST_HALF:.0f}, which fp16 holds; export a body of fp32, int8 or int4")


def _product(op: Ops, x: ir.Value, w: ir.Value, half: bool) -> ir.Value:
    """x @ w, in 16 bits where w is."""
    if not half:
        return op.MatMul(x, w)  # type: ignore[no-any-return]
    return op.Cast(op.MatMul(op.Cast(x, to=HALF), w), to=FLOAT)  # type: ignore[no-any-return]


def dequantised_product(*, half: bool, symmetric: bool) -> Rule:
    """MatMulNBits as DequantizeLinear in blocks along the inputs, and MatMul.

    Args:
        half: scales and product in float16.
        symmetric: allow no zero points, and no last group that is not full.
    """

    def rule(op: Ops, node: ir.Node) -> list[ir.Value | None]:
        c = coded_weights(node)
        signed = c.symmetric
        if symmetric and not signed:
            raise ExportError(f"{c.name}: codes with zero points, expected symmetric ones, as TensorRT takes them; use the portable or the onnxruntime dialect")
        if symmetric and c.k % c.group:
            raise ExportError(f"{c.name}: groups of {c.group} in {c.k} inputs, expected a divisor, as TensorRT takes it; pass a smaller --group")
        base = str(node.inputs[1].name)  # type: ignore[union-attr]
        dtype, item = (SIGNED if signed else UNSIGNED)[c.bits]
        codes = lazy(f"{base}.codes", dtype, (c.k, c.n), lambda: _codes(c, signed).astype(item))
        number, kind = (np.float16, HALF) if half else (np.float32, FLOAT)
        scales = lazy(f"{base}.scales", kind, (c.groups, c.n), lambda: _scales(c).astype(number))
        inputs = [_declare(node, codes), _declare(node, scales)]
        if not signed:
            inputs.append(_declare(node, lazy(f"{base}.zeros", dtype, (c.groups, c.n), lambda: c.unpacked_zeros().astype(item))))
        x = node.inputs[0]
        assert x is not None
        y = _product(op, x, op.DequantizeLinear(*inputs, axis=0, block_size=c.group), half)
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        return [y if bias is None else op.Add(y, bias)]

    return rule


def half_product(*, half: bool) -> Rule:
    """MatMul with weights in float16, multiplied in 16 bits (`half`) or made float32 in the graph."""

    def rule(op: Ops, node: ir.Node) -> list[ir.Value | None]:
        x, w = node.inputs
        if x is None or w is None or w.const_value is None or w.dtype != FLOAT:
            return [op.MatMul(x, w)]
        tensor, name = w.const_value, f"{w.name}.half"
        _check_range(tensor.numpy(), name)
        small = _declare(node, lazy(name, HALF, tensor.shape.numpy(), lambda: tensor.numpy().astype(np.float16)))
        return [_product(op, x, small if half else op.Cast(small, to=FLOAT), half)]

    return rule
