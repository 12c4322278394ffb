"""What a backend's head hands to callers, made from what a device wrote: steps, and logits by the model's own rows. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashhead_edge.head import Step
from flashhead_edge.jetson.tensorrt_engine import to_float32

ROWS_AT_ONCE = 8192  # of the model's own matrix that exact logits widen to float32


def step_of(token: np.ndarray, ids: np.ndarray, logits: np.ndarray, counts: np.ndarray, capped: np.ndarray) -> Step:
    """What the head wrote as callers see it: candidates in the order of their ids, copies all of them."""
    width = int(counts[:, -1].max())
    there = np.arange(width) < counts[:, -1:]
    found = np.where(there, ids[:, :width], np.iinfo(np.int32).max).astype(np.int64)
    order = found.argsort(1, kind="stable")
    found = np.where(np.take_along_axis(there, order, 1), np.take_along_axis(found, order, 1), -1)
    values = np.where(found >= 0, np.take_along_axis(logits[:, :width], order, 1), -np.inf).astype(np.float32)
    return Step(token.astype(np.int64), found, values, counts.astype(np.int64), capped != 0)


def joined(steps: Sequence[Step]) -> Step:
    """Steps of several states one behind the other, as wide as the widest."""
    width = max(s.ids.shape[1] for s in steps)

    def wide(values: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)

    return Step(
        np.concatenate([s.token for s in steps]), np.concatenate([wide(s.ids, -1) for s in steps]),
        np.concatenate([wide(s.logits, -np.inf) for s in steps]), np.concatenate([s.counts for s in steps]), np.concatenate([s.capped for s in steps]),
    )  # fmt: skip


def logits_by_rows(hidden: np.ndarray, tokens: np.ndarray, rows: np.ndarray, bias: np.ndarray | None, precision: str) -> np.ndarray:
    """Raw logits of tokens, [N, M] float32, by rows [V or more, d] in 16 bits, which may lie in a file: some at a time are in memory."""
    h = np.ascontiguousarray(hidden, np.float32)
    parts = np.array_split(np.asarray(tokens, np.int64), max(1, -(-len(tokens) // ROWS_AT_ONCE)))
    found = np.concatenate([h @ to_float32(np.asarray(rows[part]), precision).T for part in parts], 1)
    return found if bias is None else found + to_float32(np.asarray(bias[tokens]), precision)
