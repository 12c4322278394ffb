"""The cheapest margins that keep a promise: what each state needs of each gate, and what margins cost.

A state's *need* of a gate is the margin, in units, at which its dense winner just passes. Margins are chosen for all
gates at once: how they differ from each other follows from what a unit of each costs, their common level from the
states that may be missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_RATE = 1.6  # the share of states that need more than a margin falls to a fifth a unit: measured, see docs/experiments.md
MOST_OFFSET = 1.0  # units that a gate's margin may differ from the mean of all
STEP = 0.25  # units by which a margin is moved to see what it costs
ROUNDS = 5  # level and differences depend on each other


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the gates of one candidate need to score states; errors as they will be stored."""

    size: int
    folds: Tensor  # [2, K, r] float32 centroids that the states of each fold open clusters by
    centroids: Tensor  # [K, r] float32, as stored: what the layers add to
    probe_error: Tensor  # [K] float32
    layers: tuple[tuple[Tensor, Tensor], ...]  # values [slots, columns] float32, error [slots] float32
    filled: Tensor  # [slots] bool
    state_power: float


@dataclass(frozen=True, eq=False)
class Group:
    """States that a promise is held for together."""

    name: str
    start: int
    stop: int
    allowed: int  # misses at most


def gate_gaps(p: Prepared, z: Tensor, fold: int) -> list[Tensor]:
    """Gaps to the best in units at every gate, nothing closed before: [N, K], then [N, slots] for each code.

    The best is taken over all rows, not only over those opened: the gap that a step sees is this one or smaller.
    """
    unit = z[:, 1:].square().mean(1, keepdim=True).sqrt() ** p.state_power
    scores = z @ p.folds[fold].T
    out = [(scores.amax(1, keepdim=True) - scores) / (p.probe_error * unit)]
    total = (z @ p.centroids.T).repeat_interleave(p.size, 1)
    total[:, ~p.filled] = -torch.inf
    for values, error in p.layers:
        total = torch.addmm(total, z[:, : values.shape[1]], values.T)
        out.append((total.amax(1, keepdim=True) - total) / (error * unit))
    return out


def needs(p: Prepared, z: Tensor, fold: int, slots: Tensor) -> Tensor:
    """What states z [N, r] of one fold, with winners in `slots` [N], need of each gate: [N, gates] float32."""
    unit = z[:, 1:].square().mean(1).sqrt() ** p.state_power
    clusters = slots // p.size
    scores = z @ p.folds[fold].T
    out = [(scores.amax(1) - scores.gather(1, clusters[:, None])[:, 0]) / (p.probe_error[clusters] * unit)]
    total = (z @ p.centroids.T).repeat_interleave(p.size, 1)
    total[:, ~p.filled] = -torch.inf
    for values, error in p.layers:
        total.addmm_(z[:, : values.shape[1]], values.T)
        out.append((total.amax(1) - total.gather(1, slots[:, None])[:, 0]) / (error[slots] * unit))
    return torch.stack(out, 1)


@dataclass(frozen=True, eq=False)
class Traced:
    """Gaps of a few states, by which margins are priced: only of items that the loosest margins let through."""

    states: int
    slots_a_cluster: float
    probe: Tensor  # [m] float32, gaps of clusters
    passed: tuple[Tensor, ...]  # after each code: [2 + codes so far, m] float32, a slot's gaps at every gate so far


def trace(p: Prepared, parts: Sequence[tuple[Tensor, int]], loosest: Sequence[float]) -> Traced:
    """Keep the gaps of states ([N, r], fold) at gates no looser than `loosest` [gates]."""
    probe: list[Tensor] = []
    passed: list[list[Tensor]] = [[] for _ in p.layers]
    for z, fold in parts:
        gaps = gate_gaps(p, z, fold)
        probe.append(gaps[0][gaps[0] <= loosest[0]])
        row, slot = (gaps[0] <= loosest[0]).repeat_interleave(p.size, 1).logical_and_(p.filled).nonzero(as_tuple=True)
        columns = [gaps[0][row, slot // p.size]]
        for j, gap in enumerate(gaps[1:], 1):
            here = gap[row, slot]
            through = here <= loosest[j]
            row, slot, columns = row[through], slot[through], [c[through] for c in columns] + [here[through]]
            passed[j - 1].append(torch.stack(columns))
    return Traced(sum(len(z) for z, _ in parts), float(p.filled.sum()) / len(p.probe_error), torch.cat(probe), tuple(torch.cat(x, 1) for x in passed))


def mean_counts(traced: Traced, margins: Sequence[float]) -> list[float]:
    """Mean number of clusters opened, slots scored by each code, and exact rows, [1 + gates]."""
    opened = float((traced.probe <= margins[0]).sum()) / traced.states
    out = [opened, opened * traced.slots_a_cluster]
    for gaps in traced.passed:
        through = gaps[0] <= margins[0]
        for gap, margin in zip(gaps[1:], margins[1:]):
            through &= gap <= margin
        out.append(float(through.sum()) / traced.states)
    return out


def misses(need: Tensor, margins: Tensor, groups: Sequence[Group]) -> list[int]:
    """States of each group whose winner some gate turns away."""
    lost = (need > margins.to(need.device)).any(1)
    return [int(lost[g.start : g.stop].sum()) for g in groups]


def choose_margins(need: Tensor, groups: Sequence[Group], traced: Traced, item_cost: Sequence[float]) -> list[float]:
    """Margins at which no group misses more than it may, at a low mean cost.

    The states that decide are few, so that each gate's own worst states say little about text that was not seen. The
    gates share one law instead: the share of states that need more falls by e^TAIL_RATE a unit, at every gate alike.
    Then the cost is least where tightening any gate saves as much a miss: the more a unit of a gate costs, the lower
    its margin. The level of all together is read from the states.

    Args:
        need: [n, gates]; groups index its rows.
        traced: states that the cost is the mean of.
        item_cost: cost of a slot that each code scores, then of an exact row, [gates].
    Returns:
        A margin for each gate.
    """
    offset = torch.zeros(need.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        slope = _cost_of_a_unit(traced, (_level(need, offset, groups) + offset).tolist(), item_cost).log()
        offset = (offset + ((slope.mean() - slope) / TAIL_RATE).clamp(-MOST_OFFSET, MOST_OFFSET)) / 2
    return ((_level(need, offset, groups) + offset) * (1 + 1e-5)).tolist()  # a need must pass at its own margin, after rounding too


def _level(need: Tensor, offset: Tensor, groups: Sequence[Group]) -> float:
    """The lowest level at which margins of `offset` about it lose no more of any group than it may."""
    above = (need.double() - offset).amax(1)
    return max(float(above[g.start : g.stop].topk(min(max(g.allowed, 0), g.stop - g.start - 1) + 1).values[-1]) for g in groups)


def _cost_of_a_unit(traced: Traced, margins: Sequence[float], item_cost: Sequence[float]) -> Tensor:
    """What a unit of each gate's margin costs, [gates] float64."""

    def cost(margins: Sequence[float]) -> float:
        return sum(n * price for n, price in zip(mean_counts(traced, margins)[1:], item_cost))

    out = []
    for j in range(len(margins)):
        low, high = ([m + step * (i == j) for i, m in enumerate(margins)] for step in (-STEP, STEP))
        out.append(max(cost(high) - cost(low), 1e-6) / (2 * STEP))
    return torch.tensor(out, dtype=torch.float64)
