"""Whether the torch-free CUDA backend computes what numpy computes, on this machine's GPU: small made models; numpy alone, no pytest.

PYTHONPATH=.:tests python scripts/cuda_check.py OUT.txt
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cuda_truth import CHUNK, MODELS, Truth, small_program

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.jetson.cuda_backend import Cuda, open_program
from flashhead_edge.jetson.driver import device_facts
from flashhead_edge.program.head import Device

PROMPTS = [[1, 5, 9, 200, 31, 77, 1024, 8], [3, 17], [400, 12, 12, 12, 90, 7, 7, 300, 21, 55, 1000, 2], [8] * 70]


def check(name: str, b: Cuda, truth: Truth, say: Callable[[str], None]) -> None:
    """Say how far states, texts, rows and draws agree."""
    ids = [int(t) for t in np.random.default_rng(0).integers(0, 5_000, 150)]
    body = b.body()
    found, want = body.feed(ids[:140]), truth.feed(ids[:140])[-1]
    gaps = [np.abs(found[0] - want).max() / np.abs(want).max()]
    for token in ids[140:]:
        hidden = body.feed([token])
        want = truth.feed([token])[-1]
        gaps.append(np.abs(hidden[0] - want).max() / np.abs(want).max())
        step = b.head.step(hidden)
        exact = b.head.exact_logits(hidden, step.ids[0])
        if step.token[0] != step.ids[0, step.logits[0].argmax()] or np.abs(exact - step.logits).max() > 1e-3 * np.abs(exact).max():
            say(f"{name}: WRONG: the head's token or logits")
    say(f"{name}: states differ by {gaps[0]:.4f} of the largest after a prompt, {max(gaps[1:]):.4f} at most after steps")
    for prompt in PROMPTS:
        on_device = [int(t[0]) for t in b.decode([prompt], 20)]
        body, by_loop = b.body(), []
        hidden = body.feed(prompt)
        for _ in range(20):
            by_loop.append(int(b.head.step(hidden).token[0]))
            hidden = body.feed(by_loop[-1:])
        say(f"{name}: loop and device {'agree' if by_loop == on_device else f'WRONG: {by_loop} {on_device}'}")
    rows = np.stack(list(b.decode([PROMPTS[0]] * 3, 24)))
    say(f"{name}: equal rows {'agree' if (rows == rows[:, :1]).all() else 'WRONG'}")
    s = Sampling(temperature=1.25, top_p=0.875, seed=5)
    drawn = [int(t[0]) for t in b.decode([PROMPTS[0]], 8, s)]
    text = b.body()
    hidden, same = text.feed(PROMPTS[0]), 0
    for number, token in enumerate(drawn):
        step = b.head.step(hidden)
        same += int(token == choose(step.ids, step.logits, s, [number], None, None, 1.0, None)[0])
        hidden = text.feed([token])
    say(f"{name}: {same} of {len(drawn)} draws are the definition's")


def main() -> None:
    facts = device_facts()
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    with tempfile.TemporaryDirectory() as work, Path(sys.argv[1]).open("w", encoding="utf-8") as out:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=out, flush=True)

        for name in MODELS:
            program = small_program(Path(work) / name, name, device)
            with open_program(program, dict(program.settings), "made", chunk=CHUNK) as b:
                check(name, b, Truth(program), say)


if __name__ == "__main__":
    main()
