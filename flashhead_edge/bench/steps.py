"""Decode steps with several heads in turns, as a bench's own records say them: `bench decode` and `bench tensorrt` alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashhead_edge.bench.energy import Energy

FLASH = "FlashHead"
TEXTS = 3  # that are decoded one after the other, each with its own tokens a second


def timed(us: np.ndarray) -> dict[str, Any]:
    """Times of a step, one figure a round."""
    return {"microseconds": float(np.median(us)), "spread": [float(us.min()), float(us.max())], "microseconds_rounds": us.tolist()}


def decoded(texts: Sequence[tuple[float, np.ndarray]], fixed: float, items: Sequence[float]) -> dict[str, Any]:
    """Tokens a second of some texts, and the bytes that the head reads at their steps.

    Args:
        texts: of each its tokens a second and the counts of its steps; fixed, items: as for `read_bytes`.
    """
    rates = [rate for rate, _ in texts]
    return {
        "tokens_per_second": float(np.median(rates)), "tokens_per_second_spread": [min(rates), max(rates)], "tokens_per_second_texts": len(rates),
        "bytes_per_step": read_bytes(fixed, items, np.concatenate([counts for _, counts in texts])),
    }  # fmt: skip


def drawn(energy: Energy, rows: int) -> dict[str, Any]:
    """What a token of a step of some rows draws, and of what of the machine, or why nobody knows."""
    each = [j / rows for j in energy.joules]
    median = float(np.median(each)) if each else None
    return {"joules_per_token": median, "joules_rounds": each, "power_scope": energy.scope, "power_unknown": energy.unknown}


def read_bytes(fixed: float, items: Sequence[float], counts: np.ndarray) -> float:
    """Bytes that the head reads at a step, mean: what all rows share once, the rest for each.

    Args:
        fixed, items: of the head (`costs`): whatever opens, and of each slot scored by each code and each exact row.
        counts: [steps, rows, 2 + stages], as in `head.Step`.
    """
    return float(fixed + counts.shape[1] * (counts[..., 1:].mean((0, 1)) @ np.asarray(items, np.float64)))


def against(ours: np.ndarray, dense: np.ndarray, head_microseconds: float) -> dict[str, Any]:
    """Our step beside the dense one, from times of the same rounds.

    Args:
        head_microseconds: what the dense head takes of its step.
    """
    saved = float(np.median(dense) - np.median(ours))
    return {
        "speedup_over_dense": float(np.median(dense / ours)),
        "dense_head_microseconds": head_microseconds,
        "share_of_head_gone": saved / head_microseconds if head_microseconds > 0 else None,
    }
