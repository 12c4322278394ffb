"""Parse and build ONNX files with TensorRT-RTX, which needs no GPU for it: what a current TensorRT parser and builder accept.

    pip install tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116    # Linux x86-64, CPython 3.10 to 3.12
    python scripts/check_tensorrt_rtx.py OUT/body.onnx OUT/head.onnx

The network is strongly typed: every precision is what the file says. Exit code 1 where a file is refused.
"""

from __future__ import annotations

import sys
import time
from typing import Any

# Sizes of named dimensions in the optimization profile: least, usual, most. Consistent: past + sequence = total.
SIZES = {"batch_size": (1, 1, 2), "sequence_length": (1, 1, 64), "past_sequence_length": (0, 63, 64), "total_sequence_length": (1, 64, 128)}
OTHER = (1, 1, 8)


def build(path: str) -> Any:
    """The engine of a file.

    Raises:
        RuntimeError: the parser or the builder refused; the message is theirs.
    """
    import tensorrt_rtx_bindings as trt

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        sizes = [(size,) * 3 if size >= 0 else SIZES.get(tensor.get_dimension_name(axis) or "", OTHER) for axis, size in enumerate(tuple(tensor.shape))]
        profile.set_shape(tensor.name, *([size[level] for size in sizes] for level in range(3)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("the builder gave no engine; its log says why")
    return engine


def main(paths: list[str]) -> int:
    failed = 0
    for path in paths:
        start = time.perf_counter()
        try:
            engine = build(path)
            print(f"{path}: built in {time.perf_counter() - start:.1f} s, {engine.nbytes / 1e6:.1f} MB")
        except RuntimeError as error:
            failed += 1
            print(f"{path}: refused ({error})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
