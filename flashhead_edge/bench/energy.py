"""Joules of a step on this machine: the same step again and again for a second and a half, beside a record of the power."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOWS = 3  # of each its own figure: they lie apart as far as the counter's steps, ten to fifty a second, and the machine's other work put them
SECONDS = 0.5  # of a window; as long as half of it comes first, so that clocks and power are those of work
STEPS = 100  # that are run without a look at the clock


@dataclass(frozen=True)
class Energy:
    """What a step draws. `joules`, one figure a window, is empty where nothing tells it, and `unknown` says why."""

    joules: tuple[float, ...]
    scope: str | None  # what of the machine those joules are of; what it draws while it idles is in them
    unknown: str | None = None


def step_energy(run: Callable[[int], int], seconds: float = SECONDS, root: str = "/", gpu: bool = True) -> Energy:
    """What a step draws, everything that the machine or its GPU does meanwhile counted.

    Args:
        run: does so many steps or a few more, comes back when the last is done, and says how many it did.
        seconds: of a window.
        root: the file system that tells the power (jetson.board_telemetry).
        gpu: the steps are a GPU's. Of a CPU's a board's rails tell alone: NVML's counter is of the GPU beside it.
    """
    from flashhead_edge.jetson.board_telemetry import joules, recorded, sample

    first = sample(root, nvml=None if gpu else False)
    if first.power is None:
        return Energy((), None, "no rail and no NVML tells the power" if gpu else "no rail tells the power")
    _for(seconds / 2, run)
    windows = []
    with recorded(root) as taken:
        for _ in range(WINDOWS):
            start = time.monotonic()
            count = _for(seconds, run)
            windows.append((start, time.monotonic(), count))
    drawn = [(joules(taken, start, end), count) for start, end, count in windows]
    known = tuple(j / count for j, count in drawn if j is not None)
    if len(known) < WINDOWS:
        return Energy((), None, f"the power was not told from beginning to end of {windows[-1][1] - windows[0][0]:.1f} s")
    return Energy(known, first.power_scope)


def _for(seconds: float, run: Callable[[int], int]) -> int:
    """How many steps were run in so many seconds, and to the end of the last."""
    begun, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - begun < seconds:
        count += run(STEPS)
    return count
