"""Times of work on a GPU by CUDA graphs, and the bandwidth that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

REPLAYS = 200


def timed(steps: Sequence[Callable[[], object]], replays: int = REPLAYS) -> np.ndarray:
    """Microseconds of a step, one figure a replay of the graph that holds all `steps` once."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return np.array([1e3 * a.elapsed_time(b) / len(steps) for a, b in zip(marks, marks[1:])])


def copy_bandwidth() -> float:
    """Bytes read and written a second by the faster of two large copies on the device: the driver's, and an elementwise kernel's."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copies: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    return 8 * source.numel() / (min(float(np.median(timed([copy], 20))) for copy in copies) * 1e-6)
