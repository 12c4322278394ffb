"""Predict what the kernels take on boards that were not measured: a Markdown table for docs/kernels.md.

    python scripts/predict_boards.py

A kernel takes the longer of its bytes at 80 % of the specified bandwidth and its operations at the board's lanes and clock, plus a launch,
plus its exchanges between multiprocessors (the head step's, which grow little with their number). Operations are instructions of a lane,
counted from the sources: what decoding a word takes, times the words. Shapes are those of Llama-3.2-1B at batch 1.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    Board("AGX Orin 64", 16, 205, 1.3, 1.5),
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


def main() -> None:
    print(f"| kernel | MB | operations | {' | '.join(f'{b.name}: bytes / operations / all, us' for b in BOARDS)} |")
    print("|---|---|---|" + "---|" * len(BOARDS))
    for kernel in KERNELS:
        cells = [" / ".join(f"{x:,.0f}" for x in board.microseconds(kernel)) for board in BOARDS]
        print(f"| {kernel.name} | {kernel.megabytes:g} | {kernel.operations / 1e6:,.1f} M | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
