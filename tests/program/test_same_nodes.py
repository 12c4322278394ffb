"""One decoder, two ways: from a checkpoint's weights, and from the graph of ONNX Runtime GenAI's exporter. The nodes are the same to the name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_heads import everything_open
from small_plugins import CONTEXT, ORIN, plugin_body, save_plugin_model

pytest.importorskip("onnxruntime_genai")

from flashhead_edge.checkpoint import read_head
from flashhead_edge.export.tensorrt.lowering import lower_body
from flashhead_edge.packed import open_weights
from flashhead_edge.program.build import Built, build_program
from flashhead_edge.program.nodes import Decoder, Node
from flashhead_edge.program.weights import Item


def built_from(model: Path) -> Built:
    weights = open_weights(model)
    return build_program(weights, weights.config, everything_open(read_head(model).weight), precision="float16", context=CONTEXT, group=64, device=ORIN)


def as_floats_are_written(node: Node) -> Node:
    """An attribute of ONNX is a float of 32 bits."""
    attributes = {name: float(np.float32(a)) if isinstance(a, float) else a for name, a in node.attributes.items()}
    return Node(node.op, node.name, node.inputs, node.outputs, attributes, node.domain)


def floats_of(item: Item) -> np.ndarray:
    return np.concatenate([np.asarray(block).reshape(-1) for block in item.blocks()]).astype(np.float32)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "smollm3", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_nodes_are_those_of_the_lowering(family: str, tmp_path: Path) -> None:
    model = save_plugin_model(tmp_path / "model", family)
    found = built_from(model).decoder
    want = Decoder("float16", CONTEXT)
    lower_body(plugin_body(model, tmp_path / "work", 64).model, found.items["embedding"], want)
    assert [as_floats_are_written(n) for n in found.nodes] == [as_floats_are_written(n) for n in want.nodes]
    assert found.widths == want.widths and found.items.keys() == want.items.keys() and found.parameters == want.parameters
    assert {name: (i.dtype, i.shape) for name, i in found.items.items()} == {name: (i.dtype, i.shape) for name, i in want.items.items()}
    assert found.constants.keys() == want.constants.keys()
    assert all(np.array_equal(found.constants[name].array, constant.array) for name, constant in want.constants.items())
    for name in want.items:
        if "norm" in name:
            assert np.array_equal(floats_of(found.items[name]), floats_of(want.items[name]))
        elif "rotations" in name:  # theirs are made in float32: some 2^-21 of an angle of up to 64
            assert np.abs(floats_of(found.items[name]) - floats_of(want.items[name])).max() <= 2.0**-15
