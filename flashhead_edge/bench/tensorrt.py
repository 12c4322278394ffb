"""Time decode steps of TensorRT engines on a GPU: the whole W4A16 decoder with FlashHead and with TensorRT's own dense head, and the head alone.

    flashhead bench tensorrt
    flashhead bench tensorrt --shape Llama-3.2-1B --batch 1 --json
    flashhead bench tensorrt FOLDER                        a folder of flashhead export tensorrt

Without a folder the models are made: real shapes, random weights, heads that open as many clusters as a real one. numpy and onnx, no torch,
so that it runs on a board; with a folder numpy alone. A step is a CUDA graph of the engine and of the two copies beside it; the heads take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.provenance import commit
from flashhead_edge.costs import dense_bytes
from flashhead_edge.errors import SettingsError
from flashhead_edge.progress import Progress, silent

SHAPES = ("Llama-3.2-1B", "Qwen3-0.6B")
BATCHES = (1, 4, 16)
ROUNDS, REPLAYS = 7, 100  # the heads take turns ROUNDS times, each with so many launches
WARM_SECONDS = 0.2
CACHED = 512  # tokens in the cache of a timed step
HEADS_A_GRAPH = 20  # steps of the head alone in one graph: its launch is shared among them
TOKENS = 128  # of a run that gives tokens a second


def bench_tensorrt(
    folder: Path | None, shapes: Sequence[str], batches: Sequence[int], command: str, progress: Progress = silent, *, plugin: Path | None = None
) -> dict[str, Any]:
    """Time a folder's engines, or those of made models.

    Args:
        shapes: of made models, none is `SHAPES`.
        batches: rows of a step, none is `BATCHES`, as far as the engine has them.
    Returns:
        One JSON document: `records`.
    Raises:
        SettingsError: a shape is not known. DeviceError: no GPU. EngineError: no TensorRT or no plugin library.
    """
    from flashhead_edge.jetson.driver import device_facts

    if folder is not None:
        device_facts()
        return {"records": _measured(folder, batches, command, progress, plugin)}
    from flashhead_edge.export.tensorrt import build_engines
    from flashhead_edge.export.tensorrt.engines import Build
    from flashhead_edge.export.tensorrt.made import MODELS, made_folder
    from flashhead_edge.program.head import Device

    for name in shapes:
        if name not in MODELS:
            raise SettingsError(f"bench tensorrt: {name} is not known, expected one of {', '.join(MODELS)}; name one of them")
    facts = device_facts()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="flashhead-bench-") as work:
        for name in shapes or SHAPES:
            device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
            path = made_folder(Path(work) / name, name, device, batch=max(batches or BATCHES), dense_head=True, progress=progress)
            build_engines(path, build=Build(plugin=plugin), progress=progress)
            records += _measured(path, batches, command, progress, plugin)
    return {"records": records}


def _measured(folder: Path, batches: Sequence[int], command: str, progress: Progress, plugin: Path | None) -> list[dict[str, Any]]:
    """The records of one folder."""
    from flashhead_edge.jetson.tensorrt_backend import open_folder

    records: list[dict[str, Any]] = []
    with open_folder(folder, plugin) as b:
        s, document = b.settings, b.manifest.document
        name = document.get("made") or folder.resolve().name
        common = {
            "model": name, "shape": [s.vocab_size, s.hidden_size], "real_weights": "made" not in document, "context": CACHED, "backend": "tensorrt",
            "backend_version": str(b.runtime.trt.__version__), "device": b.facts.name, "body": "w4a16", "group": document["group"],
            "precision": b.manifest.precision, "layers": b.manifest.layers, "dense_bytes_per_step": dense_bytes(s.vocab_size, s.hidden_size),
            "agreement": document["agreement"].get("top1_agreement"), "commit": commit(), "command": command,
        }  # fmt: skip
        parts = [part for part in ("decoder", "decoder_dense") if part in document["engines"]]
        for batch in batches or BATCHES:
            if batch > b.manifest.max_batch:
                continue
            progress(f"{name}: timing, batch {batch}", None)
            head = head_times(b, batch)
            times = step_times(b, parts, batch)
            rate = tokens_a_second(b, batch)
            records.append(common | _figures(head) | {"head": "FlashHead alone", "batch": batch, "engine_bytes": document["engines"]["head"]["bytes"]})
            for part in parts:
                engine, nodes = document["engines"][part], b.decode_graph(batch, False, part).graph.nodes
                record = common | _figures(times[part]) | {"head": "FlashHead" if part == "decoder" else "dense", "batch": batch, "graph_nodes": nodes}
                record |= {"engine_bytes": engine["bytes"], "build_seconds": engine["seconds"], "peak_host_bytes": document["peak_host_bytes"]}
                if part == "decoder":
                    record["tokens_per_second"] = rate
                records.append(record)
            if len(parts) == 2:
                flash, dense, alone = (float(np.median(t)) for t in (times["decoder"], times["decoder_dense"], head))
                records[-2] |= {
                    "ratio_to_dense": dense / flash, "dense_head_microseconds": dense - flash + alone,
                    "share_of_head_gone": (dense - flash) / (dense - flash + alone),
                }  # fmt: skip
    return records


def _figures(times: np.ndarray) -> dict[str, Any]:
    return {"microseconds": float(np.median(times)), "spread": [float(times.min()), float(times.max())]}


def step_times(b: Any, parts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    """Microseconds of a decode step, one figure a round, of each engine in turn."""
    from flashhead_edge.jetson.driver import Timer

    graphs = {part: b.decode_graph(batch, False, part).graph for part in parts}
    b.setting("lengths", batch)[:] = CACHED
    b.begin([1] * batch)
    found: dict[str, list[float]] = {part: [] for part in parts}
    timer = Timer()
    for round_ in range(-1, ROUNDS):
        for part, graph in graphs.items():
            begun = time.perf_counter()
            while round_ < 0 and time.perf_counter() - begun < WARM_SECONDS:
                graph.launch(b.stream)
                b.stream.wait()
            timer.mark(b.stream, 0)
            for _ in range(REPLAYS):
                graph.launch(b.stream)
            timer.mark(b.stream, 1)
            if round_ >= 0:
                found[part].append(timer.microseconds() / REPLAYS)
    return {part: np.array(values) for part, values in found.items()}


def head_times(b: Any, batch: int) -> np.ndarray:
    """Microseconds of the head's own engine, one figure a round: many steps in a graph, so that a graph's launch does not count."""
    from flashhead_edge.jetson.driver import Timer

    d = b.settings.hidden_size
    states = np.random.default_rng(0).standard_normal((batch, d)).astype(np.float32)
    b.head.step(states)  # binds its tensors
    context = b.context("head")
    with b.stream.captured() as graph:
        for _ in range(HEADS_A_GRAPH):
            context.run(b.stream, b.why)
    timer, found = Timer(), []
    for round_ in range(-1, ROUNDS):
        timer.mark(b.stream, 0)
        for _ in range(REPLAYS):
            graph.launch(b.stream)
        timer.mark(b.stream, 1)
        if round_ >= 0:
            found.append(timer.microseconds() / REPLAYS / HEADS_A_GRAPH)
    return np.array(found)


def tokens_a_second(b: Any, batch: int) -> float:
    """Of texts that are decoded together, after their first tokens; the host waits for each."""
    prompts = [[1 + row, 2, 3, 4, 5, 6, 7, 8] for row in range(batch)]
    steps = iter(b.decode(prompts, TOKENS))
    next(steps)
    begun = time.perf_counter()
    count = sum(1 for _ in steps)
    return count * batch / (time.perf_counter() - begun)
