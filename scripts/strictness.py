#!/usr/bin/env python3
"""How much stricter own text must be held than other text: one kind of text left out at a time.

    python scripts/strictness.py OUT --text FILE [--text FILE ...]

The head of the checkpoint OUT is fitted again on the model's own text alone, and its margins are chosen for one
strictness after another: own text may miss 1/n of what is promised. What each kind of text then misses is read from the
margins that its states need. A file of several languages (told apart by their letters) counts as several kinds; where the family has a chat template,
the model's answers to lines of the texts are one more. A rule
that is derived from all kinds but one is tried on that one. docs/experiments.md states what came of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.calibration import Data, Fitted, Plan, cost_of, fit, gather, hard_tokens, lifted, loosest, needs_of, own_target, traced_of
from flashhead_edge.capture import capture_ids, chat_frame, compact, end_ids, sample_own_text
from flashhead_edge.checkpoint import load_model, load_tokenizer, open_source, read_head, read_index
from flashhead_edge.coding import decode, to_torch
from flashhead_edge.costs import dense_bytes
from flashhead_edge.fitting import accumulate, fit_coordinates, widen
from flashhead_edge.intervals import allowed_misses
from flashhead_edge.reference import dense_tokens
from flashhead_edge.search import choose_margins, mean_counts, needs, trace

STRICTNESS = (1, 2, 3, 4, 5, 7, 10, 12, 15, 20)
LETTERS = (("vi", "[ạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹđ]"), ("tr", "[ğışİ]"), ("ro", "[ășțţşîâ]"))


def kinds_of(path: Path) -> dict[str, str]:
    """The kinds of text in a file: one, or one a language where its paragraphs are in several."""
    text = path.read_text(encoding="utf-8")
    parts: dict[str, list[str]] = {}
    for paragraph in text.split("\n\n"):
        language = next((name for name, letters in LETTERS if re.search(letters, paragraph)), "en")
        parts.setdefault(language, []).append(paragraph)
    if min(sum(map(len, parts.get(name, []))) for name, _ in LETTERS) < len(text) / 20:
        return {path.stem: text}
    return {f"{path.stem} {name}": "\n\n".join(paragraphs) for name, paragraphs in sorted(parts.items())}


def chat_states(model: Any, tokenizer: Any, texts: list[Path], seed: int, questions: int = 60, tokens: int = 60) -> Tensor:
    """States of answers that the model samples at temperature 0.7 to lines of the texts, [n, d]."""
    lines = [line for path in texts for line in path.read_text(encoding="utf-8").split("\n") if 40 < len(line) < 300]
    torch.manual_seed(seed)
    out = []
    for line in lines[:: max(1, len(lines) // questions)][:questions]:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": line}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        whole = model.generate(**asked, do_sample=True, temperature=0.7, max_new_tokens=tokens)[0]
        out.append(capture_ids(model, whole, window=len(whole))[asked.input_ids.shape[1] - 1 :])
    return torch.cat(out)


def needs_of_text(f: Fitted, states: Tensor, winners: Tensor, always: np.ndarray) -> tuple[Tensor, Any]:
    """What states that no fold has seen need of the fitted head as it is stored, and the prepared gates."""
    values = widen(decode(to_torch(f.centroids.coded, states.device)), f.coordinates.lift.shape[1])
    whole = dataclasses.replace(f.prepared, folds=torch.stack([values, values]))
    need = torch.cat([needs(whole, lifted(f, s), 0, f.slot_of[w]) for s, w in zip(states.split(256), winners.split(256))])
    need[torch.isin(winners, torch.from_numpy(always).long()), 0] = 0
    return need, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=60_000)
    parser.add_argument("--text-positions", type=int, default=8_000)
    parser.add_argument("--target", action="append", type=float)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    began = time.time()
    source = open_source(a.out)
    head = read_head(source)
    index = read_index(a.out, head)
    weight, bias = head.weight[: head.vocab_size], None if head.bias is None else head.bias[: head.vocab_size]
    model, tokenizer = load_model(source), load_tokenizer(source)
    texts = {}
    for path in a.text:
        for name, text in kinds_of(path).items():
            ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: a.text_positions])
            states = compact(capture_ids(model, ids))
            texts[name] = states, dense_tokens(weight, bias, states, head.vocab_size)
    if chat_frame(tokenizer):
        states = compact(chat_states(model, tokenizer, a.text, a.seed))
        texts["chat answers"] = states, dense_tokens(weight, bias, states, head.vocab_size)
    own = sample_own_text(model, tokenizer, head.vocab_size, a.positions, a.seed)
    ends = end_ids(model, tokenizer, head.vocab_size)
    del model
    print(f"captured in {time.time() - began:.0f} s: own text {len(own.states)}, { ({k: len(s) for k, (s, _) in texts.items()}) }", flush=True)
    with torch.inference_mode():
        report(a, weight, bias, head.vocab_size, index, own, texts, ends)


def report(
    a: Any, weight: Tensor, bias: Tensor | None, vocab_size: int, index: Any, own: Any, texts: dict[str, tuple[Tensor, Tensor]], ends: list[int]
) -> None:
    """Fit, then a table for each target and the rules of all kinds but one."""
    plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in index.summary["plan"].items()})
    moments, winners = accumulate(weight, bias, [own.states], {index.cluster_size: index.token_table})
    data: Data = gather([own], winners, 0.995)
    coordinates = fit_coordinates(weight, bias, moments, plan.rotation_bits, plan.coordinates)
    f = fit(plan, index.token_table, coordinates, moments, None, 2 * weight.shape[1] + 4, a.seed)
    need = needs_of(f, data, torch.arange(len(data.states)))
    dense = dense_bytes(vocab_size, weight.shape[1])
    for target in a.target or [0.995, 0.999]:
        always = np.unique(np.concatenate([hard_tokens(need, data.winners, allowed_misses(len(need), own_target(target))), np.asarray(ends, np.int64)]))
        mine = need.clone()
        mine[torch.isin(data.winners, torch.from_numpy(always).long()), 0] = 0
        traced = traced_of(f, data, loosest(mine), a.seed)
        other, prices = {}, {}
        for name, (states, winners) in texts.items():
            other[name], whole = needs_of_text(f, states, winners, always)
            some = torch.randperm(len(states), generator=torch.Generator().manual_seed(a.seed))[:256]
            prices[name] = trace(whole, [(lifted(f, states[i]), 0) for i in some.split(64)], loosest(mine))
        agreement: dict[int, dict[str, float]] = {}
        print(f"\ntarget {target:.1%}: agreement at share of the dense head's bytes\n{'own text may miss':>18} " + " ".join(f"{k[-22:]:>22}" for k in texts))
        for n in STRICTNESS:
            allowed = max(0, allowed_misses(len(mine), 1 - (1 - target) / n))
            margins = choose_margins(mine, [dataclasses.replace(data.groups[0], allowed=allowed)], traced, f.item_cost)
            limit = torch.tensor(margins, dtype=torch.float32)
            agreement[n] = {k: float((x <= limit).all(1).float().mean()) for k, x in other.items()}
            cost = {k: cost_of(f, mean_counts(t, margins)) / dense for k, t in prices.items()}
            print(f"{f'1/{n} ({allowed})':>18} " + " ".join(f"{f'{agreement[n][k]:.2%} at {cost[k]:.2%}':>22}" for k in texts), flush=True)
        for left_out in texts:
            rule = next((n for n in STRICTNESS if all(v >= target for k, v in agreement[n].items() if k != left_out)), None)
            kept = "none of these is strict enough" if rule is None else f"1/{rule}, and {left_out} has {agreement[rule][left_out]:.2%}"
            print(f"all kinds but {left_out} ask for {kept}")


if __name__ == "__main__":
    main()
