"""Tiny models in shapes that the CUDA kernels take (heads of 64, inputs in multiples of 64), their bodies, and their folders for TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import small_bodies
import torch
from small_bodies import BODIES, save_body, warm_builder
from small_heads import everything_open

from flashhead_edge.checkpoint import open_source, read_head
from flashhead_edge.export.body import Body, build_body
from flashhead_edge.export.passes.embedding import embedding_tensor
from flashhead_edge.export.tensorrt.folder import write_parts
from flashhead_edge.export.tensorrt.lowering import lower_body
from flashhead_edge.program.head import Device, head_part
from flashhead_edge.program.nodes import Decoder
from flashhead_edge.program.weights import float_item, rounded, widened
from flashhead_edge.reference import TorchHead, torch_head

ORIN = Device(16, 99 << 10, 87)
CONTEXT = 64
REFUSED = ("gemma2", "phi")  # scores with a cap; norms, positions and products of other kinds


@contextmanager
def kernel_sizes(head_dim: int, /, **changes: Any) -> Iterator[None]:
    """Inside, the families of `small_bodies` have sizes with kernels."""
    long = {f"{name}_factor": [1.0 + step * i for i in range(32)] for name, step in (("short", 0.05), ("long", 0.3))}
    with pytest.MonkeyPatch.context() as patch:
        for settings, values in (
            (small_bodies.SIZES, {"hidden_size": 256, "intermediate_size": 192} | changes),
            (small_bodies.WIDE, {"head_dim": head_dim}),
            (small_bodies.GEMMA, {"head_dim": head_dim, "query_pre_attn_scalar": head_dim}),
            (small_bodies.LONG, long),
        ):
            for key, value in values.items():
                patch.setitem(settings, key, value)
        yield


def save_plugin_model(folder: Path, family: str, head_dim: int = 64, **changes: Any) -> Path:
    if head_dim != 64 and family.startswith("llama"):  # others say it by themselves, or take it from the hidden size
        changes["head_dim"] = head_dim
    with kernel_sizes(head_dim, **changes):
        return save_body(folder, family)


def plugin_body(model: Path, work: Path, group: int = 32) -> Body:
    work.mkdir()
    with warm_builder():
        return build_body(model, work, precision="int4", group=group)


def prepare(model: ir.Model, precision: str) -> None:
    """Make a body that ONNX Runtime and the plugins compute alike but for the order of sums: floats that the file of weights holds exactly, and
    activations that are not rounded to 8 bits.

    Scales become a quarter of what they are, so that attention does not multiply every difference: random weights of a spread of 0.3 make scores
    of many tens. Norms about 1 are 1 + a rounded number, as Gemma's are.
    """

    def nearest(x: np.ndarray) -> np.ndarray:
        return widened(rounded(x, precision, "test"), precision)

    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT and "_cache" not in name:
            array = value.const_value.numpy() * (0.25 if "scales" in name else 1)
            value.const_value = ir.tensor(1 + nearest(array - 1) if "norm" in name and precision == "bfloat16" else nearest(array), name=name)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))


def write_plugins(body: Body, model: Path, out: Path, *, precision: str = "float16", context: int = CONTEXT, batch: int = 2, **options: Any) -> TorchHead:
    """The folder of a body, with a head that leaves nothing out: that head as the reference has it."""
    source = open_source(model)
    head = read_head(source)
    rows, tied = embedding_tensor(source)
    embedding = float_item("embedding", rows.numpy, tuple(rows.shape.numpy()), precision)
    weight = head.weight.float().numpy()
    exact = embedding if tied else float_item("head.rows", lambda: weight, weight.shape, precision)
    decoder = Decoder(precision, context)
    lower_body(body.model, embedding, decoder)
    stored = torch.from_numpy(widened(rounded(weight, precision, "rows"), precision))  # what the plugin multiplies with
    index = everything_open(stored, vocab_size=head.vocab_size, fingerprint=head.fingerprint)
    part = head_part(index, exact, None, ORIN, batch, precision, head.scale, head.softcap)
    out.mkdir()
    write_parts(out, out, decoder, part, context_length=256, embedding_rows=embedding.shape[0], agreement={}, **options)
    return torch_head(index, stored)


FAMILIES = [family for family in BODIES if family not in REFUSED]
