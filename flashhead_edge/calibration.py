"""Finds the settings of a head that keep a promise at the least cost.

The promise is `target`: the share of steps that keep the dense head's token, on text that was never calibrated on.
Own text flatters itself, so it is held to a stricter share (`own_target`); texts given are held to the target each.
Every state opens clusters by centroids that were fitted without it: two folds, those of one measured on the other (row
codes are fitted to the rows, not to states). docs/experiments.md has the why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.caps import choose_caps, most_counts, with_gates
from flashhead_edge.capture import Source
from flashhead_edge.costs import TOKEN_BYTES, bytes_per_step, dense_bytes, fixed_bytes
from flashhead_edge.devices import Priced, Runtime, prices
from flashhead_edge.errors import SettingsError
from flashhead_edge.fitting import Centroids, Coordinates, Layer, Moments, coded_errors, fit_centroids, fit_coordinates, fit_layers, fold_of
from flashhead_edge.index import FORMAT_VERSION, Gate, HeadIndex, Stage
from flashhead_edge.intervals import allowed_misses, least_trials, wilson
from flashhead_edge.progress import Progress, silent
from flashhead_edge.reference import run_stages, torch_head
from flashhead_edge.search import MOST_OFFSET, STEP, Group, Prepared, Traced, choose_margins, mean_counts, misses, needs, trace

STRICTNESS = 12  # own text may miss a twelfth of what is promised for other text: see own_target
POSITIONS = 60_000  # of own text, unless more are needed: see default_positions
MOST_POSITIONS = 4 * POSITIONS
LEAST_MISSES = 2  # that own text shall be able to afford: margins that one state sets are a matter of luck
SEARCHED_STATES = 6000  # states by which candidates are compared
SEARCHED_MISSES = (3, 10, 30)  # of these, at which they are compared: the mean cost of the three counts
TRACED_SLOTS = 8_000_000  # states x slots by which margins are priced
HARD_TOKENS = 64  # always-scored tokens at most, beside the end tokens
FEW_MISSES = 10  # a margin set by fewer held-out misses is extrapolated
FRONTIER = (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)


@dataclass(frozen=True)
class Plan:
    """The choices that calibration searches."""

    cluster_size: int
    rotation_bits: float
    centroids: str
    codes: tuple[str, ...]
    state_power: float
    coordinates: int | None = None  # at most; None is as many as the rotation's bits are owed to


FIRST = Plan(32, 4.0, "product24", ("product12", "bits48", "bits128"), 0.5)
OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("cluster_size", (32, 64)),
    ("centroids", ("product16", "product24")),
    (
        "codes",
        (("product12", "bits48", "bits128"), ("product8", "bits40", "bits96"), ("product8", "bits40", "bits72", "bits128")),
    ),
    ("rotation_bits", (3.5, 4.0)),
    ("state_power", (0.25, 0.5)),
)
# beside these where a device is named: a code more costs its kernel a round of all multiprocessors, whatever it reads
DEVICE_OPTIONS: dict[str, tuple[Any, ...]] = {"centroids": ("bits64", "bits96"), "codes": (("bits64",), ("bits96",), ("bits128",))}


# where a runtime reads a byte a column: small clusters, since scoring their centroids is what its operators are fastest at
RUNTIME_FIRST = Plan(16, 8.0, "columns256", ("columns128",), 0.5, 384)
RUNTIME_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("cluster_size", (16,)),
    ("centroids", ("columns256", "columns384")),
    ("codes", (("columns96",), ("columns128",), ("columns192",), ("columns96", "columns256"))),
    ("coordinates", (256, 384, 512)),
    ("state_power", (0.25, 0.5)),
)


def options(priced: Priced) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """What is searched, by the name of its field in `Plan`."""
    if isinstance(priced, Runtime):
        return RUNTIME_OPTIONS
    return OPTIONS if priced is None else tuple((name, choices + DEVICE_OPTIONS.get(name, ())) for name, choices in OPTIONS)


def first_plan(priced: Priced) -> Plan:
    """Where the search begins."""
    return RUNTIME_FIRST if isinstance(priced, Runtime) else FIRST


def cluster_sizes(priced: Priced) -> tuple[int, ...]:
    """Sizes of clusters that the search wants tables of."""
    return tuple(options(priced)[0][1])


def own_target(target: float) -> float:
    """The share that the model's own text is held to for a promise of `target` on other text.

    It may miss a twelfth of what is promised. docs/experiments.md has the measurements that the number comes from.
    """
    return 1 - (1 - target) / STRICTNESS


@dataclass(frozen=True, eq=False)
class Data:
    """States of all sources in one array, with what the dense head makes of them."""

    states: Tensor  # [n, d]
    winners: Tensor  # [n] int64 tokens
    folds: Tensor  # [n]
    groups: tuple[Group, ...]
    sources: tuple[Source, ...]


def gather(sources: Sequence[Source], winners: Tensor, target: float) -> Data:
    """Line the sources up, beside the dense head's token of every state, [n] int64."""
    groups, start = [], 0
    for source in sources:
        n = len(source.states)
        groups.append(Group(source.name, start, start + n, allowed_misses(n, own_target(target) if source.own else target)))
        start += n
    folds = torch.cat([fold_of(len(s.states)) for s in sources])
    return Data(torch.cat([s.states for s in sources]), winners, folds, tuple(groups), tuple(sources))


