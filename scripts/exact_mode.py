"""Measure exact mode on a converted checkpoint: equality with transformers' dense greedy text, bytes, repeated work.

    python scripts/exact_mode.py FOLDER [--tokens 100] [--prompts 20] [--json]

Both run in float32 on the same weights. The dense text is `model.generate(do_sample=False)` on the head that the
checkpoint carries; end tokens do not stop it, so that every prompt gives its full number of tokens. A table goes to
stderr, one JSON document to stdout with --json. The exit status is 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

PROMPTS = (
    "What is the capital of Sweden?",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "Write a Python function that reverses a linked list.",
    "What is 17 times 23? Show the steps.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "List five ways to save water at home.",
    "Schreibe ein Gedicht über den Herbst.",
    "Translate to French: The train leaves at nine.",
    "Give me a JSON object that describes a book.",
    "Why is the sky blue?",
    "What should I pack for a week in the mountains?",
    "Describe photosynthesis to a ten-year-old.",
    "Write a regular expression that matches an e-mail address.",
    "Who painted the Mona Lisa, and when?",
    "Write a polite letter that declines an invitation.",
    "请用中文介绍一下长城。",
    "How do vaccines work?",
    "Compare TCP and UDP.",
    "Continue: Once upon a time in a village by the sea",
)


def measure(folder: str, tokens: int, prompts: int) -> dict[str, Any]:
    """Run both and count; shares are 0 to 1, bytes those of a head in 16 bits."""
    import torch

    from flashhead_edge.generation import exact_stream, load_engine, prompt_ids

    engine = load_engine(folder, "cpu")
    stop, engine.model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id, []
    padding = list(range(engine.vocab_size, len(engine.head.weight))) or None
    found: dict[str, Any] = {"checkpoint": folder, "prompts": prompts, "tokens": 0, "equal_tokens": 0, "missed": 0, "rounds": 0, "repeated_steps": 0}
    read = dense_seconds = exact_seconds = 0.0
    for i, prompt in enumerate(PROMPTS[:prompts], 1):
        ids = prompt_ids(engine, prompt)
        began = time.perf_counter()
        inputs = torch.tensor([ids])
        options = {"do_sample": False, "max_new_tokens": tokens, "suppress_tokens": padding, "pad_token_id": 0, "repetition_penalty": 1.0}
        out = engine.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        dense = out[0, len(ids) :].tolist()
        middle = time.perf_counter()
        run = exact_stream(engine, ids, tokens)
        exact = [token.id for token in run]
        dense_seconds, exact_seconds = dense_seconds + middle - began, exact_seconds + time.perf_counter() - middle
        s = run.summary
        equal = sum(a == b for a, b in zip(dense, exact)) if len(dense) == len(exact) else 0
        for key, more in (("tokens", len(exact)), ("equal_tokens", equal), ("missed", s.missed), ("rounds", s.rounds), ("repeated_steps", s.repeated_steps)):
            found[key] += more
        read += s.bytes_per_step * s.tokens
        print(f"{i:>3}  {equal} of {len(dense)} tokens equal, {s.rounds} dense passes, {s.missed} misses, {s.repeated_steps} steps repeated", file=sys.stderr)
    engine.model.generation_config.eos_token_id = stop
    n, whole = found["tokens"], s.dense_bytes_per_step
    found |= {
        "bytes_per_step": read / n, "dense_bytes_per_step": whole, "bytes_share": read / n / whole, "dense_passes_share": found["rounds"] / n,
        "agreement": 1 - found["missed"] / n, "repeated_share": found["repeated_steps"] / n,
        "dense_seconds": dense_seconds, "exact_seconds": exact_seconds, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure exact mode on a converted checkpoint.")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens for each prompt")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts, of the 20 in this file")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    options = parser.parse_args()
    found = measure(options.folder, options.tokens, min(options.prompts, len(PROMPTS)))
    for key, value in found.items():
        print(f"{key:>22}  {value:.4f}" if isinstance(value, float) else f"{key:>22}  {value}", file=sys.stderr)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    return 0 if found["equal_tokens"] == found["tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
