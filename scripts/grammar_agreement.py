"""Measure decoding under a grammar on a checkpoint: how often the fast head's token is the dense head's under the same mask.

    python scripts/grammar_agreement.py FOLDER [--tokens 120] [--json]

At every step of the fast head's greedy text all rows that the grammar allows are scored as well, from the same hidden
state. Steps with few allowed tokens score exactly those, and can only agree. A table goes to stderr, one JSON document
to stdout with --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "age": {"type": "integer"}, "city": {"enum": ["Paris", "Rome"]},
        "hobbies": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "city", "hobbies"],
    "additionalProperties": False,
}  # fmt: skip
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Invent a person. Answer in JSON with name, age, city and hobbies.", {"json_schema": PERSON}),
    ("Describe the planet Mars as a JSON object with long texts.", {"json_schema": {"type": "object", "minProperties": 3}}),
    ("What is the phone number of the fire brigade?", {"regex": r"\+[0-9]{2} [0-9]{3}-[0-9]{4}"}),
    ("Tell a story about a lighthouse.", {"regex": r"[A-Z ,.\n]{20,600}"}),
    ("Tell a story about a lighthouse.", {"regex": r"[a-z ,\n]{20,600}"}),
    ("Why is the sky blue?", {"regex": r"[^etETa]{20,600}"}),
    ("Why is the sky blue?", {"regex": r"([a-zA-Z ]{1,12}[.;] ?){5,60}"}),
    ("List five ways to save water at home.", {"regex": r"(- [A-Za-z' ]+\n){5}"}),
)


def measure(folder: str, tokens: int) -> dict[str, Any]:
    """Decode every case and count; shares are 0 to 1, bytes those of a head in 16 bits."""
    from flashhead_edge.decoding import Sampling
    from flashhead_edge.generation import compile_grammar, decode, load_engine, prompt_ids

    engine = load_engine(folder, "cpu")
    found: dict[str, Any] = {"checkpoint": folder, "steps": 0, "few_steps": 0, "few_equal": 0, "many_steps": 0, "many_equal": 0, "dense_steps": 0}
    read = 0.0

    def both(run: decode.Run, hidden: Any) -> int:
        before, token = run.summary.allowed_steps, decode.next_token(run, hidden)
        mask = run.mask()
        assert mask is not None
        kind = "few" if np.count_nonzero(mask) <= decode.FEW_ALLOWED else "many"
        assert kind == "many" or run.summary.allowed_steps > before
        found[f"{kind}_steps"] += 1
        found[f"{kind}_equal"] += token == dense_token(engine, hidden, mask)
        return token

    for prompt, spec in CASES:
        start = decode.start(engine, prompt_ids(engine, prompt), tokens, Sampling(), (), (), compile_grammar(engine, **spec))
        run = decode.Stream(start[0], decode.one_by_one(*start, None, both))
        text, s = "".join(token.text for token in run), run.summary
        found["steps"] += s.tokens
        found["dense_steps"] += s.dense_steps
        read += s.bytes_per_step * s.tokens
        print(f"{s.tokens:>5} tokens, {s.allowed_steps} by the allowed rows alone, {s.stopped}: {text[:70]!r}", file=sys.stderr)
    found |= {f"{kind}_agreement": found[f"{kind}_equal"] / max(found[f"{kind}_steps"], 1) for kind in ("few", "many")}
    return found | {"bytes_per_step": read / found["steps"], "dense_bytes_per_step": s.dense_bytes_per_step}


def dense_token(engine: Any, hidden: Any, mask: np.ndarray) -> int:
    """The dense head's token among those of the mask: the best of a product in float32, settled by exact sums."""
    rough = (hidden @ engine.head.weight[: engine.vocab_size].T).numpy()[0]
    rough[~mask] = -np.inf
    best = np.sort(np.argsort(-rough)[:64])
    best = best[mask[best]]
    return int(best[np.asarray(engine.exact_logits(hidden, best))[0].argmax()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding under a grammar on a converted checkpoint.")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=120, help="new tokens for each prompt, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    options = parser.parse_args()
    found = measure(options.folder, options.tokens)
    for key, value in found.items():
        print(f"{key:>22}  {value:.4f}" if isinstance(value, float) else f"{key:>22}  {value}", file=sys.stderr)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