def least_positions(target: float) -> int:
    """Positions of own text at which not one miss still shows a promise of `target`: with fewer it cannot be reached."""
    return least_trials(own_target(target))


def default_positions(target: float) -> int:
    """Positions of own text for a promise of `target`: POSITIONS, or as many times that as LEAST_MISSES need, at most MOST_POSITIONS."""
    choices = range(POSITIONS, MOST_POSITIONS, POSITIONS)
    return next((n for n in choices if allowed_misses(n, own_target(target)) >= LEAST_MISSES), MOST_POSITIONS)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A plan with everything fitted but its margins."""

    plan: Plan
    table: np.ndarray
    coordinates: Coordinates
    mean: Tensor
    centroids: Centroids
    layers: list[Layer]
    prepared: Prepared
    slot_of: Tensor  # [V] int64
    gates: tuple[tuple[np.ndarray, float], ...]  # coded errors and unit of each gate
    fixed: float  # cost whatever opens
    item_cost: list[float]


def fit(
    plan: Plan,
    table: np.ndarray,
    coordinates: Coordinates,
    moments: Moments,
    priced: Priced,
    row_size: int,
    seed: int,
    near: Fitted | None = None,
) -> Fitted:
    """Fit and code everything that `plan` names.

    Args:
        row_size: cost of an exact row in bytes.
        near: another plan, fitted to the same states: where the two agree, its parts are taken over.
    """
    shared = near if near is not None and (near.table is table and near.coordinates is coordinates and near.plan.centroids == plan.centroids) else None
    centroids = shared.centroids if shared else fit_centroids(coordinates, moments, table, plan.centroids, seed)
    layers = shared.layers if shared and shared.plan.codes == plan.codes else fit_layers(coordinates, centroids.values, table, plan.codes, seed)
    probe_bytes, probe_unit, probe_error = coded_errors(centroids.error)
    gates, stored = [(probe_bytes, probe_unit)], []
    for layer in layers:
        data, unit, error = coded_errors(layer.error)
        gates.append((data, unit))
        stored.append((layer.values, error.float()))
    flat = torch.from_numpy(table.reshape(-1).astype(np.int64)).to(coordinates.rows.device)
    filled = flat >= 0
    slot_of = torch.empty(int(filled.sum()), dtype=torch.int64, device=flat.device)
    slot_of[flat[filled]] = filled.nonzero()[:, 0]
    prepared = Prepared(plan.cluster_size, centroids.folds, centroids.values, probe_error.float(), tuple(stored), filled, plan.state_power)
    fixed, item_cost = prices(coordinates.rotation, centroids.coded, [x.coded for x in layers], row_size, priced)
    return Fitted(plan, table, coordinates, moments.mean, centroids, layers, prepared, slot_of, tuple(gates), fixed, item_cost)


def cost_of(f: Fitted, counts: Sequence[float]) -> float:
    """Cost of a step that opens and scores these counts, [1 + gates] as in `search.mean_counts`."""
    return f.fixed + sum(n * price for n, price in zip(counts[1:], f.item_cost))


def lifted(f: Fitted, states: Tensor) -> Tensor:
    """Coordinates z of states [N, d], [N, r] float32."""
    device = f.coordinates.lift.device
    z = (states.to(device).double() - f.mean).float() @ f.coordinates.lift[1:].float()
    z[:, 0] = 1
    return z


def needs_of(f: Fitted, data: Data, at: Tensor, progress: Progress = silent, message: str = "held-out margins") -> Tensor:
    """What the states `at` [n] need of each gate, [n, gates] float32 on the CPU, the probe by the centroids of the other fold."""
    device = f.coordinates.lift.device
    out = torch.empty(len(at), 1 + len(f.layers))
    done = 0
    for fold in (0, 1):
        for part in (data.folds[at] == fold).nonzero()[:, 0].split(256):
            rows = at[part]
            out[part] = needs(f.prepared, lifted(f, data.states[rows]), fold, f.slot_of[data.winners[rows].to(device)]).cpu()
            done += len(part)
            progress(message, done / len(at))
    return out


def traced_of(f: Fitted, data: Data, loosest: Sequence[float], seed: int) -> Traced:
    """A few random states, by which margins are priced."""
    n = max(64, min(400, TRACED_SLOTS // f.table.size, len(data.states)))
    at = torch.randperm(len(data.states), generator=torch.Generator().manual_seed(seed))[:n]
    parts = []
    for fold in (0, 1):
        parts += [(lifted(f, data.states[rows]), fold) for rows in at[data.folds[at] == fold].split(64)]
    return trace(f.prepared, parts, loosest)


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate of the search and its price at the compared agreement."""

    plan: Plan
    cost: float


