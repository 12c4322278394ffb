"""Times of work on a GPU by CUDA graphs, and the bandwidth that they are compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

REPLAYS = 200
WARM_SECONDS = 0.1
LEAST_STEPS = 8  # of a graph: its own start is shared among them


def timed(steps: Sequence[Callable[[], object]], replays: int = REPLAYS, refill: Callable[[int], object] | None = None) -> np.ndarray:
    """Microseconds of a step, one figure a replay of the graph that holds all `steps` once.

    Args:
        refill: called with the number of each replay before it, its time not counted: puts other input where the steps read it.
    """
    return timed_graph(*graph_of(steps), replays, refill)


def graph_of(steps: Sequence[Callable[[], object]]) -> tuple[Any, int]:
    """A graph of all `steps`, as often as makes `LEAST_STEPS`, and how many are in it; each has run once before."""
    steps = [*steps] * math.ceil(LEAST_STEPS / len(steps))
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph, len(steps)


def timed_graph(graph: Any, steps: int, replays: int = REPLAYS, refill: Callable[[int], object] | None = None) -> np.ndarray:
    """Microseconds of one of a graph's `steps`, one figure a replay; otherwise as `timed`."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_SECONDS:  # a card that was idle runs up to a fifth slower at first
        graph.replay()
        torch.cuda.synchronize()
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(replays)]
    for i, (begin, end) in enumerate(marks):
        if refill is not None:
            refill(i)
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return np.array([1e3 * begin.elapsed_time(end) / steps for begin, end in marks])


def replayed(graph: Any, steps: int, wanted: int) -> int:
    """At least so many of a graph's `steps`, and the end of the last waited for: how many."""
    replays = math.ceil(wanted / steps)
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return replays * steps


def copy_bandwidth() -> float:
    """Bytes read and written a second by the faster of two large copies on the device: the driver's, and an elementwise kernel's."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copies: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    return 8 * source.numel() / (min(float(np.median(timed([copy], 20))) for copy in copies) * 1e-6)
