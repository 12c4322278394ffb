"""The GPUs of the boards, by the boards' names: what must be known on another machine to write or to compile for one. Standard library only.

Sources: multiprocessors from the modules' data sheets (128 CUDA cores each), shared memory from the CUDA programming guide; none was read from a board.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashhead_edge.errors import SettingsError
from flashhead_edge.jetson.board import module_named


@dataclass(frozen=True)
class BoardGpu:
    """A board's GPU."""

    multiprocessors: int
    shared_kib: int  # that a block may have, opt-in limit
    capability: int  # 87 for 8.7
    cuda: int  # the oldest major version that its system brings


BOARD_GPUS = {
    "orin-nano-4gb": BoardGpu(4, 163, 87, 12),  # JetPack 6 has CUDA 12, JetPack 7 CUDA 13
    "orin-nano-8gb": BoardGpu(8, 163, 87, 12),
    "orin-nx-8gb": BoardGpu(8, 163, 87, 12),
    "orin-nx-16gb": BoardGpu(8, 163, 87, 12),
    "agx-orin-32gb": BoardGpu(14, 163, 87, 12),
    "agx-orin-64gb": BoardGpu(16, 163, 87, 12),
    "agx-thor": BoardGpu(20, 227, 110, 13),
    "dgx-spark": BoardGpu(48, 99, 121, 13),
}


def board_gpu(name: str) -> BoardGpu:
    """The GPU of the board that a person names, such as orin-nano-8gb.

    Raises:
        SettingsError: the name is not known.
    """
    module = module_named(name)
    if module is None:
        raise SettingsError(f"board {name}: not known, expected one of {', '.join(BOARD_GPUS)}; name one of them, or give its GPU's numbers")
    return BOARD_GPUS[module.key]
