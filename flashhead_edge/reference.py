"""The three stages of a head in plain torch: the definition of correct. Everything else is tested against this file.

All sums are made in float64 and exact logits are rounded once to float32, so that neither the batch nor its
neighbours change a token. A stage decodes only the rows that some state of the batch still needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_edge.coding import TorchCoded, decode, to_torch
from flashhead_edge.errors import SettingsError
from flashhead_edge.head import Step
from flashhead_edge.index import Gate, HeadIndex, own_error, slot_of_token

BELOW = 2.0**-7  # of 1 + an exact logit's size: two steps of bfloat16, so that rounding makes no ties
NEAR = 1e-4  # of 1 + the largest logit's size: far more than a float32 sum is wrong by
SETTLED = 8  # best tokens of a float32 pass whose order float64 settles
DECODED_BYTES = 64 << 20  # rows are decoded in blocks of about this size


@dataclass(frozen=True, eq=False)
class TorchGate:
    """A `Gate` on a device, its errors in logits."""

    error: Tensor  # [n] float64
    margin: float
    cap: int


@dataclass(frozen=True, eq=False)
class TorchHead:
    """A head on a device: the index as tensors, beside the model's own matrix (never a copy of it)."""

    index: HeadIndex
    weight: Tensor  # [V or more, d]: the model's own parameter
    bias: Tensor | None  # [V or more]
    token_table: Tensor  # [slots] int64, -1 = empty
    always_slots: Tensor  # [A] int64
    mean: Tensor | None
    rotation: Tensor | None  # [d, r - 1] float64, decoded
    centroids: Tensor  # [K, columns] float32, decoded
    probe: TorchGate
    stages: tuple[tuple[TorchCoded, TorchGate], ...]

    def step(self, hidden: Tensor) -> Step:
        return step(self, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return full_logits(self, hidden)

    def step_with_logits(self, hidden: Tensor) -> tuple[Step, Tensor]:
        return step_with_logits(self, hidden)


def torch_head(index: HeadIndex, weight: Tensor, bias: Tensor | None = None) -> TorchHead:
    """Put `index` on the device of `weight` [V or more, d], the model's own matrix."""
    device = weight.device

    def gate(g: Gate) -> TorchGate:
        return TorchGate(torch.from_numpy(own_error(g)).to(device), g.margin, g.cap)

    return TorchHead(
        index=index,
        weight=weight,
        bias=bias,
        token_table=torch.from_numpy(index.token_table.reshape(-1)).long().to(device),
        always_slots=torch.from_numpy(slot_of_token(index)[index.always_scored]).to(device),
        mean=None if index.mean is None else torch.from_numpy(index.mean).double().to(device),
        rotation=None if index.rotation is None else decode(to_torch(index.rotation, device)).double(),
        centroids=decode(to_torch(index.centroids, device)),
        probe=gate(index.probe),
        stages=tuple((to_torch(s.rows, device), gate(s.gate)) for s in index.stages),
    )


def coordinates(head: TorchHead, hidden: Tensor) -> Tensor:
    """What stages 1 and 2 see of hidden states [N, d]: z [N, r] float64."""
    h = hidden.double()
    if head.rotation is None or head.mean is None:
        return h
    z = (h - head.mean) @ head.rotation
    return torch.cat([torch.ones_like(z[:, :1]), z], 1)


def state_unit(head: TorchHead, z: Tensor) -> Tensor:
    """What a state's margins are multiplied by, [N, 1] float64: long states have larger errors everywhere."""
    power = head.index.state_power
    return z[:, 1:].square().mean(1, keepdim=True).sqrt() ** power if power else torch.ones_like(z[:, :1])


def probe(head: TorchHead, z: Tensor) -> Tensor:
    """Scores of the clusters, [N, K] float64."""
    return z[:, : head.centroids.shape[1]] @ head.centroids.double().T


def keep(scores: Tensor, row: Tensor, column: Tensor, gate: TorchGate, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Which items pass a gate.

    Args:
        scores: [M] float64, one an item.
        row, column: [M] int64: the item's state, and its number in the gate; ascending by state, then number.
        unit: [N, 1] from `state_unit`.
    Returns:
        [M] bool; [N] bool, where the cap cut off items within the margin. Under a cap those with the smallest gap in
        own errors stay, the first of equals.
    """
    n = len(unit)
    best = scores.new_full((n,), -torch.inf).scatter_reduce(0, row, scores, "amax")
    gap = (best[row] - scores) / (gate.error[column] * unit[row, 0])
    passed = gap <= gate.margin
    over = row[passed].bincount(minlength=n) > gate.cap
    if bool(over.any()):
        at = (passed & over[row]).nonzero()[:, 0]
        at = at[gap[at].sort(stable=True).indices]
        at = at[row[at].sort(stable=True).indices]
        passed[at[places(row[at], n) >= gate.cap]] = False
    return passed, over


def places(row: Tensor, n: int) -> Tensor:
    """The place of each item among those of its state: `row` [M] ascending, of `n` states -> [M] int64."""
    count = row.bincount(minlength=n)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]


@dataclass(frozen=True, eq=False)
class Trail:
    """What the stages did to N states: the end of one step before anything is packed for a caller.

    An item is a state with a slot that was opened for it or is always scored: M of them, by state, then slot.
    """

    clusters: Tensor  # [N, K] float64 scores of the clusters
    row: Tensor  # [M] int64, the state
    slot: Tensor  # [M] int64
    score: Tensor  # [M] float64: the sharpest coded score; where there is no code, the cluster's
    exact: Tensor  # [M] bool: rows that are left for the exact stage
    logit: Tensor  # [M] float32 exact logits, -inf elsewhere
    counts: Tensor  # [N, 2 + stages] int64
    capped: Tensor  # [N] bool


def run_stages(head: TorchHead, hidden: Tensor) -> Trail:
    """Probe, score and rescore hidden states [N, d]."""
    n, size = len(hidden), head.index.cluster_size
    z = coordinates(head, hidden)
    unit = state_unit(head, z)
    clusters = probe(head, z)
    every = torch.arange(n, device=z.device)
    row, column = every.repeat_interleave(clusters.shape[1]), torch.arange(clusters.shape[1], device=z.device).repeat(n)
    passed, capped = keep(clusters.flatten(), row, column, head.probe, unit)
    counts = [row[passed].bincount(minlength=n)]
    row, slot = opened_slots(head, passed.view(clusters.shape))
    score = clusters[row, slot // size]
    at = torch.arange(len(row), device=z.device)  # the items that are still alive
    for rows, gate in head.stages:
        counts.append(row[at].bincount(minlength=n))
        score[at] += _products(z, rows, row[at], slot[at])
        passed, over = keep(score[at], row[at], slot[at], gate, unit)
        capped = capped | over
        at = at[passed]
    counts.append(row[at].bincount(minlength=n))
    exact = torch.zeros(len(row), dtype=torch.bool, device=z.device)
    exact[at] = True
    logit = torch.full((len(row),), -torch.inf, dtype=torch.float32, device=z.device)
    needed, which = distinct(head.token_table[slot[at]], head.index.vocab_size)
    logit[at] = exact_logits(head.weight, head.bias, hidden, needed)[row[at], which]
    return Trail(clusters, row, slot, score, exact, logit, torch.stack(counts, 1), capped)


def opened_slots(head: TorchHead, opened: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of opened clusters [N, K] and those always scored, empty ones left out: state and slot [M], ascending."""
    wanted = opened.repeat_interleave(head.index.cluster_size, 1)
    wanted[:, head.always_slots] = True
    row, slot = (wanted & (head.token_table >= 0)).nonzero(as_tuple=True)
    return row, slot


def distinct(numbers: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The distinct ones of `numbers` [M], all below `most`, ascending, and where each of the M stands among them."""
    there = torch.zeros(most, dtype=torch.bool, device=numbers.device)
    there[numbers] = True
    return there.nonzero()[:, 0], (there.cumsum(0) - 1)[numbers]


def _products(z: Tensor, rows: TorchCoded, row: Tensor, slot: Tensor) -> Tensor:
    """decode(slot) . z of each item [M], float64."""
    needed, which = distinct(slot, len(rows.arrays["data"]))
    part = z[:, : rows.columns]
    block = max(1, DECODED_BYTES // (8 * rows.columns))
    wide = [part @ decode(rows, s).double().T for s in needed.split(block)]
    return torch.cat(wide, 1)[row, which] if wide else z.new_zeros(0)


def exact_logits(weight: Tensor, bias: Tensor | None, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The model's own rows times hidden states [N, d]: summed in float64, rounded once, [N, M] float32."""
    h = hidden.double()
    block = max(1, DECODED_BYTES // (8 * h.shape[1]))
    parts = [h @ weight[t].double().T + (0.0 if bias is None else bias[t].double()) for t in tokens.split(block)]
    return torch.cat(parts, 1).float() if parts else h.new_zeros(len(h), 0, dtype=torch.float32)


def step(head: TorchHead, hidden: Tensor) -> Step:
    """One step for hidden states [N, d]: see `head.Step`."""
    return packed(head, run_stages(head, hidden))


def step_with_logits(head: TorchHead, hidden: Tensor) -> tuple[Step, Tensor]:
    """`step` and `full_logits` of hidden states [N, d] in one."""
    trail = run_stages(head, hidden)
    return packed(head, trail), widened(head, trail)


def packed(head: TorchHead, trail: Trail) -> Step:
    """A trail as callers see it: candidates in the order of their ids."""
    n = len(trail.clusters)
    if n and int(trail.counts[:, -1].min()) == 0:  # the best item always passes, unless no item can be compared
        raise SettingsError("head: a hidden state is not finite, expected numbers; look at the model that made it")
    row, token, logit = trail.row[trail.exact], head.token_table[trail.slot[trail.exact]], trail.logit[trail.exact]
    order = (row * head.index.vocab_size + token).argsort()
    row, token, logit = row[order], token[order], logit[order]
    place = places(row, n)
    width = int(trail.counts[:, -1].max()) if n else 1
    ids = token.new_full((n, width), -1)
    values = logit.new_full((n, width), -torch.inf)
    ids[row, place], values[row, place] = token, logit
    return Step(greedy(ids, values), ids, values, trail.counts, trail.capped)


def greedy(ids: Tensor, logits: Tensor) -> Tensor:
    """The token of the largest logit, the smaller id on ties: ids and logits [N, C] -> [N] int64."""
    best = logits == logits.amax(1, keepdim=True)
    return ids.masked_fill(~best, torch.iinfo(torch.int64).max).amin(1)


def full_logits(head: TorchHead, hidden: Tensor) -> Tensor:
    """Full-width raw logits [N, V] float32, all finite.

    Exact where the step scored exactly; a coded score where a code scored, below the best exact logit; else the cluster's
    score, scaled and shifted by the calibrated tail, below the smallest exact logit. Below also after rounding to bfloat16.
    """
    return widened(head, run_stages(head, hidden))


def widened(head: TorchHead, trail: Trail) -> Tensor:
    """A trail at full width: see `full_logits`."""
    index, filled = head.index, head.token_table >= 0
    row, slot, logit = trail.row[trail.exact], trail.slot[trail.exact], trail.logit[trail.exact]
    lowest = logit.new_full((len(trail.clusters),), torch.inf).scatter_reduce(0, row, logit, "amin")
    best = logit.new_full((len(trail.clusters),), -torch.inf).scatter_reduce(0, row, logit, "amax")
    tail = (trail.clusters * index.tail_scale + index.tail_offset).float()
    wide = below(tail, lowest[:, None]).repeat_interleave(index.cluster_size, 1)
    if head.stages:
        wide[trail.row, trail.slot] = below(trail.score.float(), best[trail.row])
    wide[row, slot] = logit
    out = torch.empty(len(wide), index.vocab_size, dtype=torch.float32, device=wide.device)
    out[:, head.token_table[filled]] = wide[:, filled]
    return out


def below(x: Tensor, exact: Tensor) -> Tensor:
    """Logits `x`, those near or above `exact` pressed together below it in their order; others stay as they are."""
    ceiling = exact - BELOW * (1 + exact.abs())
    return torch.where(x > ceiling - 1, ceiling - torch.exp(ceiling - 1 - x), x)


def dense_logits(weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab_size: int) -> Tensor:
    """The dense head: every row scored exactly, padding left out, [N, V] float32."""
    return exact_logits(weight, bias, hidden, torch.arange(vocab_size, device=weight.device))


def dense_tokens(weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab_size: int) -> Tensor:
    """The dense head's greedy tokens, [N] int64: those of `dense_logits`, found faster."""
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    matrix, out = weight.float().T, []
    for h in hidden.split(512):
        rough = h.float() @ matrix
        out.append(settled(weight, bias, h, rough if bias is None else rough + bias.float()))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.int64)


def settled(weight: Tensor, bias: Tensor | None, hidden: Tensor, rough: Tensor) -> Tensor:
    """The dense head's greedy tokens [N] of states whose logits `rough` [N, V] were summed in float32.

    The float64 sums of the few best settle ties and near ties, the smaller id on equals.
    """
    top = rough.topk(min(SETTLED, rough.shape[1]), dim=1)
    ids = top.indices.sort(1).values
    exact = (weight[ids].double() @ hidden.double()[:, :, None])[:, :, 0]
    token = greedy(ids, (exact if bias is None else exact + bias[ids].double()).float())
    tied = top.values[:, -1] >= top.values[:, 0] - NEAR * (1 + top.values[:, 0].abs())  # more may be as near as those
    if ids.shape[1] < rough.shape[1] and bool(tied.any()):
        token[tied] = dense_logits(weight, bias, hidden[tied], rough.shape[1]).argmax(1)
    return token
