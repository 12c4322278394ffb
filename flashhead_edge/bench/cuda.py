"""Time decode steps of the torch-free CUDA backend on a GPU: made models in the shapes of real ones, W4A16 with FlashHead, whole and kind by kind.

Without a checkpoint the weights are random; the head opens as many clusters as a calibrated one (export.tensorrt.made). numpy alone. A step is its CUDA
graph, replayed: what is timed is what the device does from a token to the next, launches included, the host's reading not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.cases import FEW_CODES, Case, made_index
from flashhead_edge.errors import SettingsError
from flashhead_edge.index import MOST_CANDIDATES
from flashhead_edge.progress import Progress, silent

CACHED = 512  # tokens in the cache of a timed step
CONTEXT = 1024
ROUNDS, REPLAYS = 7, 100
WARM_SECONDS = 0.2
ENDS = ("FlashHead", "Advance", "Draw")  # of a step, behind its nodes


def models() -> dict[str, tuple[Any, int, int]]:
    """The decoders that are made, with their vocabularies and the group of their codes."""
    from flashhead_edge.export.tensorrt.made import Model
    from flashhead_edge.program.nodes import GELU_TANH

    return {
        "Llama-3.2-1B": (Model(2048, 8192, 16, 32, 8, 64, False, 5e5), 128_256, 128),
        "Qwen3-1.7B": (Model(2048, 6144, 28, 16, 8, 128, True, 1e6), 151_936, 128),
        "Qwen3-0.6B": (Model(1024, 3072, 28, 16, 8, 128, True, 1e6), 151_936, 128),
        "Gemma-3-270M": (Model(640, 2048, 18, 4, 1, 256, True, 1e6, GELU_TANH, True, 512), 262_144, 128),
        "SmolLM2-135M": (Model(576, 1536, 30, 9, 3, 64, False, 1e5), 49_152, 64),
    }


def made_program(
    folder: Path, model: Any, vocab: int, device: Any, *, group: int = 128, precision: str = "float16", context: int = CONTEXT, batch: int = 1,
    layers: int | None = None, seed: int = 0,
) -> Any:  # fmt: skip
    """Write a program of random weights into a folder of its own (program.file.Program).

    Args:
        model: its sizes (export.tensorrt.made.Model).
        device: that the head is planned for (program.head.Device).
    """
    from flashhead_edge.export.tensorrt.made import ROW, record_layers, with_margins
    from flashhead_edge.program.build import Built
    from flashhead_edge.program.file import write_program
    from flashhead_edge.program.head import DRAFTED_ROWS, head_part
    from flashhead_edge.program.nodes import Decoder
    from flashhead_edge.program.weights import BLOCK_ROWS, STORED, Item, rounded

    def rows() -> Any:
        for start in range(0, vocab, BLOCK_ROWS):
            random = np.random.default_rng([seed, start])
            yield rounded(random.standard_normal((min(BLOCK_ROWS, vocab - start), model.hidden), np.float32) * np.float32(ROW), precision, "embedding")

    s = FEW_CODES
    embedding = Item("embedding", STORED[precision], (vocab, model.hidden), rows)
    decoder = Decoder(precision, context)
    record_layers(decoder, model, embedding, model.layers if layers is None else layers, group, seed)
    # The last cap is of rows that are scored exactly, among which a token is drawn: scaled with Gemma's vocabulary it would be more than a draw takes. The
    # mean, which decides a step's time, stays: a quarter of this cap there.
    caps = (*s.caps[:-1], min(s.caps[-1], MOST_CANDIDATES / vocab))
    case = Case("made", vocab, model.hidden, s.cluster_size, s.rows, s.centroids, s.mean, caps, coordinates=s.coordinates)
    head = head_part(with_margins(made_index(case, seed), s, seed), embedding, None, device, max(batch, DRAFTED_ROWS), precision)
    return write_program(folder, Built(decoder, head, context, vocab, batch, ()), device, {"made": True})


def step_microseconds(m: Any, graph: Any, rounds: int = ROUNDS, replays: int = REPLAYS) -> np.ndarray:
    """Of a graph, one figure a round."""
    return turn_times(m, {"": graph}, rounds, replays)[""]


def turn_times(m: Any, graphs: Mapping[str, Any], rounds: int = ROUNDS, replays: int = REPLAYS) -> dict[str, np.ndarray]:
    """Microseconds of a replay of each graph, one figure a round: they take turns, so that what the card does meanwhile meets all of them."""
    from flashhead_edge.jetson.driver import Timer

    found = {name: list[float]() for name in graphs}
    for graph in graphs.values():
        begun = time.perf_counter()
        while time.perf_counter() - begun < WARM_SECONDS:
            graph.launch(m.stream)
            m.stream.wait()
    with Timer() as timer:
        for _ in range(rounds):
            for name, graph in graphs.items():
                rewind(m, CACHED - REPLAYS // 2)  # each step makes the text one longer
                timer.mark(m.stream, 0)
                for _ in range(replays):
                    graph.launch(m.stream)
                timer.mark(m.stream, 1)
                found[name].append(timer.microseconds() / replays)
    return {name: np.array(times) for name, times in found.items()}


def graph_times(m: Any, put: Callable[[], None], rounds: int = ROUNDS, replays: int = REPLAYS) -> np.ndarray:
    """Microseconds of launches that stand for a step, as a graph, one figure a round; each round begins with `CACHED` tokens, in the middle of it."""
    graph = captured(m, put)
    try:
        return step_microseconds(m, graph, rounds, replays)
    finally:
        graph.close()


def captured(m: Any, put: Callable[[], None]) -> Any:
    """Launches that stand for a step, as a graph that the caller closes; they run once before."""
    rewind(m, CACHED)
    put()
    m.stream.wait()
    with m.stream.captured() as graph:
        put()
    return graph


def replay(m: Any, graph: Any, steps: int) -> int:
    """Steps behind each other, at most `REPLAYS` of a text, and the end of the last waited for: how many."""
    for first in range(0, steps, REPLAYS):
        rewind(m, CACHED - REPLAYS // 2)
        for _ in range(min(REPLAYS, steps - first)):
            graph.launch(m.stream)
    m.stream.wait()
    return steps


def rewind(m: Any, length: int) -> None:
    """All rows at a token that is the last of `length`."""
    from flashhead_edge.jetson.cuda_session import send_settings, setting

    setting(m, "ids")[:] = 1
    setting(m, "lengths")[:] = length
    setting(m, "step")[:] = 0
    send_settings(m)
    m.stream.wait()


@contextmanager
def cut_for(m: Any, rows: int) -> Iterator[None]:
    """Steps as a program for so many rows has them: a larger one cuts attention for all of its own."""
    cut, m.cut = m.cut, rows
    try:
        yield
    finally:
        m.cut = cut


def step_times(m: Any, rows: int, drawn: bool = False, without: Collection[str] = (), only: str | None = None, together: int = 1) -> np.ndarray:
    """Microseconds of a step of some rows, one figure a round.

    Args:
        without: kinds of nodes that are left out: what they cost among the others is the difference.
        only: one kind, its launches alone, one after the other.
        together: steps in one graph, whose launch they share.
    """
    from flashhead_edge.jetson.cuda_program import put_step

    left_out = [kind for kind in (*kinds(m, rows), "Draw") if kind != only] if only else without
    rewind(m, CACHED)
    with cut_for(m, rows):
        put_step(m, rows, drawn)  # what the head reads is a state that it could meet
        m.stream.wait()
        put_step(m, rows, drawn, left_out)
        m.stream.wait()
        with m.stream.captured() as graph:
            for _ in range(together):
                put_step(m, rows, drawn, left_out)
    try:
        return step_microseconds(m, graph, replays=REPLAYS // together) / together
    finally:
        graph.close()


def kinds(m: Any, rows: int) -> list[str]:
    """The kinds of nodes that a greedy step of some rows runs."""
    from flashhead_edge.jetson.cuda_program import step_nodes

    return [*dict.fromkeys(n.op for n in step_nodes(m, rows)), *ENDS[:2]]


def bench_cuda(
    work: Path,
    shapes: Sequence[str],
    batches: Sequence[int] = (1,),
    precision: str = "float16",
    overlap: bool | None = None,
    fuses: bool = True,
    context: int = CONTEXT,
    progress: Progress = silent,
    took: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Time made models.

    Args:
        work: a folder for their weights; each is removed when it has been timed.
        context: positions of the cache, for which attention's launches are cut.
        took: called with each record as soon as it is there.
        shapes: of `models()`; none is all.
    Returns:
        A record for each model and batch: microseconds of the whole step with its spread, of the step without each kind of node, of each kind alone.
    Raises:
        SettingsError: a shape is not known. DeviceError: no GPU.
    """
    import shutil

    from flashhead_edge.jetson.cuda_session import decode, open_model, step_graph
    from flashhead_edge.jetson.driver import device_facts
    from flashhead_edge.program.head import Device

    known, facts, records = models(), device_facts(), []
    if unknown := [name for name in shapes if name not in known]:
        raise SettingsError(f"bench cuda: {unknown[0]} is not known, expected one of {', '.join(known)}; name one of them")
    for name in shapes or known:
        model, vocab, group = known[name]
        progress(f"{name}: making weights", None)
        device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
        begun = time.perf_counter()
        program = made_program(work / name, model, vocab, device, group=group, precision=precision, context=context, batch=max(batches))
        making = time.perf_counter() - begun
        begun = time.perf_counter()
        m = open_model(program, overlap=overlap, fuses=fuses, progress=progress)
        try:
            opening = time.perf_counter() - begun
            for rows in batches:
                progress(f"{name}: timing {rows} rows", None)
                prompts = [[1 + row, 2, 3, 4, 5, 6, 7, 8] for row in range(rows)]
                tokens = [mail.token.tolist() for mail in decode(m, prompts, 16)]
                assert m.readied is not None and m.memory is not None
                record: dict[str, Any] = {
                    "model": name, "rows": rows, "device": facts.name, "precision": precision, "group": group, "cached": CACHED, "context": program.context,
                    "overlap": bool(m.limits.overlap), "fused": fuses, "making_seconds": making, "opening_seconds": opening, "kernels": m.readied.kernels,
                    "compiled": m.readied.compiled, "compiling_seconds": m.readied.seconds, "device_bytes": m.plan.size, "weight_bytes": m.plan.weight_bytes,
                    "cache_bytes": m.plan.cache_bytes, "virtual_memory": m.memory.virtual, "graph_nodes": step_graph(m, rows, False).nodes, "tokens": tokens,
                }  # fmt: skip
                for drawn in (False, True):
                    record["drawn" if drawn else "greedy"] = _figures(step_times(m, rows, drawn))
                record["four_a_graph"] = _figures(step_times(m, rows, together=4))
                record["without"] = {kind: _figures(step_times(m, rows, without=(kind,))) for kind in kinds(m, rows)}
                record["alone"] = {kind: _figures(step_times(m, rows, only=kind)) for kind in kinds(m, rows)}
                record["tokens_per_second"] = texts_of(m, rows)[0]
                records.append(record)
                took(record)
        finally:
            m.close()
            shutil.rmtree(work / name)
    return records


def _figures(times: np.ndarray) -> dict[str, Any]:
    return {"microseconds": round(float(np.median(times)), 2), "spread": [round(float(times.min()), 2), round(float(times.max()), 2)]}


def texts_of(m: Any, rows: int, tokens: int = 256) -> tuple[float, np.ndarray]:
    """Tokens a second of texts that are decoded together, read by the host one step behind, and the counts of their steps, [tokens - 1, rows, 2 + stages]."""
    from flashhead_edge.jetson.cuda_session import decode

    steps = decode(m, [[1 + row, 2, 3, 4, 5, 6, 7, 8] for row in range(rows)], tokens)
    next(steps)
    begun = time.perf_counter()
    counts = [mail.counts for mail in steps]
    return len(counts) * rows / (time.perf_counter() - begun), np.array(counts)
