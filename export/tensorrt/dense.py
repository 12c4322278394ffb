"""The decoder with TensorRT's own dense head, made of a folder's decoder, where it was exported without: what ours is compared with. The onnx package alone."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from flashhead_edge.errors import ExportError
from flashhead_edge.export.tensorrt.graph import initializers_of, node_of
from flashhead_edge.program.head import SAMPLING, dense_nodes
from flashhead_edge.program.nodes import External, Stored

DECODER, DENSE = "decoder", "decoder_dense"
RESULTS = ("candidate_ids", "candidate_logits", "counts", "capped", "logprob")  # of our head, which a dense one does not give


def add_dense_head(folder: Path) -> None:
    """Write decoder_dense.onnx beside a folder's decoder.onnx: the same nodes, with a product over the rows that our head's node names.

    Raises:
        ExportError: the decoder does not end in our head.
    """
    model = onnx.load(folder / f"{DECODER}.onnx", load_external_data=False)
    graph = model.graph
    heads = [n for n in graph.node if n.op_type == "FlashHead"]
    if len(heads) != 1:
        raise ExportError(f"{folder / DECODER}.onnx: {len(heads)} nodes FlashHead, expected one at its end; export again with --dense-head")
    said = {a.name: helper.get_attribute_value(a) for a in heads[0].attribute}
    precision = "bfloat16" if said["bf16"] else "float16"
    places = {name: _place(said[name]) for name in ("rows", "bias") if said.get(name)}
    rows = External(precision, (places["rows"][1] // (2 * said["hidden"]), said["hidden"]), Stored("rows"))
    bias = External(precision, (places["bias"][1] // 2,), Stored("bias")) if "bias" in places else None
    nodes, constants = dense_nodes(rows, bias, said["vocab"])
    graph.node.remove(heads[0])
    graph.node.extend(node_of(n) for n in nodes)
    graph.initializer.extend(initializers_of(constants, places))
    for values, gone in ((graph.input, {name for name, _, _ in SAMPLING}), (graph.output, set(RESULTS))):
        for value in [v for v in values if v.name in gone]:
            values.remove(value)
    graph.name = DENSE
    for prop in model.metadata_props:
        if prop.key == "flashhead.part":
            prop.value = DENSE
    (folder / f"{DENSE}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _place(text: bytes) -> tuple[int, int]:
    """Offset and length in the file of weights, as a node has them."""
    offset, length = map(int, text.split())
    return offset, length
