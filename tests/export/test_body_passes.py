"""The passes one by one, on operators made by hand: what they write is what ONNX Runtime's fused operators compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402

from flashhead_edge.errors import ExportError  # noqa: E402
from flashhead_edge.export.graph import ORT, Ops, opset  # noqa: E402
from flashhead_edge.export.passes.attention import LayerRule, apply_layer_rules, name_cache_width  # noqa: E402
from flashhead_edge.export.passes.grouped_attention import spell_out_attention  # noqa: E402
from flashhead_edge.export.passes.lowering import lower  # noqa: E402
from flashhead_edge.export.passes.norms import NORMS  # noqa: E402
from flashhead_edge.export.passes.products import dequantised_product, half_product  # noqa: E402

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
RNG = np.random.default_rng(0)


def tensor(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape), type=ir.TensorType(ir.tensor(array).dtype))


def model_of(op: Ops, inputs: list[ir.Value], outputs: dict[str, ir.Value], initializers: list[ir.Value]) -> ir.Model:
    for name, value in outputs.items():
        value.name = name
        value.type = value.type or ir.TensorType(FLOAT)
    for node in op.nodes:
        node.name = f"made_{node.name}"
    graph = ir.Graph(inputs, list(outputs.values()), nodes=op.nodes, initializers=initializers, opset_imports=opset(21, ORT), name="made")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feed: dict[str, np.ndarray], level: str = "1") -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feed)  # type: ignore[no-any-return]


def domains(model: ir.Model) -> set[str]:
    return {node.domain for node in model.graph}


@pytest.mark.parametrize(
    ("kind", "bias"),
    [("SimplifiedLayerNormalization", False), *((k, b) for k in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization") for b in (False, True))],
)
def test_norms(kind: str, bias: bool) -> None:
    skip, plain = kind.startswith("Skip"), kind == "SkipLayerNormalization"
    x, y = (ir.val(n, dtype=FLOAT, shape=("B", "S", 24)) for n in "xy")
    gamma, beta, extra = (tensor(n, RNG.normal(size=24).astype(np.float32)) for n in ("gamma", "beta", "extra"))
    op = Ops()
    inputs = [x, *([y] if skip else []), gamma, *([beta] if plain else []), *([extra] if bias else [])]
    made = getattr(op, kind)(*inputs, _domain=ORT if skip else "", _outputs=4 if skip else 1, epsilon=1e-3)
    outputs = {"norm": made[0], "total": made[3]} if skip else {"norm": made}
    used = [v for v, there in ((gamma, True), (beta, plain), (extra, bias)) if there]
    model = model_of(op, [x, y] if skip else [x], outputs, used)
    feed = {n: RNG.normal(size=(2, 3, 24)).astype(np.float32) for n in ("xy" if skip else "x")}
    want = run(model, feed)
    lower(model, NORMS)
    assert not any(n.op_type == kind for n in model.graph)
    for a, b in zip(run(model, feed), want, strict=True):
        assert np.abs(a - b).max() < 1e-5  # float32 sums of 24 values about 3, in two orders


def attention(packed: bool, window: int, softcap: float, turned: int, heads: int = 4, kv: int = 2, width: int = 32) -> ir.Model:
    ids, mask = ir.val("input_ids", dtype=INT64, shape=("B", "S")), ir.val("attention_mask", dtype=INT64, shape=("B", "T"))
    sizes = [(heads + 2 * kv) * width] if packed else [heads * width, kv * width, kv * width]
    parts = [ir.val(f"x{i}", dtype=FLOAT, shape=("B", "S", n)) for i, n in enumerate(sizes)]
    past = [ir.val(f"past_key_values.0.{n}", dtype=FLOAT, shape=("B", kv, "P", width)) for n in ("key", "value")]
    angles = np.arange(64)[:, None] * 0.7 ** np.arange(turned // 2)
    cos, sin = tensor("cos", np.cos(angles).astype(np.float32)), tensor("sin", np.sin(angles).astype(np.float32))
    op = Ops()
    lengths = op.Cast(op.Sub(op.ReduceSum(mask, op.ints(1), keepdims=0), op.const(1, np.int64)), to=ir.DataType.INT32)
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2), op.ints(0)), to=ir.DataType.INT32)
    query = parts if not packed else [parts[0], None, None]
    settings: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv, "scale": 0.3, "softcap": softcap, "local_window_size": window}
    out, key, value = op.GroupQueryAttention(
        *query, *past, lengths, total, cos, sin, _domain=ORT, _outputs=3, do_rotary=1, rotary_interleaved=0, **settings
    )  # fmt: skip
    for v in (key, value):
        v.type = ir.TensorType(FLOAT)
        v.shape = ir.Shape(["B", kv, "T", width])
    return model_of(op, [ids, mask, *parts, *past], {"out": out, "present.0.key": key, "present.0.value": value}, [cos, sin])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("window", "softcap", "turned"), [(-1, 0.0, 32), (5, 0.0, 32), (-1, 2.0, 16), (3, 1.0, 16)])
@pytest.mark.parametrize(("new", "past"), [(9, 0), (1, 11), (4, 7)])
def test_attention(packed: bool, window: int, softcap: float, turned: int, new: int, past: int) -> None:
    model = attention(packed, window, softcap, turned)
    inputs = {v.name: v for v in model.graph.inputs}
    feed = {"input_ids": np.zeros((1, new), np.int64), "attention_mask": np.ones((1, past + new), np.int64)}
    for name, value in inputs.items():
        if name.startswith("x"):
            feed[name] = RNG.normal(size=(1, new, value.shape[2])).astype(np.float32)
        if name.startswith("past"):
            feed[name] = RNG.normal(size=(1, 2, past, 32)).astype(np.float32)
    want = run(model, {k: v for k, v in feed.items() if k != "input_ids"} | {"input_ids": feed["input_ids"]})
    spell_out_attention(model)
    assert domains(model) == {""}
    for a, b in zip(run(model, feed), want, strict=True):
        assert np.abs(a - b).max() < 2e-5  # values about 3, softmax and sums of up to 16 terms in float32


def test_attention_with_what_is_not_spelt_out_is_refused() -> None:
    model = attention(True, -1, 0.0, 16)
    node = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    node.attributes.add(ir.AttrInt64("rotary_interleaved", 1))
    with pytest.raises(ExportError, match="attention with rotary_interleaved, expected plain, windowed or capped scores; use the onnxruntime dialect"):
        spell_out_attention(model)


def test_layer_rules_set_windows_and_take_rotary_positions_away() -> None:
    model = attention(True, -1, 0.0, 16)
    apply_layer_rules(model, [LayerRule(7, False)])
    node = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    assert node.attributes.get_int("local_window_size") == 7 and node.attributes.get_int("do_rotary") == 0 and node.inputs[7] is None
    with pytest.raises(ExportError, match="1 attention operators, expected 2, one a layer"):
        apply_layer_rules(model, [LayerRule(None, True)] * 2)
    name_cache_width(model, 32)
    assert [v.shape[3] for v in model.graph.inputs if v.name.startswith("past")] == [32, 32]


def coded_product(bits: int, zeros: bool, bias: bool, n: int = 24, k: int = 48, group: int = 32) -> tuple[ir.Model, np.ndarray]:
    """A MatMulNBits whose last group is half full, and its weights [K, N]."""
    groups = -(-k // group)
    codes = RNG.integers(0, 2**bits, (n, groups * group)).astype(np.uint8)
    scales = (RNG.random((n, groups)) + 0.5).astype(np.float32)
    middle = RNG.integers(0, 2**bits, (n, groups)).astype(np.uint8) if zeros else np.full((n, groups), 2 ** (bits - 1), np.uint8)

    def pack(a: np.ndarray) -> np.ndarray:
        return a if bits == 8 else a[:, ::2] | (np.pad(a[:, 1::2], ((0, 0), (0, a.shape[1] % 2))) << 4)

    x = ir.val("x", dtype=FLOAT, shape=("S", k))
    weights = [tensor("w", pack(codes).reshape(n, groups, -1)), tensor("s", scales)]
    zero = tensor("z", pack(middle)) if zeros else None
    add = tensor("b", RNG.normal(size=n).astype(np.float32)) if bias else None
    op = Ops()
    y = op.MatMulNBits(x, *weights, zero, None, add, _domain=ORT, K=k, N=n, bits=bits, block_size=group, accuracy_level=1)
    matrix = ((codes.astype(np.float32) - np.repeat(middle, group, 1)) * np.repeat(scales, group, 1))[:, :k].T
    return model_of(op, [x], {"y": y}, [*weights, *([zero] if zero else []), *([add] if add else [])]), matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_coded_products(bits: int, zeros: bool, bias: bool) -> None:
    model, matrix = coded_product(bits, zeros, bias)
    x = RNG.normal(size=(3, 48)).astype(np.float32)
    want = x @ matrix + (model.graph.initializers["b"].const_value.numpy() if bias else 0)
    rounding = 48 * 2**-22 * (np.abs(x) @ np.abs(matrix)).max()  # of sums of 48 products
    assert np.abs(run(model, {"x": x})[0] - want).max() < rounding
    lower(model, {(ORT, "MatMulNBits"): dequantised_product(half=False, symmetric=False)})
    assert domains(model) == {""}
    assert np.abs(run(model, {"x": x})[0] - want).max() < rounding


def test_what_tensorrt_does_not_take_is_refused() -> None:
    rule = {(ORT, "MatMulNBits"): dequantised_product(half=True, symmetric=True)}
    with pytest.raises(ExportError, match="codes with zero points, expected symmetric ones, as TensorRT takes them"):
        lower(coded_product(4, True, False)[0], rule)
    with pytest.raises(ExportError, match="groups of 32 in 48 inputs, expected a divisor, as TensorRT takes it; pass a smaller --group"):
        lower(coded_product(4, False, False)[0], rule)


def test_negative_scales_of_eight_bits_go_into_the_codes() -> None:
    model, matrix = coded_product(8, False, False, k=64)
    scales = model.graph.initializers["s"].const_value.numpy()
    scales[::2] *= -1
    matrix[:, ::2] *= -1
    lower(model, {(ORT, "MatMulNBits"): dequantised_product(half=False, symmetric=True)})
    made = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    assert (made["w.scales"] > 0).all()
    got = made["w.codes"].astype(np.float32) * np.repeat(made["w.scales"], 32, 0)
    step = np.repeat(made["w.scales"], 32, 0)
    assert (np.abs(got - matrix) <= np.where(made["w.codes"] == 127, step, 0) + 1e-4).all()


@pytest.mark.parametrize("half", [False, True])
def test_sixteen_bit_products(half: bool) -> None:
    x, w = ir.val("x", dtype=FLOAT, shape=("S", 40)), tensor("w", RNG.normal(size=(40, 8)).astype(np.float32))
    op = Ops()
    model = model_of(op, [x], {"y": op.MatMul(x, w)}, [w])
    array = RNG.normal(size=(3, 40)).astype(np.float32)
    want = run(model, {"x": array})[0]
    lower(model, {("", "MatMul"): half_product(half=half)})
    made = next(v for v in model.graph.initializers.values() if v.name == "w.half")
    assert made.dtype == ir.DataType.FLOAT16
    bound = (np.abs(array) @ np.abs(w.const_value.numpy())).max() * 2**-11 * (2 if half else 1)  # weights, and states too, rounded to 11 bits
    assert np.abs(run(model, {"x": array})[0] - want).max() < bound + (2**-11 * np.abs(want).max() if half else 0)


def test_weights_beyond_sixteen_bits_are_refused() -> None:
    x, w = ir.val("x", dtype=FLOAT, shape=("S", 2)), tensor("w", np.array([[1.0], [1e6]], np.float32))
    op = Ops()
    model = model_of(op, [x], {"y": op.MatMul(x, w)}, [w])
    with pytest.raises(ExportError, match=r"w.half has values up to 1e\+06, expected at most 65504, which fp16 holds"):
        lower(model, {("", "MatMul"): half_product(half=False)})
