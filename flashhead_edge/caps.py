"""Caps: the most that a step may open and score, so that the hardest step stays within a bound of the mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.costs import bytes_per_step
from flashhead_edge.index import MOST_CANDIDATES, HeadIndex, Stage
from flashhead_edge.progress import Progress, silent
from flashhead_edge.reference import coordinates, probe, state_unit, torch_head
from flashhead_edge.search import Group

MOST_BYTES = 2.25  # of the mean of own text: what a step may read at most, where caps that keep the promise allow it; some texts' mean is a quarter lower
CAPS_SHARE = 5  # caps may lose a fifth of the states that may miss
CAPPED_STATES = 1000  # states that open most, by which caps are chosen


def with_gates(index: HeadIndex, margins: Sequence[float], caps: Sequence[int]) -> HeadIndex:
    """The index with other margins and caps, one of each a gate."""
    gates = [dataclasses.replace(g, margin=float(m), cap=c) for g, m, c in zip([index.probe, *(s.gate for s in index.stages)], margins, caps)]
    return dataclasses.replace(index, probe=gates[0], stages=tuple(Stage(s.rows, g) for s, g in zip(index.stages, gates[1:])))


def most_counts(index: HeadIndex, caps: Sequence[int]) -> np.ndarray:
    """Counts of a step at which every cap is full, [2 + stages] int64."""
    return np.array([caps[0], caps[0] * index.cluster_size + index.always_scored.size, *caps[1:]], np.int64)


def choose_caps(
    index: HeadIndex,
    states: Tensor,
    winners: Tensor,
    groups: Sequence[Group],
    weight: Tensor,
    bias: Tensor | None,
    seen: np.ndarray,
    progress: Progress = silent,
) -> tuple[list[int], list[int]]:
    """Caps by which no step reads more than MOST_BYTES times the mean, or wider ones where those would lose too much.

    A cap lies between what a step needs on the average, `seen`, and what the hardest states need; all gates at the same
    share of the way. They are tried on the states that open most clusters, where nearly all that they cut lies.
    The last one, of rows that are scored exactly, is never above MOST_CANDIDATES.

    Returns:
        A cap for each gate, and the states of each group, of those tried, whose token the caps lose.
    """
    row_size = 2 * weight.shape[1]
    head = torch_head(index, weight, bias)
    opened = torch.cat([_opened(head, s.to(weight.device)) for s in states.split(1024)])
    hardest = opened.topk(min(CAPPED_STATES, len(opened))).indices.sort().values
    margins = [index.probe.margin, *(s.gate.margin for s in index.stages)]

    def run(index: HeadIndex, message: str) -> tuple[np.ndarray, Tensor]:
        head, tokens, counts = torch_head(index, weight, bias), [], []
        for i, rows in enumerate(hardest.split(128)):
            step = head.step(states[rows].to(weight.device))
            tokens.append(step.token.cpu())
            counts.append(step.counts.cpu().numpy())
            progress(message, min(1.0, (i + 1) * 128 / len(hardest)))
        return np.concatenate(counts), torch.cat(tokens)

    counts, tokens = run(index, "the hardest steps")
    gates = [0, *range(2, counts.shape[1])]  # what a gate keeps: the probe its opened clusters, a code's gate what the next stage scores
    mean, most = seen.mean(0)[gates], np.maximum(counts.max(0), seen.max(0))[gates]
    bound = MOST_BYTES * float(bytes_per_step(index, seen, row_size).mean())

    def at(share: float) -> list[int]:
        wanted = [max(1, math.ceil(a + share * (b - a))) for a, b in zip(mean, most)]
        return [*wanted[:-1], min(wanted[-1], MOST_CANDIDATES)] if index.stages else wanted

    def lost_with(caps: list[int]) -> list[int]:
        _, capped = run(with_gates(index, margins, caps), "caps")
        gone = (tokens == winners[hardest]) & (capped != tokens)
        return [int(gone[(hardest >= g.start) & (hardest < g.stop)].sum()) for g in groups]

    shares = [i / 64 for i in range(1, 65)]
    fitting = [s for s in shares if bytes_per_step(index, most_counts(index, at(s))[None], row_size)[0] <= bound]
    for share in [s for s in shares if s >= max(fitting, default=shares[0])][::8]:
        caps = at(share)
        cut = lost_with(caps)
        if all(n <= max(g.allowed, 0) // CAPS_SHARE for n, g in zip(cut, groups)):
            return caps, cut
    widest = at(1.0)
    return widest, lost_with(widest) if widest[-1] < most[-1] else [0] * len(groups)


def _opened(head: Any, states: Tensor) -> Tensor:
    """How many clusters states open, the cap left out of account, [N] int64 on the CPU."""
    z = coordinates(head, states)
    scores = probe(head, z)
    gap = (scores.amax(1, keepdim=True) - scores) / (head.probe.error * state_unit(head, z))
    return (gap <= head.probe.margin).sum(1).cpu()
