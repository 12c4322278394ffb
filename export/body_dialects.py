"""The body in each of the three dialects: which passes make it so."""

from __future__ import annotations

import onnx_ir as ir

from flashhead_edge.errors import ExportError, SettingsError
from flashhead_edge.export.body import Body
from flashhead_edge.export.graph import ORT
from flashhead_edge.export.passes.grouped_attention import spell_out_attention
from flashhead_edge.export.passes.lowering import lower, remove_unused
from flashhead_edge.export.passes.norms import NORMS
from flashhead_edge.export.passes.products import dequantised_product, half_product


def to_dialect(body: Body, dialect: str) -> None:
    """Turn a body from `build_body` into a dialect, in place.

    * ``onnxruntime``: as it is; products of fp16 weights are made in float32.
    * ``portable``: ai.onnx alone, all arithmetic in float32.
    * ``tensorrt``: ai.onnx alone, products and the cache in float16 (unless the body is fp32), what lies between in float32.

    Raises:
        SettingsError: there is no such dialect.
        ExportError: an operator or a code that the dialect cannot say.
    """
    if dialect not in ("onnxruntime", "portable", "tensorrt"):
        raise SettingsError(f"a body in the dialect {dialect}: expected onnxruntime, portable or tensorrt; choose one of them")
    half = dialect == "tensorrt" and body.precision != "fp32"
    if half or body.precision == "fp16":
        lower(body.model, {("", "MatMul"): half_product(half=half)})
    if dialect != "onnxruntime":
        lower(body.model, NORMS | {(ORT, "MatMulNBits"): dequantised_product(half=half, symmetric=dialect == "tensorrt")})
        spell_out_attention(body.model, half=half)
        _only_standard(body.model, dialect)
    remove_unused(body.model)


def _only_standard(model: ir.Model, dialect: str) -> None:
    left = sorted({f"{n.domain}.{n.op_type}" for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain})
    if left:
        raise ExportError(f"the body still has {', '.join(left)}, expected operators of ai.onnx alone in the {dialect} dialect; use the onnxruntime dialect")
    model.graph.opset_imports.pop(ORT, None)
