"""A decode step's time, measured beside modelled (flashhead_edge.bench.step_model), and what the model says of boards that were not measured.

    python scripts/step_model.py docs/benchmarks/decode-h100.json       # or what flashhead bench decode --json wrote on an H100
    python scripts/step_model.py H200.json --device H200 --fitted-on H100.json
    python scripts/step_model.py STEPS.json --boards                    # Markdown, for docs/jetson.md

Boards: the low end of a time has the H100's phases, codes that are not stretched, and a copy at 90 % of the specified bandwidth; the high end has phases longer
by the ratio of clocks and by half again (what a launch takes on a board was measured nowhere), stretched codes, and 75 % of the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashhead_edge.bench.cuda import models
from flashhead_edge.bench.step_model import Card, Fit, compared, step_of
from flashhead_edge.errors import FlashHeadError, SettingsError
from flashhead_edge.records.folder import KEY

FITTED_ON = ("Llama-3.2-1B", "SmolLM2-135M")  # the most bytes a phase, and the fewest
CARDS = {  # a copy's bandwidth as measured; clocks as specified
    "H100": Card(3.02e12, 132, 1.755),
    "H200": Card(4.1e12, 132, 1.755),
}
BOARDS = {  # bandwidth as specified, clocks of the highest power mode
    "Orin Nano 8 GB Super": Card(102e9, 8, 1.02),
    "Orin NX 16 GB Super": Card(102e9, 8, 1.173),
    "AGX Orin 64 GB": Card(205e9, 16, 1.3),
    "AGX Thor": Card(273e9, 20, 1.575),
}


def interval(fit: Fit, board: Card, name: str) -> tuple[float, float]:
    """Microseconds, low and high."""
    step = step_of(name)
    slower = 1.5 * CARDS["H100"].gigahertz / board.gigahertz
    low = Fit(1.0, fit.phase).microseconds(step, replace(board, bandwidth=0.9 * board.bandwidth))
    high = Fit(fit.stretch, fit.phase * slower).microseconds(step, replace(board, bandwidth=0.75 * board.bandwidth))
    return low, high


def boards(fit: Fit) -> None:
    print(f"| tokens a second, predicted | {' | '.join(BOARDS)} |")
    print("|---|" + "---|" * len(BOARDS))
    for name in models():
        spans = [interval(fit, board, name) for board in BOARDS.values()]
        print(f"| {name} | {' | '.join(f'{1e6 / high:.0f} to {1e6 / low:.0f}' for low, high in spans)} |")


def records(path: Path) -> Any:
    """Of a file of records, or of a bench's own document.

    Raises:
        SettingsError: it is another file.
    """
    wrong = f"{path}: no steps of models were found, expected what flashhead bench decode --json wrote, or records of it; give such a file"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(wrong) from error
    document = document.get(KEY, document) if isinstance(document, dict) else {}
    found = [r for r in document.get("records", ()) if {"model", "head", "batch"} <= r.keys() and (r.get("bench") or "decode") == "decode"]
    if not found:
        raise SettingsError(wrong)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--device", choices=list(CARDS), default="H100")
    parser.add_argument("--fitted-on", type=Path, help="steps of an H100, by which the model is fitted instead")
    parser.add_argument("--boards", action="store_true")
    options = parser.parse_args()
    other = None
    if options.fitted_on:
        other, _ = compared(records(options.fitted_on), FITTED_ON, CARDS["H100"])
    fit, rows = compared(records(options.steps), () if other else FITTED_ON, CARDS[options.device], other)
    if options.boards:
        boards(fit)
        return
    print(f"codes stretched {fit.stretch:.3f} times, a phase {fit.phase:.3f} us\n")
    print("| us a step | measured | model | off |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['model']}{' (fitted)' if r['fitted_on'] else ''} | {r['measured']:.1f} | {r['predicted']:.1f} | {100 * r['off']:+.1f} % |")


if __name__ == "__main__":
    try:
        main()
    except (FlashHeadError, OSError) as error:
        sys.exit(f"{error}")
