"""Joules of a step on this machine: the same step again and again for a second, beside a record of the power."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 1.0  # NVML's counter moves some ten times in it, a rail is read five times: either end is off by a tenth at most
WARM = 0.25  # of those seconds come first, so that clocks and power are those of work
STEPS = 100  # that are run without a look at the clock


@dataclass(frozen=True)
class Energy:
    """What a step draws. `joules` is None where nothing tells it, and `unknown` says why."""

    joules: float | None
    scope: str | None  # what of the machine those joules are of; what it draws while it idles is in them
    unknown: str | None = None


def step_energy(run: Callable[[int], int], seconds: float = SECONDS, root: str = "/", gpu: bool = True) -> Energy:
    """What a step draws, everything that the machine or its GPU does meanwhile counted.

    Args:
        run: does so many steps or a few more, comes back when the last is done, and says how many it did.
        seconds: of steps that are measured.
        root: the file system that tells the power (jetson.board_telemetry).
        gpu: the steps are a GPU's. Of a CPU's a board's rails tell alone: NVML's counter is of the GPU beside it.
    """
    from flashhead_edge.jetson.board_telemetry import joules, recorded, sample

    first = sample(root, nvml=None if gpu else False)
    if first.power is None:
        return Energy(None, None, "no rail and no NVML tells the power" if gpu else "no rail tells the power")
    _for(WARM * seconds, run)
    with recorded(root) as taken:
        start = time.monotonic()
        count = _for(seconds, run)
        end = time.monotonic()
    drawn = joules(taken, start, end)
    if drawn is None:
        return Energy(None, None, f"the power was not told from beginning to end of {end - start:.1f} s")
    return Energy(drawn / count, first.power_scope)


def _for(seconds: float, run: Callable[[int], int]) -> int:
    """How many steps were run in so many seconds, and to the end of the last."""
    begun, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - begun < seconds:
        count += run(STEPS)
    return count
