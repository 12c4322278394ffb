"""From node records to an ONNX file. Needs the onnx package alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from flashhead_edge.jetson.tensorrt_folder import WEIGHTS
from flashhead_edge.program.nodes import OURS, PLAIN, Constant, External, Graph, Node, Stored
from flashhead_edge.program.weights import WeightsFile

OPSET = 17  # TensorRT 8.6 reads 13 to 22
IR_VERSION = 8
TYPES = {
    "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
}  # fmt: skip


def write_graph(path: Path, graph: Graph, weights: WeightsFile, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write a model whose weights lie in `weights`.

    Args:
        folder: where the file of weights will lie for good: what a TensorRT that knows nothing of us looks in.
    """
    model = helper.make_model(
        helper.make_graph(
            [node_of(n, weights, folder) for n in graph.nodes],
            graph.name,
            [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in graph.inputs],
            [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in graph.outputs],
            initializers_of(graph.constants, weights.places),
        ),
        opset_imports=[helper.make_opsetid(PLAIN, OPSET), helper.make_opsetid(OURS, 1)],
        ir_version=IR_VERSION,
        producer_name="flashhead-edge",
    )
    helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString(deterministic=True))


def node_of(n: Node, weights: WeightsFile | None = None, folder: Path | None = None) -> onnx.NodeProto:
    """A node as ONNX has it; `weights` and their folder are for those that read stored tensors."""
    said: dict[str, object] = {}
    reads = False
    for name, value in n.attributes.items():
        if isinstance(value, Stored):
            reads = True
            assert weights is not None
            said[name] = " ".join(map(str, weights.places[value.name])) if value.name else ""
        else:
            said[name] = list(value) if isinstance(value, tuple) else value
    if n.domain == OURS:
        said |= {"plugin_version": "1", "plugin_namespace": OURS}
        if reads and weights is not None:
            said |= {"file": WEIGHTS, "folder": str(folder), "fingerprint": weights.fingerprint}
    node = helper.make_node(n.op, n.inputs, n.outputs, name=n.name, domain=n.domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in said.items())
    return node


def initializers_of(constants: Mapping[str, Constant | External], places: Mapping[str, tuple[int, int]]) -> list[onnx.TensorProto]:
    """Constants as ONNX has them, those of the file of weights by offset and length there."""
    return [_initializer(name, c, places) for name, c in constants.items()]


def _initializer(name: str, c: Constant | External, places: Mapping[str, tuple[int, int]]) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TYPES[c.dtype])
    if isinstance(c, Constant):
        tensor.dims.extend(c.array.shape)
        tensor.raw_data = np.ascontiguousarray(c.array).tobytes()
        return tensor
    tensor.dims.extend(c.shape)
    tensor.data_location = TensorProto.EXTERNAL
    offset, length = places[c.stored.name]
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def set_folder(path: Path, folder: Path) -> None:
    """Put another folder into the nodes of a model, where its file of weights has moved."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "folder" and node.domain == OURS:
                attribute.s = str(folder).encode()
    path.unlink()  # it may have a second name in the folder that is being replaced
    path.write_bytes(model.SerializeToString(deterministic=True))
