"""Devices whose code and launch plans the GPU at hand runs: their capability, multiprocessors and shared memory, and PTX that its driver compiles.

All of them have fewer multiprocessors than an H100, so that launches which need every block at once fit. Capability 12.0's own code does not run here:
it is compiled as 9.0 without that GPU's own instructions, of which 12.0 has all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from flashhead_edge.jetson import cuda_folder, cuda_kernels, cuda_session
from flashhead_edge.jetson.driver import DeviceFacts, device_facts


@dataclass(frozen=True)
class Board:
    capability: int
    multiprocessors: int
    shared_bytes: int
    architecture: str


BOARDS = {
    "orin-nano": Board(87, 8, 163 << 10, "compute_87"),
    "agx-orin": Board(87, 16, 163 << 10, "compute_87"),
    "sm_86": Board(86, 84, 99 << 10, "compute_86"),
    "sm_89": Board(89, 76, 99 << 10, "compute_89"),
    "sm_120": Board(120, 84, 99 << 10, "compute_90"),
}


def as_board(name: str) -> None:
    """Make this process take its GPU for a board: before anything is opened, and for good."""
    board = BOARDS[name]

    def facts() -> DeviceFacts:
        return dataclasses.replace(
            device_facts(), capability=board.capability, multiprocessors=board.multiprocessors, shared_bytes=board.shared_bytes, name=f"{name}'s plan"
        )

    named: Callable[[int], str] = lambda _: board.architecture  # noqa: E731
    for module in (cuda_session, cuda_folder):
        module.device_facts = facts
    cuda_kernels.architecture_of = named
