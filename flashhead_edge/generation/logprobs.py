"""How likely a token was, and what else was likely: from full-width logits. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashhead_edge.decoding import model_logits
from flashhead_edge.generation.protocols import TextEngine


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities at temperature 1, before settings and grammar."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, likeliest first, the smaller id on ties


def logprobs_of(raw: np.ndarray, token: int, alternatives: int, engine: TextEngine) -> Logprobs:
    """Log-probabilities of a token and of the likeliest ones, from raw logits [V]."""
    x = model_logits(raw, engine.scale, engine.softcap)
    best = x.max()
    x -= best + np.log(np.exp(x - best).sum())
    n = min(alternatives, len(x))
    least = np.partition(x, len(x) - n)[len(x) - n] if n else np.inf
    top = np.flatnonzero(x >= least)
    top = top[np.lexsort((top, -x[top]))][:n]
    return Logprobs(float(x[token]), tuple((int(t), float(x[t])) for t in top))
