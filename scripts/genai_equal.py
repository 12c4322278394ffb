"""Is the session's greedy text ONNX Runtime GenAI's over the same folder? By the native operators and by the standard ones.

    python scripts/genai_equal.py OUT [--tokens 60] [--threads 1] [PROMPT ...]

OUT is a folder of `flashhead export onnx`. One line a prompt: how many tokens are equal before the first that differs. End tokens
are ignored, and prompts go through the chat template where there is one. Exit code 1 where standard operators give another text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import onnxruntime_genai as og

from flashhead_edge.generation import prompt_ids, stream
from flashhead_edge.jetson import open_engine

PROMPTS = ("Why is the sky blue?", "Tell me about dogs.", "Write a poem about rain.", "What is gravity?", "How do I bake bread?", "Explain recursion.")


def greedy(model: og.Model, ids: list[int], tokens: int) -> list[int]:
    """What GenAI writes after a prompt."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=len(ids) + tokens, max_length=len(ids) + tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    written = []
    while not generator.is_done():
        generator.generate_next_token()
        written.append(int(generator.get_next_tokens()[0]))
    return written


def equal(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    config = og.Config(str(a.out))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": a.threads}}}}))
    model = og.Model(config)
    engines = {
        name: dataclasses.replace(open_engine(a.out, threads=a.threads, native=native), stop_ids=frozenset())
        for name, native in (("native", True), ("standard operators", False))
    }
    other = 0
    for prompt in a.prompts:
        ids = list(prompt_ids(engines["native"], prompt, None))
        want = greedy(model, ids, a.tokens)
        found = {name: equal(want, [token.id for token in stream(engine, ids, a.tokens)]) for name, engine in engines.items()}
        other += found["standard operators"] < a.tokens
        print(f"{prompt!r}: " + ", ".join(f"{name} {n} of {a.tokens}" for name, n in found.items()))
    return int(other > 0)


if __name__ == "__main__":
    raise SystemExit(main())
