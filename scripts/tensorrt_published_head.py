"""Time the published head in TensorRT's own operators, which the head's plugin is compared with: python scripts/tensorrt_published_head.py [VOCAB HIDDEN]

Random weights in the shape of a head, Llama-3.2-1B's where none is given: product with the centroids, the best clusters, their rows, product, the best of
all; clusters of 16 rows, 256 of them probed. Built for half precision at the default level, run in a CUDA graph of 20 steps. Prints one line.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import tensorrt as trt

from flashhead_edge.jetson.driver import Device, Memory, Stream, Timer, device_facts
from flashhead_edge.jetson.tensorrt_engine import Engine, Runtime

ROWS, PROBED = 16, 256
STEPS, ROUNDS, REPLAYS = 20, 7, 100


def network_of(builder: Any, vocab: int, hidden: int) -> tuple[Any, list[np.ndarray]]:
    """The network, and the weights that must outlive its build."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH if typed is None else typed))
    random, clusters = np.random.default_rng(0), -(-vocab // ROWS)
    weights = [
        random.standard_normal((hidden, clusters), np.float32).astype(np.float16),
        np.tile(random.standard_normal((1, ROWS, hidden), np.float32).astype(np.float16), (clusters, 1, 1)),
    ]
    centroids, rows = (network.add_constant(w.shape, trt.Weights(w)).get_output(0) for w in weights)
    none, transposed, most = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE, trt.TopKOperation.MAX
    state = network.add_input("state", trt.DataType.HALF, (1, hidden))
    scores = network.add_matrix_multiply(state, none, centroids, none).get_output(0)
    probed = network.add_topk(scores, most, PROBED, 2).get_output(1)
    picked = network.add_shuffle(network.add_gather(rows, probed, 0).get_output(0))
    picked.reshape_dims = (PROBED * ROWS, hidden)
    logits = network.add_matrix_multiply(state, none, picked.get_output(0), transposed).get_output(0)
    best = network.add_topk(logits, most, 1, 2).get_output(1)
    for name, tensor in (("clusters", probed), ("best", best)):
        tensor.name = name
        network.mark_output(tensor)
    return network, weights


def main(vocab: int, hidden: int) -> None:
    device, runtime = Device(), Runtime(trt)
    builder = trt.Builder(runtime.logger)
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    config.set_tactic_sources(0)
    network, weights = network_of(builder, vocab, hidden)
    begun = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    took = time.monotonic() - begun
    assert plan is not None, runtime.why()
    del weights
    engine = Engine(runtime, "published", runtime.runtime.deserialize_cuda_engine(plan))
    stream = Stream()
    context = engine.context(0, stream, runtime.why)
    memory = {name: Memory(4 * max(hidden, PROBED)) for name in engine.tensors}
    state = np.random.default_rng(1).standard_normal(hidden).astype(np.float16)
    stream.to_device(memory["state"].pointer, state.ctypes.data, state.nbytes)
    context.bind({name: m.pointer for name, m in memory.items()}, {})
    context.run(stream, runtime.why)
    stream.wait()
    with stream.captured() as graph:
        for _ in range(STEPS):
            context.run(stream, runtime.why)
    found = []
    with Timer() as timer:
        for round_ in range(-1, ROUNDS):
            timer.mark(stream, 0)
            for _ in range(REPLAYS):
                graph.launch(stream)
            timer.mark(stream, 1)
            if round_ >= 0:
                found.append(timer.microseconds() / REPLAYS / STEPS)
    facts = device_facts()
    print(
        f"published head in plain operators, [{vocab}, {hidden}], TensorRT {trt.__version__}, {facts.name}: {np.median(found):.1f} us "
        f"({min(found):.1f} to {max(found):.1f}), {graph.nodes // STEPS} graph nodes, engine {plan.nbytes / 1e6:.0f} MB, built in {took:.1f} s"
    )
    device.close()


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (128256, 2048)))
