"""Count seeded draws of the fast head that are the dense head's draws under the same keys, on a converted checkpoint.

    python scripts/draws.py FOLDER TEXT [--positions 500] [--json]

Two rows for each rule: the candidates of a step alone (`decoding.draw_agreement`), and what `flashhead generate` draws
from, which adds the tokens that the noise lifts. At plain temperature a draw differs only where the dense head's token
was no candidate; with truncation also where the candidates make another nucleus. A table goes to stderr, one JSON
document to stdout with --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RULES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
)


def measure(folder: str, text: Path, positions: int) -> list[dict[str, Any]]:
    """Shares of equal draws, 0 to 1: one record a rule."""
    import numpy as np
    import torch

    from flashhead_edge.capture import capture_ids
    from flashhead_edge.decoding import Sampling, choose, draw_agreement
    from flashhead_edge.generation import load_engine
    from flashhead_edge.generation.decode import next_token, start
    from flashhead_edge.reference import dense_logits, step

    engine = load_engine(folder, "cpu")
    assert engine.tokenizer is not None
    ids = torch.tensor(engine.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:positions])
    states = capture_ids(engine.model, ids)
    head, every = engine.head, np.arange(engine.vocab_size)[None]
    records = [{"rule": rule, "positions": len(states), "candidates": 0, "equal_candidates": 0.0, "equal_generate": 0.0} for rule in RULES]
    for i, state in enumerate(states.split(1)):
        with torch.no_grad():
            raw = dense_logits(head.weight, head.bias, state, engine.vocab_size).numpy()
            found = step(head, state)
        known = found.ids.numpy(), found.logits.numpy()
        for record, rule in zip(records, RULES):
            sampling = Sampling(**rule, seed=i)
            run, *_ = start(engine, [0], 1, sampling, ())
            want = choose(every, raw, sampling, [0], None, None, engine.scale, engine.softcap)[0]
            record["candidates"] += known[0].shape[1] / len(states)
            record["equal_candidates"] += draw_agreement(*known, raw, sampling, 1, engine.scale, engine.softcap).share / len(states)
            record["equal_generate"] += float(next_token(run, state) == want) / len(states)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description="Count seeded draws that equal the dense head's.")
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    options = parser.parse_args()
    records = measure(options.folder, options.text, options.positions)
    print(f"{'rule':<55} {'candidates':>10} {'equal':>8} {'generate':>9}", file=sys.stderr)
    for r in records:
        print(f"{r['rule']!s:<55} {r['candidates']:>10.1f} {r['equal_candidates']:>8.2%} {r['equal_generate']:>9.2%}", file=sys.stderr)
    if options.json:
        print(json.dumps({"checkpoint": options.folder, "text": options.text.name, "rules": records}, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
