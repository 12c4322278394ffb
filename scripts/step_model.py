"""A decode step's time, measured beside modelled (flashhead_edge.bench.step_model), and what the model says of boards that were not measured.

    python scripts/step_model.py STEPS.json --bandwidth 3.02e12                          # of flashhead bench decode --json; a copy's, bytes a second
    python scripts/step_model.py H200.json --bandwidth 4.1e12 --fitted-on H100.json --its-bandwidth 3.02e12
    python scripts/step_model.py STEPS.json --bandwidth 3.02e12 --boards                 # Markdown, for docs/jetson.md

Boards: the low end is the H100's phases, its clock, and a copy at 90 % of the specified bandwidth that is not stretched; the high end is phases longer by the
ratio of clocks and by half again (a launch on a board was measured nowhere), and 75 % of the bandwidth, stretched as on the H100.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.bench.cuda import models
from flashhead_edge.bench.step_model import Fit, compared, step_of

FITTED_ON = ("Llama-3.2-1B", "SmolLM2-135M")  # the most bytes a phase, and the fewest
H100_GIGAHERTZ = 1.755


@dataclass(frozen=True)
class Board:
    name: str
    bandwidth: float  # GB/s, specified
    multiprocessors: int
    gigahertz: float  # in the highest power mode


BOARDS = (
    Board("Orin Nano 8 GB Super", 102, 8, 1.02),
    Board("Orin NX 16 GB Super", 102, 8, 1.173),
    Board("AGX Orin 64 GB", 205, 16, 1.3),
    Board("AGX Thor", 273, 20, 1.575),
)


def interval(fit: Fit, board: Board, name: str) -> tuple[float, float]:
    """Microseconds, low and high."""
    step = step_of(name)
    low = Fit(1.0, fit.phase).microseconds(step, 0.9e9 * board.bandwidth, board.multiprocessors, board.gigahertz)
    slower = 1.5 * H100_GIGAHERTZ / board.gigahertz
    high = Fit(fit.stretch, fit.phase * slower).microseconds(step, 0.75e9 * board.bandwidth, board.multiprocessors, board.gigahertz)
    return low, high


def boards(fit: Fit) -> None:
    print(f"| tokens a second, predicted | {' | '.join(b.name for b in BOARDS)} |")
    print("|---|" + "---|" * len(BOARDS))
    for name in models():
        spans = [interval(fit, board, name) for board in BOARDS]
        print(f"| {name} | {' | '.join(f'{1e6 / high:.0f} to {1e6 / low:.0f}' for low, high in spans)} |")


def records(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))["records"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--bandwidth", type=float, required=True)
    parser.add_argument("--fitted-on", type=Path, help="steps of another device, by which the model is fitted")
    parser.add_argument("--its-bandwidth", type=float)
    parser.add_argument("--boards", action="store_true")
    options = parser.parse_args()
    other = None
    if options.fitted_on:
        if options.its_bandwidth is None:
            parser.error("--fitted-on wants --its-bandwidth")
        other, _ = compared(records(options.fitted_on), FITTED_ON, options.its_bandwidth)
    fit, rows = compared(records(options.steps), () if other else FITTED_ON, options.bandwidth, other)
    if options.boards:
        boards(fit)
        return
    print(f"bytes stretched {fit.stretch:.3f} times, a phase {fit.phase:.3f} us\n")
    print("| us a step | measured | model | off |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['model']}{' (fitted)' if r['fitted_on'] else ''} | {r['measured']:.1f} | {r['predicted']:.1f} | {100 * r['off']:+.1f} % |")


if __name__ == "__main__":
    main()
