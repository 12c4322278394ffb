"""A document as `evaluate_checkpoint` returns it, with invented measures of a real shape: what pages and tables are tested on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flashhead_edge.evaluation.measures import Measured, as_json, join, summarise
from flashhead_edge.evaluation.run import summary

V, D, K, N = 49_152, 576, 1536, 3000
TEXTS = {"wikitext2-valid.txt": 0.9962, "gsm8k-test.txt": 0.9994, "code-python.txt": 0.9971, "xquad-de.txt": 0.9955, "xquad-zh.txt": 0.9948}
HEADS = {  # name: agreement, share of the dense bytes; the first is the head itself
    "fitted": (None, 0.019), "dense int8, one scale a row": (0.976, 0.502), "dense int8, groups of 32": (0.9999, 0.531),
    "dense int4, groups of 32": (0.79, 0.281), "dense int4, groups of 128": (0.73, 0.259), "published, 256 probes": (0.93, 0.146),
    "published, default 192 probes": (0.9, 0.125),
}  # fmt: skip


class Invented:
    """Stands for a contender where only its name and settings are asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings: dict[str, Any] = {"n_clusters": K} if name == "fitted" else {}


def measured(name: str, agreement: float, share: float, rng: np.random.Generator) -> Measured:
    agrees = rng.random(N) < agreement
    winners = (rng.zipf(1.4, N) % V).astype(np.int64)
    own, counts = name == "fitted", None
    if own or name.startswith("published"):
        opened = np.clip(rng.lognormal(4.6, 1.0, N), 4, K).astype(np.int64)
        counts = np.stack([opened, *([opened * 32, opened * 5] if own else []), np.minimum(opened, 60)], 1)
    size = share * 2 * V * D
    each = size * (0.35 + 0.65 * np.exp(rng.normal(-0.3, 0.75, N))) if own else np.full(N, size)
    loss = rng.exponential(2.9, N)
    nothing = np.full(N, np.nan)
    return Measured(
        dense_token=winners, token=np.where(agrees, winners, winners + 1), agrees=agrees, covered=agrees | (rng.random(N) < 0.1),
        bytes=each.astype(np.int64), counts=counts, capped=rng.random(N) < 0.0004 if own else None, target_covered=rng.random(N) < 0.8, loss_dense=loss,
        loss=nothing if name.startswith("published") else loss + 0.01, variation=nothing if name.startswith("published") else rng.beta(1, 40, N),
        variation_candidates=rng.beta(1, 8, N),
    )  # fmt: skip


def document(texts: int = 5, target: float | None = 0.995) -> dict[str, Any]:
    rng, dense = np.random.default_rng(0), 2 * V * D
    words = ["the", " of", "\n", " die", "（", " <b>&", "[red]x", "  ", "def", " 3"]
    records, parts = [], []
    for text, agreement in list(TEXTS.items())[:texts]:
        row = [measured(name, a or agreement, share, rng) for name, (a, share) in HEADS.items()]
        free = {"prompts": 8, "tokens": 128, "mean": 97.25, "median": 128.0, "whole": 0.625}
        each = [as_json(replace(summarise(Invented(n), m, dense, lambda t: words[t % 10]), free_running=free)) for n, m in zip(HEADS, row)]
        parts.append(row)
        records.append({"text": text, "sha256": "0123456789abcdef" * 4, **each[0], "rivals": each[1:]})
    pooled = [as_json(summarise(Invented(n), join(list(m)), dense, lambda t: words[t % 10])) for n, m in zip(HEADS, zip(*parts))]
    return {
        "model": "SmolLM2-135M-Instruct", "shape": [V, D], "head": "fitted", "batch": 1, "context": 512, "backend": "torch", "backend_version": "2.13.0",
        "device": "cpu", "threads": 2, "command": "flashhead evaluate out --text <wikitext2-valid.txt>", **pooled[0], "rivals": pooled[1:],
        "summary": summary(records, {"target_agreement": target}), "texts": records, "calibration": {},
    }  # fmt: skip
