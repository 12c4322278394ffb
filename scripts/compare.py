#!/usr/bin/env python3
"""The design space on one model: each variant of the fitted head, calibrated on own text alone, measured on texts.

    python scripts/compare.py MODEL --text FILE [--text FILE ...] [--positions 60000] [--device cuda]

One line a variant: agreement on the worst text and on the mean, bytes as a share of the dense head, the 99th percentile
over the mean, what each stage let through. docs/experiments.md is written from it. Seconds a variant on a GPU, a minute
on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from flashhead_edge import capture, fitting
from flashhead_edge.calibration import FIRST, STRICTNESS, Data, Plan, finish, fit, gather
from flashhead_edge.checkpoint import load_model, load_tokenizer, open_source, read_head
from flashhead_edge.clustering import cluster
from flashhead_edge.conversion import in_state_metric
from flashhead_edge.costs import bytes_per_step, dense_bytes
from flashhead_edge.fitting import Moments, accumulate, fit_coordinates
from flashhead_edge.intervals import allowed_misses
from flashhead_edge.reference import dense_tokens, torch_head

VARIANTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("as converted", {}),
    ("clusters of 64", {"cluster_size": 64}),
    ("centroids product16", {"centroids": "product16"}),
    ("centroids product32", {"centroids": "product32"}),
    ("centroids bits64", {"centroids": "bits64"}),
    ("rotation 3 bits", {"rotation_bits": 3.0}),
    ("rotation 5 bits", {"rotation_bits": 5.0}),
    ("one margin for all states", {"state_power": 0.0}),
    ("margins by the fourth root of the state", {"state_power": 0.25}),
    ("rows product12 + bits48", {"codes": ("product12", "bits48")}),
    ("rows product8 + bits40 + bits96", {"codes": ("product8", "bits40", "bits96")}),
    ("rows product8 + product24 + bits96", {"codes": ("product8", "product24", "bits96")}),
    ("rows product8 + bits40 + bits72 + bits128", {"codes": ("product8", "bits40", "bits72", "bits128")}),
    ("rows product8 + bits32 + bits64 + bits128", {"codes": ("product8", "bits32", "bits64", "bits128")}),
    ("rows bits16 + bits96", {"codes": ("bits16", "bits96")}),
)
STRICT = (2, 5, 10, 15, 20)  # own text may miss 1/n of what is promised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=60_000)
    parser.add_argument("--text-positions", type=int, default=8_000)
    parser.add_argument("--target", type=float, default=0.995)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="variants whose name has this in it")
    a = parser.parse_args()
    began = time.time()
    source = open_source(a.model)
    head = read_head(source)
    weight = head.weight[: head.vocab_size].to(a.device)
    bias = None if head.bias is None else head.bias[: head.vocab_size].to(a.device)
    model, tokenizer = load_model(source, device=a.device), load_tokenizer(source)
    texts = {}
    for path in a.text:
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[: a.text_positions])
        states = capture.capture_ids(model, ids)
        texts[path.stem] = states, dense_tokens(weight, bias, states.to(a.device), head.vocab_size).cpu()
    own = capture.sample_own_text(model, tokenizer, head.vocab_size, a.positions)
    mixture, capture.MIXTURE = capture.MIXTURE, (capture.Part(1.0, 1.0, False),)
    cold = capture.sample_own_text(model, tokenizer, head.vocab_size, a.positions)
    capture.MIXTURE = mixture
    del model
    print(f"captured in {time.time() - began:.0f} s: own text {len(own.states)}, texts { {k: len(s) for k, (s, _) in texts.items()} }", flush=True)

    def prepare(sources: list[capture.Source]) -> tuple[Data, Moments, dict[int, np.ndarray]]:
        rows = in_state_metric(weight, sources)
        tables = {size: cluster(rows, size).token_table for size in (32, 64)}
        moments, winners = accumulate(weight, bias, [s.states for s in sources], tables)
        return gather(sources, winners, a.target), moments, tables

    def measure(name: str, plan: Plan, prepared: tuple[Data, Moments, dict[int, np.ndarray]], strict: int = STRICTNESS) -> None:
        if a.only and a.only not in name:
            return
        data, moments, tables = prepared
        share = 1 - (1 - a.target) / strict
        groups = tuple(dataclasses.replace(g, allowed=allowed_misses(g.stop - g.start, share)) for g in data.groups)
        coordinates = fit_coordinates(weight, bias, moments, plan.rotation_bits, plan.coordinates)
        fitted = fit(plan, tables[plan.cluster_size], coordinates, moments, None, 2 * weight.shape[1] + 4, 0)
        index = finish(fitted, dataclasses.replace(data, groups=groups), a.target, weight, bias, [], head.fingerprint, 0)
        runner, agreements, shares, tails, counts = torch_head(index, weight, bias), [], [], [], []
        for states, winners in texts.values():
            steps = [runner.step(s.to(a.device)) for s in states.split(256)]
            agreements.append(float((torch.cat([s.token for s in steps]).cpu() == winners).float().mean()))
            count = torch.cat([s.counts for s in steps]).cpu().numpy()
            size = bytes_per_step(index, count, 2 * weight.shape[1]) / dense_bytes(head.vocab_size, weight.shape[1])
            shares.append(size.mean())
            tails.append(np.quantile(size, 0.99) / size.mean())
            counts.append(count.mean(0))
        each = " ".join(f"{100 * x:.2f}@{100 * y:.2f}" for x, y in zip(agreements, shares))
        through = "/".join(f"{c:.0f}" for c in np.mean(counts, 0))
        print(
            f"{name:42} lowest {100 * min(agreements):.2f} mean {100 * np.mean(agreements):.2f} at {100 * np.mean(shares):.2f} % "
            f"p99/mean {max(tails):.1f} through {through} | {each}",
            flush=True,
        )

    with torch.inference_mode():
        usual = prepare([own])
        for name, change in VARIANTS:
            measure(name, dataclasses.replace(FIRST, **change), usual)  # type: ignore[arg-type]
        for strict in STRICT:
            measure(f"own text held to 1/{strict} of the misses", FIRST, usual, strict)
        only_cold = prepare([cold])
        for strict in STRICT:
            measure(f"all samples at temperature 1, 1/{strict}", FIRST, only_cold, strict)
        few = prepare([dataclasses.replace(own, states=own.states[torch.randperm(len(own.states))[: len(own.states) // 3]])])
        measure("a third of the positions", FIRST, few)
        for ridge in (0.3, 30.0):
            fitting.RIDGE_CENTROIDS = ridge
            measure(f"ridge {ridge:g} for centroids", FIRST, usual)


if __name__ == "__main__":
    main()
