"""The three stages of a head in plain torch: the definition of correct. Everything else is tested against this file.

All sums are made in float64 and exact logits are rounded once to float32, so that neither the batch nor its
neighbours change a token. A stage decodes only the rows that some state of the batch still needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_edge.coding import TorchCoded, decode, to_torch
from flashhead_edge.head import Step
from flashhead_edge.index import Gate, HeadIndex, own_error, slot_of_token

BELOW = 2.0**-7  # of 1 + the smallest exact logit's size: two steps of bfloat16, so that rounding makes no ties
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


def keep(scores: Tensor, alive: Tensor, gate: TorchGate, unit: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which items pass a gate.

    Args:
        scores: [N, M] float64; only those where `alive` [N, M] count.
        unit: [N, 1] from `state_unit`.
        columns: [M] the items' numbers in the gate, or None where M is all of them.
    Returns:
        [N, M] bool; [N] bool, where the cap cut off items within the margin. Under a cap those with the smallest
        gap in own errors stay, the first of equals.
    """
    error = gate.error if columns is None else gate.error[columns]
    best = scores.masked_fill(~alive, -torch.inf).amax(1, keepdim=True)
    gap = ((best - scores) / (error * unit)).masked_fill(~alive, torch.inf)
    passed = alive & (gap <= gate.margin)
    over = passed.sum(1) > gate.cap
    if bool(over.any()):
        order = gap[over].masked_fill(~passed[over], torch.inf).sort(dim=1, stable=True).indices[:, : gate.cap]
        passed[over] &= torch.zeros_like(passed[over]).scatter_(1, order, True)
    return passed, over


@dataclass(frozen=True, eq=False)
class Trail:
    """What the stages did to N states: the end of one step before anything is packed for a caller."""

    clusters: Tensor  # [N, K] float64 scores of the clusters
    slots: Tensor  # [M] int64, ascending: slots that some state scored by a code or exactly
    scores: Tensor  # [N, M] float64: the sharpest coded score of each slot
    scored: Tensor  # [N, M] bool: where a code scored it
    exact: Tensor  # [N, M] bool: rows that are left for the exact stage
    logits: Tensor  # [N, M] float32 exact logits, -inf elsewhere
    counts: Tensor  # [N, 2 + stages] int64
    capped: Tensor  # [N] bool


def run_stages(head: TorchHead, hidden: Tensor) -> Trail:
    """Probe, score and rescore hidden states [N, d]."""
    z = coordinates(head, hidden)
    unit = state_unit(head, z)
    clusters = probe(head, z)
    opened, capped = keep(clusters, torch.ones_like(clusters, dtype=torch.bool), head.probe, unit)
    counts = [opened.sum(1)]
    size = head.index.cluster_size
    wanted = opened.any(0)
    columns = torch.arange(len(head.token_table), device=z.device)[wanted.repeat_interleave(size) & (head.token_table >= 0)]
    columns = torch.cat([columns, head.always_slots]).unique()
    alive = opened[:, columns // size] | torch.isin(columns, head.always_slots)
    slots, scored = columns, alive if head.stages else torch.zeros_like(alive)
    scores = clusters[:, columns // size]
    at = torch.arange(len(columns), device=z.device)  # where the columns still alive stand among `slots`
    for rows, gate in head.stages:
        counts.append(alive.sum(1))
        now = scores[:, at] + _products(z, rows, columns)
        scores[:, at] = torch.where(alive, now, scores[:, at])
        passed, over = keep(now, alive, gate, unit, columns)
        capped = capped | over
        some = passed.any(0)
        at, columns, alive = at[some], columns[some], passed[:, some]
    counts.append(alive.sum(1))
    exact = torch.zeros(len(z), len(slots), dtype=torch.bool, device=z.device)
    exact[:, at] = alive
    logits = torch.full(exact.shape, -torch.inf, dtype=torch.float32, device=z.device)
    logits[:, at] = exact_logits(head.weight, head.bias, hidden, head.token_table[columns]).masked_fill(~alive, -torch.inf)
    return Trail(clusters, slots, scores, scored, exact, logits, torch.stack(counts, 1), capped)


def _products(z: Tensor, rows: TorchCoded, slots: Tensor) -> Tensor:
    """decode(slot) . z, [N, M] float64."""
    part = z[:, : rows.columns]
    block = max(1, DECODED_BYTES // (8 * rows.columns))
    return torch.cat([part @ decode(rows, s).double().T for s in slots.split(block)], 1) if len(slots) else part[:, :0]


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
    tokens = head.token_table[trail.slots]
    order = tokens.argsort()
    tokens, exact, logits = tokens[order], trail.exact[:, order], trail.logits[:, order]
    width = int(exact.sum(1).max())
    # candidates to the front of each row, in the order of their ids
    front = (~exact).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    here = exact.gather(1, front)
    ids = tokens[front].masked_fill(~here, -1)
    values = logits.gather(1, front).masked_fill(~here, -torch.inf)
    return Step(greedy(ids, values), ids, values, trail.counts, trail.capped)


def greedy(ids: Tensor, logits: Tensor) -> Tensor:
    """The token of the largest logit, the smaller id on ties: ids and logits [N, C] -> [N] int64."""
    best = logits == logits.amax(1, keepdim=True)
    return ids.masked_fill(~best, torch.iinfo(torch.int64).max).amin(1)


def full_logits(head: TorchHead, hidden: Tensor) -> Tensor:
    """Full-width raw logits [N, V] float32, all finite.

    Exact where the step scored exactly; a coded score where a code scored; else the cluster's score, scaled and
    shifted by the calibrated tail. The last two stay below the smallest exact logit, also after rounding to bfloat16.
    """
    return widened(head, run_stages(head, hidden))


def widened(head: TorchHead, trail: Trail) -> Tensor:
    """A trail at full width: see `full_logits`."""
    n, index = len(trail.clusters), head.index
    tail = trail.clusters * index.tail_scale + index.tail_offset
    wide = tail.repeat_interleave(index.cluster_size, 1)
    wide[:, trail.slots] = torch.where(trail.scored, trail.scores, wide[:, trail.slots])
    lowest = trail.logits.masked_fill(~trail.exact, torch.inf).amin(1, keepdim=True)
    ceiling = lowest - BELOW * (1 + lowest.abs())
    wide = torch.minimum(wide.float(), ceiling)
    wide[:, trail.slots] = torch.where(trail.exact, trail.logits, wide[:, trail.slots])
    filled = head.token_table >= 0
    out = torch.empty(n, index.vocab_size, dtype=torch.float32, device=wide.device)
    out[:, head.token_table[filled]] = wide[:, filled]
    return out


def dense_logits(weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab_size: int) -> Tensor:
    """The dense head: every row scored exactly, padding left out, [N, V] float32."""
    return exact_logits(weight, bias, hidden, torch.arange(vocab_size, device=weight.device))


def dense_tokens(weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab_size: int, near: int = 8) -> Tensor:
    """The dense head's greedy tokens, [N] int64: those of `dense_logits`, found faster.

    A pass in float32 finds the `near` best; their float64 sums settle ties and near ties, the smaller id on equals.
    """
    matrix, out = weight[:vocab_size].float(), []
    for h in hidden.split(512):
        rough = h.float() @ matrix.T
        if bias is not None:
            rough = rough + bias[:vocab_size].float()
        ids = rough.topk(min(near, vocab_size), dim=1).indices.sort(1).values
        exact = (weight[ids].double() @ h.double()[:, :, None])[:, :, 0]
        if bias is not None:
            exact = exact + bias[ids].double()
        out.append(greedy(ids, exact.float()))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.int64)
