"""Predict what the kernels take on boards that were not measured: a Markdown table for docs/kernels.md, and records of a kind of their own.

    python scripts/predict_boards.py
    python scripts/predict_boards.py docs/benchmarks/boards-predicted.json      write the heads' predictions as records

A kernel takes the longer of its bytes at 80 % of the specified bandwidth and its operations at the board's lanes and clock, plus a launch,
plus its exchanges between multiprocessors (the head step's, which grow little with their number). Operations are instructions of a lane,
counted from the sources: what decoding a word takes, times the words. Shapes are those of Llama-3.2-1B at batch 1.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.bench.provenance import commit
from flashhead_edge.cases import SHAPES
from flashhead_edge.costs import dense_bytes
from flashhead_edge.records.folder import write_records
from flashhead_edge.records.form import baseline, figure, record, run_name

SHARE = 0.8  # of the specified bandwidth; an H100 gives its kernels 75 to 90 % of what a copy takes
LAUNCH = 3.0  # us of a launch in a graph on a board


@dataclass(frozen=True)
class Board:
    name: str
    multiprocessors: int
    bandwidth: float  # GB/s, specified
    clock: float  # GHz, at the highest power mode
    exchange: float  # us, of all blocks with all others

    def microseconds(self, kernel: Kernel) -> tuple[float, float, float]:
        """Of bytes, of operations, in all."""
        read = kernel.megabytes / (self.bandwidth * SHARE) * 1e3
        lanes = kernel.blocks * 128 if kernel.blocks else self.multiprocessors * 128
        counted = kernel.operations / (lanes * self.clock * 1e3)
        return read, counted, max(read, counted) + LAUNCH + kernel.exchanges * self.exchange


@dataclass(frozen=True)
class Kernel:
    name: str
    megabytes: float
    operations: float  # of all lanes
    exchanges: int = 0
    blocks: int = 0  # that run; 0: one a multiprocessor


BOARDS = (
    Board("Orin Nano 8 GB Super", 8, 102, 1.02, 1.5),
    Board("AGX Orin 64 GB", 16, 205, 1.3, 1.5),
    Board("AGX Thor", 20, 273, 1.575, 1.5),
)
KERNELS = (
    # rotation: 3 operations a weight; centroids and rows: 2.5 for each half byte of 41,000 codes of 96 bytes; exact rows: 2 a weight
    Kernel("head step, few codes", 10.5, 3 * 2048 * 2049 + 2.5 * 2 * 96 * (4008 + 36908) + 2 * 1048 * 2048, exchanges=3),
    # tables of the product codes on top: 256 sums for each of some 600 coordinates
    Kernel("head step, few codes, at the caps", 24.6, 3 * 2048 * 2049 + 2.5 * 2 * 96 * (4008 + 57_618) + 2 * 5242 * 2048, exchanges=5),
    Kernel("head step, fewest bytes", 4.4, 3 * 2048 * 2049 + 256 * 600 * 2 + 2 * 8 * 41_120 + 2.5 * 2 * (30 * 24_000 + 64 * 5_400 + 128 * 510), exchanges=7),
    Kernel("dense bf16 (a library's)", 525.3, 2 * 128_256 * 2048 / 8),
    Kernel("dense int8, one scale a row", 262.9, 1.2 * 128_256 * 2048),
    Kernel("dense int4, groups of 32", 147.8, 1.4 * 128_256 * 2048),
    Kernel("W4A16 gate and up, 16,384 x 2,048", 17.3, 1.4 * 16_384 * 2048),
    Kernel("W4A16 down, 2,048 x 8,192", 8.67, 1.4 * 2048 * 8192),
    Kernel("W4A16 q, k, v, 3,072 x 2,048", 3.25, 1.4 * 3072 * 2048),
    Kernel("W4A16 o, 2,048 x 2,048", 2.17, 1.4 * 2048 * 2048),
    Kernel("attention, 4,096 cached", 8.39, 0.6 * 8 * 4096 * 64 * 2 + 32 * 4096 * 6, exchanges=1),
    Kernel("draw from 1,048, top-k 50", 0.01, 250 * 1048 * 16, blocks=1),  # float64 at a sixteenth of the rate and less: latency, mostly
    Kernel("RMSNorm, gated product, rotary write: each", 0.03, 2e5),
)


MODEL, DENSE = "Llama-3.2-1B", "dense bf16 (a library's)"
HEADS = {  # kernels that are heads, as records name them
    "head step, few codes": "FlashHead", "head step, few codes, at the caps": "FlashHead, at the cap", "head step, fewest bytes": "FlashHead, fewest bytes",
    "dense int8, one scale a row": "dense int8, one scale a row", "dense int4, groups of 32": "dense int4, groups of 32",
}  # fmt: skip
RULE = (
    "scripts/predict_boards.py: the longer of bytes at 80 % of the specified bandwidth and operations at the board's lanes and clock, 3 us a launch, "
    "1.5 us an exchange"
)


def records(date: str, revision: str | None) -> list[dict[str, Any]]:
    """The heads' predictions: a record a board and head, beside the dense head's by the same rule."""
    kernels, run = {k.name: k for k in KERNELS}, run_name(RULE, date)
    vocab, hidden = SHAPES[MODEL]

    def of(kernel: Kernel, board: Board) -> dict[str, Any]:
        return {"microseconds": figure(float(round(board.microseconds(kernel)[2]))), "bytes_per_step": round(1e6 * kernel.megabytes)}

    found = []
    for name, head in HEADS.items():
        for board in BOARDS:
            mine, dense = of(kernels[name], board), of(kernels[DENSE], board)
            found.append(
                record(
                    kind="predicted", run=run, bench="head", part="head", model=MODEL, shape=[vocab, hidden], real_weights=False, precision="bf16", head=head,
                    backend="cuda", device=f"Jetson {board.name}", power_mode="the highest", batch=1, dense_bytes_per_step=dense_bytes(vocab, hidden),
                    **mine, times_as_fast=figure(round(dense["microseconds"]["median"] / mine["microseconds"]["median"], 4)),
                    baseline=baseline(run, "dense bf16", "cuda", **dense), date=date, commit=revision, command="python scripts/predict_boards.py",
                    source=RULE, note="no board has run this",
                )
            )  # fmt: skip
    return found


def main() -> None:
    if len(sys.argv) > 1:
        write_records(Path(sys.argv[1]), records(datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), commit()))
        return
    print(f"| kernel | MB | operations | {' | '.join(f'{b.name}: bytes / operations / all, us' for b in BOARDS)} |")
    print("|---|---|---|" + "---|" * len(BOARDS))
    for kernel in KERNELS:
        cells = [" / ".join(f"{x:,.0f}" for x in board.microseconds(kernel)) for board in BOARDS]
        print(f"| {kernel.name} | {kernel.megabytes:g} | {kernel.operations / 1e6:,.1f} M | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
