"""What `flashhead monitor` shows, as JSON: one document a look. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashhead_edge.jetson.board import Board, read_board
from flashhead_edge.jetson.board_server import Counts, check_address, read_counts, since
from flashhead_edge.jetson.board_telemetry import Sample, cpu_times, joules, sample, samples

FIRST_LOOK = 0.1  # seconds over which a single look measures the CPUs' load


def looks(
    root: str | Path = "/", interval: float = 1.0, once: bool = False, server: str | None = None, key: str | None = None
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The board, again and again; once, after a tenth of a second, where `once` is asked.

    Args:
        server: the address of a `flashhead serve`, whose figures are beside the board's; with `once` they are those of `interval` seconds.
        key: its API key.
    Raises:
        SettingsError: `server` is no address.
    """
    board, energy = read_board(root), 0.0
    last: Sample | None = None
    counted: Counts | None = None
    address = None if server is None else check_address(server)
    if once and address is None:
        before = cpu_times(root)
        time.sleep(FIRST_LOOK)
        yield look(board, sample(root, before=before), None)
        return
    for now in samples(root, interval):
        drawn = None if last is None else joules((last, now), last.at, now.at)
        energy += drawn or 0.0
        document = look(board, now, energy if now.power is not None else None)
        if address is not None:
            counts = read_counts(address, key, document["unread"])
            document["server"] = None if counts is None else since(counted, counts, drawn)
            counted = counts
        if not once or last is not None:
            yield document
        if once and last is not None:
            return
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
        "server": None,
        **found,
        "unread": {**board.unread, **now.unread},
    }