def search(
    data: Data,
    moments: Moments,
    tables: dict[int, np.ndarray],
    weight: Tensor,
    bias: Tensor | None,
    priced: Priced,
    seed: int,
    progress: Progress = silent,
) -> tuple[Fitted, list[Tried]]:
    """Improve one choice of the plan at a time, by cost at equal held-out misses on a part of the states."""
    n = min(SEARCHED_STATES, len(data.states))
    at = torch.randperm(len(data.states), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    groups = [[Group("searched", 0, n, max(1, misses * n // SEARCHED_STATES))] for misses in SEARCHED_MISSES]
    made: dict[tuple[float, int | None], Coordinates] = {}
    tried: dict[Plan, tuple[float, Fitted]] = {}
    row_size = 2 * weight.shape[1] + TOKEN_BYTES
    total = 1 + sum(len(choices) - 1 for name, choices in options(priced) if name != "cluster_size") + len(tables) - 1

    def price(plan: Plan) -> float:
        if plan not in tried:
            progress(f"searching: {describe(plan)}", len(tried) / total)
            turn = (plan.rotation_bits, plan.coordinates)
            if turn not in made:
                made[turn] = fit_coordinates(weight, bias, moments, *turn)
            f = fit(plan, tables[plan.cluster_size], made[turn], moments, priced, row_size, seed, tried[best][1] if best in tried else None)
            need = needs_of(f, data, at, lambda m, s: progress(f"searching: {describe(plan)}", len(tried) / total))
            traced = traced_of(f, data, loosest(need), seed)
            counts = np.mean([mean_counts(traced, choose_margins(need, group, traced, f.item_cost)) for group in groups], 0)
            tried[plan] = (cost_of(f, counts), f)
        return tried[plan][0]

    first = first_plan(priced)
    best = dataclasses.replace(first, cluster_size=first.cluster_size if first.cluster_size in tables else next(iter(tables)))
    for name, choices in options(priced):
        for choice in tables if name == "cluster_size" else choices:
            change: dict[str, Any] = {name: choice}
            plan = dataclasses.replace(best, **change)
            if price(plan) < price(best):
                best = plan
        for plan in [p for p in tried if p != best]:  # what was fitted for losers is not needed again
            tried[plan] = (tried[plan][0], None)  # type: ignore[assignment]
    return tried[best][1], [Tried(p, c) for p, (c, _) in tried.items()]


def loosest(need: Tensor) -> list[float]:
    """A margin for each gate that is beyond what any state needs, and beyond where margins are tried about that."""
    return [float(need.max()) + MOST_OFFSET + STEP] * need.shape[1]


def describe(plan: Plan) -> str:
    """A plan in one line."""
    rows, power = " + ".join(plan.codes), f"state power {plan.state_power:g}"
    most = "" if plan.coordinates is None else f", {plan.coordinates} coordinates"
    return f"clusters of {plan.cluster_size}, rotation {plan.rotation_bits:g} bits{most}, centroids {plan.centroids}, rows {rows}, {power}"


def hard_tokens(need: Tensor, winners: Tensor, allowed: int) -> np.ndarray:
    """Tokens that the probe often turns away: at least two of the states that need it most, the most frequent first."""
    worst = need[:, 0].topk(min(len(need), 4 * max(allowed, 0) + 50)).indices
    tokens, count = winners[worst].unique(return_counts=True)
    order = count.argsort(descending=True, stable=True)
    return tokens[order][count[order] >= 2][:HARD_TOKENS].numpy()


def finish(
    f: Fitted, data: Data, target: float, weight: Tensor, bias: Tensor | None, ends: Sequence[int], fingerprint: str, seed: int, progress: Progress = silent
) -> HeadIndex:
    """Choose margins on all states, caps and the tail, and put the index together with its summary."""
    need = needs_of(f, data, torch.arange(len(data.states)), progress)
    always = np.unique(np.concatenate([hard_tokens(need, data.winners, max(g.allowed for g in data.groups)), np.asarray(ends, np.int64)])).astype(np.int32)
    need[torch.isin(data.winners, torch.from_numpy(always).long()), 0] = 0
    traced = traced_of(f, data, loosest(need), seed)
    margins = choose_margins(need, data.groups, traced, f.item_cost)
    lost = misses(need, torch.tensor(margins, dtype=torch.float32), data.groups)
    index = assemble(f, margins, always, weight.shape, fingerprint)
    _, seen = with_tail(index, data, weight, bias, seed, progress)
    caps, cut = choose_caps(index, data.states, data.winners, data.groups, weight, bias, seen, progress)
    if sum(cut):  # what the caps lose, the margins must not
        rest = [dataclasses.replace(g, allowed=g.allowed - n) for g, n in zip(data.groups, cut)]
        margins = choose_margins(need, rest, traced, f.item_cost)
        lost = [a + b for a, b in zip(misses(need, torch.tensor(margins, dtype=torch.float32), rest), cut)]
    index = with_gates(index, margins, caps)
    index, seen = with_tail(index, data, weight, bias, seed, progress)  # of the head as it is written
    frontier = [_frontier_point(t, need, data, traced, f) for t in sorted({*FRONTIER, target})]
    texts = [_text_record(g, s, m, target) for g, s, m in zip(data.groups, data.sources, lost)]
    worst = min(texts, key=lambda t: t["top1_agreement"])
    row_size = 2 * index.hidden_size
    step_bytes = bytes_per_step(index, seen, row_size)
    summary = {
        "format_version": FORMAT_VERSION,
        "head": "fitted",
        "target_agreement": target,
        "own_text_target": own_target(target),
        "plan": dataclasses.asdict(f.plan),
        "margins": margins,
        "top1_agreement": worst["top1_agreement"],
        "top1_agreement_interval": worst["top1_agreement_interval"],
        "texts": texts,
        "positions": len(data.states),
        "reached": all(g.allowed >= 0 for g in data.groups),
        "extrapolated": [name for name, n in zip(gate_names(index), (need > torch.tensor(margins)).sum(0).tolist()) if n < FEW_MISSES],
        "bytes_per_step": float(step_bytes.mean()),
        "bytes_per_step_p99": float(np.quantile(step_bytes, 0.99)),
        "dense_bytes_per_step": dense_bytes(index.vocab_size, index.hidden_size),
        "most_bytes_per_step": int(bytes_per_step(index, most_counts(index, caps)[None], row_size)[0]),
        "lost_to_caps": sum(cut),
        "fixed_bytes": fixed_bytes(index),
        "mean_counts": seen.mean(0).tolist(),
        "frontier": frontier,
        "seed": seed,
    }
    return dataclasses.replace(index, summary=summary)


def gate_names(index: HeadIndex) -> list[str]:
    """What each gate lets through, in the order of the margins."""
    return ["clusters", *(f"after {s.rows.kind} {i}" for i, s in enumerate(index.stages, 1))]


def _text_record(group: Group, source: Source, lost: int, target: float) -> dict[str, Any]:
    n = group.stop - group.start
    return {
        "name": source.name,
        "sha256": source.digest,
        "positions": n,
        "own": source.own,
        "required": own_target(target) if source.own else target,
        "misses": lost,
        "top1_agreement": 1 - lost / n,
        "top1_agreement_interval": list(wilson(n - lost, n)),
        "reached": group.allowed >= 0,
    }


def _frontier_point(target: float, need: Tensor, data: Data, traced: Traced, f: Fitted) -> dict[str, Any]:
    """What another target would cost with the same codes."""
    groups = [
        dataclasses.replace(g, allowed=allowed_misses(g.stop - g.start, own_target(target) if s.own else target)) for g, s in zip(data.groups, data.sources)
    ]
    margins = choose_margins(need, groups, traced, f.item_cost)
    cost = cost_of(f, mean_counts(traced, margins))
    lost = sum(misses(need, torch.tensor(margins, dtype=torch.float32), groups))
    return {"target_agreement": target, "held_out_agreement": 1 - lost / len(need), "cost": cost, "reached": all(g.allowed >= 0 for g in groups)}


def assemble(f: Fitted, margins: Sequence[float], always: np.ndarray, shape: Sequence[int], fingerprint: str) -> HeadIndex:
    """The index with these margins; caps wide open, the tail not yet set."""
    counts = [len(f.table)] + [f.table.size] * len(f.layers)
    gates = [Gate(data, unit, float(margin), n) for (data, unit), margin, n in zip(f.gates, margins, counts)]
    return HeadIndex(
        vocab_size=int((f.table >= 0).sum()),
        hidden_size=shape[1],
        token_table=f.table,
        centroids=f.centroids.coded,
        probe=gates[0],
        stages=tuple(Stage(layer.coded, gate) for layer, gate in zip(f.layers, gates[1:])),
        always_scored=always,
        mean=f.mean.float().cpu().numpy(),
        rotation=f.coordinates.rotation,
        tail_scale=1.0,
        tail_offset=0.0,
        fingerprint=fingerprint,
        state_power=f.plan.state_power,
    )


def with_tail(
    index: HeadIndex, data: Data, weight: Tensor, bias: Tensor | None, seed: int, progress: Progress = silent, n: int = 1024
) -> tuple[HeadIndex, np.ndarray]:
    """A tail that gives unscored tokens their share of the mass of 256 random states, and what `n` of them read.

    Returns:
        The index, and the states' counts [n, 2 + stages] as in `head.Step`.
    """
    at = torch.randperm(len(data.states), generator=torch.Generator().manual_seed(seed + 1))[:n]
    head = torch_head(index, weight, bias)
    counts: list[Tensor] = []
    offsets: list[Tensor] = []
    for i, rows in enumerate(at.split(128)):
        states = data.states[rows].to(weight.device)
        trail = run_stages(head, states)
        counts.append(trail.counts.cpu())
        if len(offsets) < 2:
            offsets.append(_tail_offset(head, states, trail, weight, bias))
        progress("what a step reads", min(1.0, (i + 1) * 128 / len(at)))
    found = torch.cat(offsets)  # empty where every state scores every token: then nothing has a tail
    return dataclasses.replace(index, tail_offset=float(found.mean()) if len(found) else 0.0), torch.cat(counts).numpy()


def _tail_offset(head: Any, states: Tensor, trail: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Log of the ratio of true to estimated mass of the tokens that no code scored, [N]."""
    index = head.index
    filled = head.token_table >= 0
    estimate = trail.clusters.repeat_interleave(index.cluster_size, 1)
    logits = torch.full_like(estimate, -torch.inf)
    true = states.float() @ weight[: index.vocab_size].float().T + (0 if bias is None else bias[: index.vocab_size].float())
    logits[:, filled] = true[:, head.token_table[filled]].double()
    unscored = filled.expand_as(estimate).clone()
    unscored[trail.row, trail.slot] = False
    some = unscored.any(1)
    gap = logits.masked_fill(~unscored, -torch.inf).logsumexp(1) - estimate.masked_fill(~unscored, -torch.inf).logsumexp(1)
    return gap[some]


def check_settings(target: float, positions: int) -> None:
    """Raise SettingsError for what cannot be asked for."""
    if not 0.5 <= target < 1:
        raise SettingsError(f"target agreement is {target:g}, expected 0.5 to below 1; 1 is the dense head itself (flashhead generate --exact)")
    if positions < 1000:
        raise SettingsError(f"positions is {positions}, expected at least 1,000, since margins are set by misses; give more")
