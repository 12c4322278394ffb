"""Time decode steps of TensorRT engines on a GPU: the whole W4A16 decoder with FlashHead and with TensorRT's own dense head, and the head alone.

    flashhead bench tensorrt
    flashhead bench tensorrt --shape Llama-3.2-1B --batch 1 --json
    flashhead bench tensorrt FOLDER                        a folder of flashhead export tensorrt

Without a folder the models are made: real shapes, random weights, heads that open as many clusters as a real one. numpy and onnx, no torch,
so that it runs on a board; with a folder numpy alone. A step is a CUDA graph of the engine and of the two copies beside it; the heads take turns.
Made models always have both engines; `flashhead export engines FOLDER --dense-head` gives a folder the dense one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.energy import step_energy
from flashhead_edge.bench.provenance import commit
from flashhead_edge.bench.steps import FLASH, TEXTS, against, decoded, drawn, timed
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
HEADS = {"decoder": FLASH, "decoder_dense": "dense"}  # by engine


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
            "agreement": document["agreement"].get("top1_agreement"), "target_agreement": document["agreement"].get("target_agreement"),
            "commit": commit(), "command": command,
        }  # fmt: skip
        parts = [part for part in ("decoder", "decoder_dense") if part in document["engines"]]
        for batch in batches or BATCHES:
            if batch > b.manifest.max_batch:
                continue
            progress(f"{name}: timing, batch {batch}", None)
            head = head_times(b, batch)
            times = step_times(b, parts, batch)
            progress(f"{name}: power, batch {batch}", None)
            energy = {part: step_energy(partial(replay, b, part, batch)) for part in parts}
            texts = [texts_of(b, batch) for _ in range(TEXTS)]
            records.append(common | timed(head) | {"head": "FlashHead alone", "batch": batch, "engine_bytes": document["engines"]["head"]["bytes"]})
            for part in parts:
                engine, nodes = document["engines"][part], b.decode_graph(batch, False, part).graph.nodes
                record = common | timed(times[part]) | drawn(energy[part], batch) | {"head": HEADS[part], "batch": batch, "graph_nodes": nodes}
                record |= {"engine_bytes": engine["bytes"], "build_seconds": engine["seconds"], "peak_host_bytes": document["peak_host_bytes"]}
                if part == "decoder":
                    record |= decoded(texts, s.fixed_bytes, s.item_bytes)
                    if len(parts) == 2:
                        dense, flash, alone = (float(np.median(t)) for t in (times["decoder_dense"], times["decoder"], head))
                        record |= against(times["decoder"], times["decoder_dense"], dense - flash + alone)
                else:
                    record["bytes_per_step"] = common["dense_bytes_per_step"]
                records.append(record)
    return records


def step_times(b: Any, parts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    """Microseconds of a decode step, one figure a round, of each engine in turn."""
    from flashhead_edge.jetson.driver import Timer

    graphs = {part: b.decode_graph(batch, False, part).graph for part in parts}
    b.setting("lengths", batch)[:] = CACHED
    b.begin([1] * batch)
    found: dict[str, list[float]] = {part: [] for part in parts}
    with Timer() as timer:
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
    found = []
    with Timer() as timer:
        for round_ in range(-1, ROUNDS):
            timer.mark(b.stream, 0)
            for _ in range(REPLAYS):
                graph.launch(b.stream)
            timer.mark(b.stream, 1)
            if round_ >= 0:
                found.append(timer.microseconds() / REPLAYS / HEADS_A_GRAPH)
    return np.array(found)


def replay(b: Any, part: str, batch: int, steps: int) -> int:
    """Steps of an engine behind each other, all at the same place of their texts, and the end of the last waited for: how many."""
    graph = b.decode_graph(batch, False, part).graph
    b.setting("lengths", batch)[:] = CACHED
    b.begin([1] * batch)
    for _ in range(steps):
        graph.launch(b.stream)
    b.stream.wait()
    return steps


def texts_of(b: Any, batch: int) -> tuple[float, np.ndarray]:
    """Tokens a second of texts that are decoded together, after their first tokens, the host waiting for each, and the counts of their steps, [steps, B, n]."""
    prompts = [[1 + row, 2, 3, 4, 5, 6, 7, 8] for row in range(batch)]
    steps = iter(b.decode(prompts, TOKENS))
    next(steps)
    places, counts = b.decode_graph(batch, False).places, []
    begun = time.perf_counter()
    for _ in steps:
        counts.append(b.results(places, "counts").copy())
    return len(counts) * batch / (time.perf_counter() - begun), np.array(counts)
