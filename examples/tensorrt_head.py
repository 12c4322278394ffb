"""FlashHead in a TensorRT network of your own: here behind one product, in a decoder behind its last norm.

    python examples/tensorrt_head.py OUT [LIBRARY]      OUT: a folder of `flashhead export tensorrt`; a machine with TensorRT, its GPU, numpy and onnx

The plugin's fields are the attributes of the node in OUT/head.onnx. What follows `own` is all that a network needs.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import tensorrt as trt

from flashhead_edge.jetson import plugins

KINDS = {bytes: (np.int8, trt.PluginFieldType.CHAR), int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}


def fields_of(node):
    """The attributes of a node as TensorRT takes them, and their arrays: TensorRT keeps pointers to these alone."""
    arrays, found = [], []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        kind, name = KINDS[type(value[0]) if isinstance(value, list) else type(value)]
        array = np.frombuffer(value, kind) if isinstance(value, bytes) else np.atleast_1d(np.array(value, kind))
        arrays.append(array)
        if array.size:
            found.append(trt.PluginField(attribute.name, array, name))
    return trt.PluginFieldCollection(found), arrays


def head_plugin(folder, library):
    """The plugin of an export, in either of TensorRT's interfaces."""
    plugins.load_library(trt, library)
    plugins.add_folder(library, folder)
    fields, _arrays = fields_of(onnx.load(folder / "head.onnx").graph.node[0])
    registry = trt.get_plugin_registry()
    if hasattr(registry, "get_creator"):  # TensorRT 10 and later
        return registry.get_creator("FlashHead", "1", "flashhead").create_plugin("head", fields, trt.TensorRTPhase.BUILD)
    return registry.get_plugin_creator("FlashHead", "1", "flashhead").create_plugin("head", fields)


def own(network, folder, library, width):
    """A network of one product and the head: x float16 [1, width] to token."""
    x = network.add_input("x", trt.float16, (1, width))
    matrix = network.add_constant((width, width), np.eye(width, dtype=np.float16)).get_output(0)
    hidden = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, matrix, trt.MatrixOperation.NONE).get_output(0)
    plugin = head_plugin(folder, library)
    layer = network.add_plugin_v3([hidden], [], plugin) if hasattr(network, "add_plugin_v3") else network.add_plugin_v2([hidden], plugin)
    for i, name in enumerate(("token", "candidate_ids", "candidate_logits", "counts", "capped")):
        layer.get_output(i).name = name
        network.mark_output(layer.get_output(i))


def main():
    folder = Path(sys.argv[1]).resolve()
    library = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else plugins.find_library(int(trt.__version__.split(".")[0]))
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    typed = hasattr(flags, "STRONGLY_TYPED")
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED if typed else flags.EXPLICIT_BATCH))
    width = onnx.load(folder / "head.onnx").graph.input[0].type.tensor_type.shape.dim[1].dim_value
    own(network, folder, library, width)
    config = builder.create_builder_config()
    if not typed:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_tactic_sources(0)
    engine = builder.build_serialized_network(network, config)
    print(f"an engine of {engine.nbytes:,} bytes" if engine is not None else f"no engine: {plugins.last_error(library)}")


if __name__ == "__main__":
    main()
