"""The cheapest margins that keep a promise: what each state needs of each gate, and what margins cost.

A state's *need* of a gate is the margin, in units, at which its dense winner just passes. Margins are chosen for all
gates at once: starting from what every state needs, the gate whose next tightening saves most bytes a miss gives way,
until no group of states may miss more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the gates of one candidate need to score states; errors as they will be stored."""

    size: int
    folds: Tensor  # [2, K, r] float32 centroids for the states of each fold
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
    total = scores.repeat_interleave(p.size, 1)
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
    total = scores.repeat_interleave(p.size, 1)
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
    """The margins of least mean cost at which no group misses more than it may.

    Args:
        need: [n, gates]; groups index its rows.
        traced: states that the cost is the mean of.
        item_cost: cost of a slot that each code scores, then of an exact row, [gates].
    Returns:
        A margin for each gate. Tightening one goes from one state's need to the next lower one of the worst states.
    """
    gates = need.shape[1]
    bound = sum(max(g.allowed, 0) for g in groups)
    deepest = min(len(need) - 1, bound)
    ladder = sorted({min(deepest, round(1.35**i) - 1 if i < 6 else round(1.2 ** (i + 2))) for i in range(60)})
    worst = need.topk(deepest + 1, dim=0).values  # [deepest + 1, gates], descending
    rungs = worst[ladder].double() * (1 + 1e-5)  # a need must pass at its own margin, after rounding too

    def cost(at: list[int]) -> float:
        counts = mean_counts(traced, [float(rungs[a, j]) for j, a in enumerate(at)])
        return sum(n * price for n, price in zip(counts[1:], item_cost))

    def fits(at: list[int]) -> int | None:
        lost = misses(need, torch.tensor([float(rungs[a, j]) for j, a in enumerate(at)], dtype=torch.float32), groups)
        return sum(lost) if all(m <= max(g.allowed, 0) for m, g in zip(lost, groups)) else None

    at, here, lost = [0] * gates, cost([0] * gates), 0
    while True:
        moves = []
        for j in range(gates):
            for hop in (1, 3):
                if at[j] + hop < len(ladder):
                    there = [a + hop * (i == j) for i, a in enumerate(at)]
                    more = fits(there)
                    if more is not None:
                        price_there = cost(there)
                        moves.append(((here - price_there) / max(more - lost, 0.3), price_there, there, more))
        best = max(moves, default=None)
        if best is None or best[0] <= 0:
            return [float(rungs[a, j]) for j, a in enumerate(at)]
        _, here, at, lost = best
