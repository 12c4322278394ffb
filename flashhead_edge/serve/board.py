"""Memory, power and temperature of the machine, where they can be read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from flashhead_edge.jetson.board_telemetry import sample
from flashhead_edge.serve.metrics import Metrics

FRESH = 0.5  # seconds


def resident_bytes() -> int | None:
    """Memory of this process, None where the system does not say."""
    path = Path("/proc/self/statm")
    try:
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def read_gauges(metrics: Metrics) -> dict[str, float | None]:
    """Read them, into the metrics too; None for what cannot be read. A look serves all who ask within FRESH."""
    looked, found = metrics.look
    if time.monotonic() - looked < FRESH:
        return found
    now = sample("/")
    hottest = max(now.temperatures.values(), default=None) if now.temperatures else None
    found = {"power": now.power, "temperature": hottest, "memory": resident_bytes()}
    for name, value in found.items():
        if value is not None:
            getattr(metrics, name).set(value)
    metrics.look = (time.monotonic(), found)
    return found


def live_figures(metrics: Metrics) -> dict[str, Any]:
    """What the page shows once a second: tokens a second, watts, degrees Celsius, bytes, texts."""
    return {"tokens_per_second": metrics.tokens_per_second(), **metrics.counts, **read_gauges(metrics)}
