"""What `flashhead monitor` shows, as JSON: one document a look. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashhead_edge.jetson.board import Board, read_board
from flashhead_edge.jetson.board_telemetry import Sample, cpu_times, joules, sample, samples

FIRST_LOOK = 0.1  # seconds over which a single look measures the CPUs' load


def looks(root: str | Path = "/", interval: float = 1.0, once: bool = False) -> Iterator[dict[str, Any]]:
    """The board, again and again; once, after a tenth of a second, where `once` is asked."""
    board, energy, last = read_board(root), 0.0, None
    if once:
        before = cpu_times(root)
        time.sleep(FIRST_LOOK)
        yield look(board, sample(root, before=before), None)
        return
    for now in samples(root, interval):
        if last is not None:
            energy += joules((last, now), last.at, now.at) or 0.0
        yield look(board, now, energy if now.power is not None else None)
        last = now


def look(board: Board, now: Sample, energy: float | None) -> dict[str, Any]:
    """One look as JSON. Shares are 0 to 1, sizes bytes, clocks MHz, power watts; what cannot be read is null, and `unread` says why."""
    found = asdict(now)
    del found["at"]
    mode = board.power_mode
    return {
        "time": time.time(),
        "board": board.title,
        "l4t": board.l4t,
        "jetpack": board.jetpack,
        "power_mode": None if mode is None else mode.name or f"number {mode.number}",
        "clocks_locked": now.locked,
        "joules": energy,
        **found,
        "unread": {**board.unread, **now.unread},
    }
