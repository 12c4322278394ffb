"""The head as ONNX functions: probe, score, rescore, decode, and full-width logits. One description for all dialects.

The functions say in operators what `reference.py` says in torch, in float32 where that sums in float64. Items of a
stage stand in a matrix [N, W], a row a state, with a mask of what is real: how wide it is, a dialect decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.arrays import Grid, grid
from flashhead_edge.export.dialects import Dialect, Selected, static_width
from flashhead_edge.export.graph import Function, Ops, function
from flashhead_edge.index import Gate, HeadIndex, own_error, slot_of_token
from flashhead_edge.reference import BELOW

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True, eq=False)
class HeadFunctions:
    """A head in one dialect."""

    probe: Function
    score: Function  # what is left for the exact stage
    score_all: Function  # the same, and every coded score: what full-width logits are made from
    rescore: Function
    decode: Function
    widen: Function


def head_functions(index: HeadIndex, rows: Any, bias: np.ndarray | None, dialect: Dialect) -> HeadFunctions:
    """All stages of an index.

    Args:
        rows: the model's own matrix [V or more, d], float16, bfloat16 or float32: an array, or a tensor that is read when it is written.
        bias: [V or more] float32.
    """

    def make(name: str, inputs: tuple[str, ...], body: Any, doc: str) -> Function:
        return function(name, inputs, body, dialect.imports, doc)

    return HeadFunctions(
        probe=make(
            "Probe",
            ("hidden_states",),
            lambda op, h: probe(op, h, index, dialect),
            "Scores of all clusters, and those that open.",
        ),
        score=make(
            "Score",
            ("z", "unit", "clusters", "opened", "opened_valid", "kept"),
            lambda op, *x: score(op, *x, index=index, dialect=dialect, everything=False),
            "The coded rows of what opened, code after code.",
        ),
        score_all=make(
            "Score",
            ("z", "unit", "clusters", "opened", "opened_valid", "kept"),
            lambda op, *x: score(op, *x, index=index, dialect=dialect, everything=True),
            "The coded rows of what opened, code after code, and every coded score.",
        ),
        rescore=make(
            "Rescore",
            ("hidden_states", "tokens"),
            lambda op, h, t: {"logits": rescore(op, h, t, rows, bias)},
            "The model's own rows times the hidden states.",
        ),
        decode=make(
            "Decode",
            ("tokens", "logits", "valid"),
            lambda op, *x: decode(op, *x, vocab_size=index.vocab_size, dialect=dialect),
            "The greedy token, and the candidates in the order of their ids.",
        ),
        widen=make(
            "Widen",
            ("clusters", "scored_tokens", "scores", "scored", "tokens", "exact", "valid"),
            lambda op, *x: widen(op, *x, index=index),
            "A finite logit for every token.",
        ),
    )


def probe(op: Ops, hidden: ir.Value, index: HeadIndex, dialect: Dialect) -> dict[str, ir.Value]:
    """Coordinates, the state's unit, the clusters' scores, and which clusters open."""
    z, power = hidden, None
    if index.rotation is not None and index.mean is not None:
        turn = grid(index.rotation)
        x = op.Sub(hidden, op.weight("mean", index.mean))
        if turn.scale is not None:
            x = op.Mul(x, op.weight("rotation.scale", turn.scale))
        turned = dialect.product(op, x, "rotation", turn.whole)
        if turn.half:
            turned = op.Add(turned, op.Mul(op.ReduceSum(x, op.ints(1), keepdims=1), op.const(turn.half)))
        turned = op.Mul(turned, op.weight("rotation.steps", turn.steps))
        z = op.Pad(turned, op.ints(0, 1, 0, 0), op.const(1.0))
        if index.state_power:
            mean = op.Mul(op.ReduceSum(op.Mul(turned, turned), op.ints(1), keepdims=1), op.const(1 / turn.columns))
            power = op.Pow(mean, op.const(index.state_power / 2))
    unit = power if power is not None else op.Add(op.Mul(op.Slice(z, op.ints(0), op.ints(1), op.ints(1)), op.const(0.0)), op.const(1.0))
    centroids = grid(index.centroids)
    zs, half = _scaled(op, z, centroids, "centroids", _coordinates(index))
    clusters = dialect.product(op, zs, "centroids", np.ascontiguousarray(centroids.whole.T))
    if half is not None:
        clusters = op.Add(clusters, half)
    if centroids.scale is not None:
        clusters = op.Mul(clusters, op.weight("centroids.scale", centroids.scale))
    gap = op.Mul(op.Sub(op.ReduceMax(clusters, op.ints(1), keepdims=1), clusters), op.weight("centroids.nearness", _nearness(index.probe)))
    chosen = dialect.select(op, gap, _bound(op, unit, index.probe), None, index.probe.cap, index.n_clusters)
    return {
        "z": z, "unit": unit, "clusters": clusters, "opened": _places(op, chosen, gap), "opened_valid": chosen.valid,
        "kept": chosen.kept, "opened_count": chosen.count, "probe_capped": chosen.capped,
    }  # fmt: skip


def score(
    op: Ops,
    z: ir.Value,
    unit: ir.Value,
    clusters: ir.Value,
    opened: ir.Value,
    opened_valid: ir.Value,
    kept: ir.Value,
    *,
    index: HeadIndex,
    dialect: Dialect,
    everything: bool,
) -> dict[str, ir.Value]:
    """The cascade over the slots of opened clusters and those always scored: what is left for the exact stage, and all coded scores if `everything`."""
    size, always = index.cluster_size, index.always_scored.size
    table = index.token_table.astype(np.int64)
    width = static_width(index.probe.cap, index.n_clusters) * size + always  # in dialects whose widths are fixed
    # slots [N, P, size]: of an opened cluster, one after the other
    slots = op.Reshape(op.Add(op.Unsqueeze(op.Mul(opened, op.const(size, np.int64)), op.ints(2)), op.const(np.arange(size), np.int64)), op.ints(0, -1))
    real = op.Expand(op.Unsqueeze(opened_valid, op.ints(2)), op.ints(1, 1, size))
    if (table < 0).any():
        real = op.And(real, op.Gather(op.weight("filled", table >= 0), opened, axis=0))
    real = op.Reshape(real, op.ints(0, -1))
    scores = nearness = None
    if index.stages:
        first = grid(index.stages[0].rows)
        zs, half = _scaled(op, z, first, "stage1", _coordinates(index))
        blocks = np.ascontiguousarray(first.whole.reshape(index.n_clusters, size, -1).transpose(0, 2, 1))
        wide = dialect.block_product(op, zs, "stage1", blocks, opened)
        if half is not None:
            wide = op.Add(wide, op.Unsqueeze(half, op.ints(2)))
        if first.scale is not None:
            wide = op.Mul(wide, op.Gather(op.weight("stage1.scale", first.scale.reshape(-1, size)), opened, axis=0))
        scores = op.Reshape(op.Add(wide, op.Unsqueeze(dialect.pick(op, clusters, opened), op.ints(2))), op.ints(0, -1))
        near = _nearness(index.stages[0].gate)
        nearness = op.Reshape(op.Gather(op.weight("stage1.nearness", near.reshape(-1, size)), opened, axis=0), op.ints(0, -1))
    if always:
        fixed = slot_of_token(index)[index.always_scored]
        home = op.weight("always.cluster", fixed // size)
        outside = op.Not(op.Gather(kept, home, axis=1))
        rows = op.Shape(outside)
        if scores is not None:
            wide = dialect.product(op, zs, "always.rows", np.ascontiguousarray(first.whole[fixed].T))
            if half is not None:
                wide = op.Add(wide, half)
            if first.scale is not None:
                wide = op.Mul(wide, op.weight("always.scale", first.scale[fixed]))
            scores = op.Concat(scores, op.Add(wide, op.Gather(clusters, home, axis=1)), axis=1)
            nearness = op.Concat(nearness, op.Expand(op.weight("always.nearness", near[fixed][None]), rows), axis=1)
        slots = op.Concat(slots, op.Expand(op.weight("always.slots", fixed[None]), rows), axis=1)
        real = op.Concat(real, outside, axis=1)
    out: dict[str, ir.Value] = {}
    counts, capped = [], []
    tokens = op.weight("token_of_slot", np.maximum(table.reshape(-1), 0))
    if index.stages:
        counts.append(op.ReduceSum(op.Cast(real, to=FLOAT), op.ints(1), keepdims=0))
        latest, place = scores, None  # each item's sharpest score, and where among all items the present ones stand
        all_slots, all_real = slots, real
        for i, stage in enumerate(index.stages):
            if i:
                code = grid(stage.rows)
                zs, half = _scaled(op, z, code, f"stage{i + 1}", _coordinates(index))
                more = dialect.row_product(op, zs, f"stage{i + 1}", code.whole, slots)
                if half is not None:
                    more = op.Add(more, half)
                near = _nearness(stage.gate)
                both = np.stack([near if code.scale is None else code.scale, near], 1).astype(np.float32)
                scale, nearness = op.Split(op.Gather(op.weight(f"stage{i + 1}.scale_nearness", both), slots, axis=0), _outputs=2, axis=2, num_outputs=2)
                nearness = op.Squeeze(nearness, op.ints(2))
                if code.scale is not None:
                    more = op.Mul(more, op.Squeeze(scale, op.ints(2)))
                scores = op.Add(scores, more)
                if everything and place is None:  # all stand where they stood
                    latest = op.Where(real, scores, latest)
                elif everything:
                    latest = op.ScatterElements(latest, place, op.Where(real, scores, dialect.pick(op, latest, place)), axis=1)
            best = op.ReduceMax(op.Where(real, scores, op.const(np.float32(-3e38))), op.ints(1), keepdims=1)
            gap = op.Mul(op.Sub(best, scores), nearness)
            chosen = dialect.select(op, gap, _bound(op, unit, stage.gate), real, stage.gate.cap, width)
            counts.append(chosen.count)
            capped.append(chosen.capped)
            if chosen.at is not None:
                width = static_width(stage.gate.cap, width)
                slots = dialect.pick(op, slots, chosen.at)
                if everything:
                    place = chosen.at if place is None else dialect.pick(op, place, chosen.at)
                if i + 1 < len(index.stages):
                    scores = dialect.pick(op, scores, chosen.at)
            real = chosen.valid
        if everything:
            out["scored_tokens"], out["scores"], out["scored"] = op.Gather(tokens, all_slots, axis=0), latest, all_real  # type: ignore[assignment]
        counts[1:] = [op.Min(c, op.const(float(s.gate.cap))) for c, s in zip(counts[1:], index.stages)]
    else:
        counts.append(op.ReduceSum(op.Cast(real, to=FLOAT), op.ints(1), keepdims=0))
    out["tokens"], out["valid"] = op.Gather(tokens, slots, axis=0), real
    out["scored_counts"] = op.Cast(op.Concat(*[op.Unsqueeze(c, op.ints(1)) for c in counts], axis=1), to=INT64)
    if capped:
        some = capped[0]
        for c in capped[1:]:
            some = op.Or(some, c)
        out["scored_capped"] = some
    return out


def rescore(op: Ops, hidden: ir.Value, tokens: ir.Value, rows: Any, bias: np.ndarray | None) -> ir.Value:
    """Exact logits of tokens [N, M], or [1, M] for all states alike: [N, M] float32."""
    matrix = op.weight("rows", rows)
    picked = op.Gather(matrix, tokens, axis=0)
    if matrix.dtype != FLOAT:
        picked = op.Cast(picked, to=FLOAT)
    logits = op.Squeeze(op.MatMul(picked, op.Unsqueeze(hidden, op.ints(2))), op.ints(2))
    return logits if bias is None else op.Add(logits, op.Gather(op.weight("bias", bias), tokens, axis=0))


def decode(op: Ops, tokens: ir.Value, logits: ir.Value, valid: ir.Value, *, vocab_size: int, dialect: Dialect) -> dict[str, ir.Value]:
    """The largest logit's token, the smaller id on ties; candidates ascending, then -1."""
    real = op.Where(valid, logits, op.const(-np.inf))
    beyond = op.const(vocab_size, np.int64)
    best = op.Equal(real, op.ReduceMax(real, op.ints(1), keepdims=1))
    token = op.ReduceMin(op.Where(op.And(best, valid), tokens, beyond), op.ints(1), keepdims=0)
    ids, at = op.TopK(op.Where(valid, tokens, beyond), op.Shape(tokens, start=1, end=2), _outputs=2, largest=0, sorted=1)
    none = op.Equal(ids, beyond)
    return {"token": token, "candidate_ids": op.Where(none, op.const(-1, np.int64), ids), "candidate_logits": dialect.pick(op, real, at)}


def widen(
    op: Ops,
    clusters: ir.Value,
    scored_tokens: ir.Value,
    scores: ir.Value,
    scored: ir.Value,
    tokens: ir.Value,
    logits: ir.Value,
    valid: ir.Value,
    *,
    index: HeadIndex,
) -> dict[str, ir.Value]:
    """Full-width logits [N, V], every one finite: see `reference.full_logits`."""
    lowest = op.ReduceMin(op.Where(valid, logits, op.const(np.float32(3e38))), op.ints(1), keepdims=1)
    best = op.ReduceMax(op.Where(valid, logits, op.const(np.float32(-3e38))), op.ints(1), keepdims=1)
    tail = op.Add(op.Mul(clusters, op.const(index.tail_scale)), op.const(index.tail_offset))
    cluster_of_token = (slot_of_token(index) // index.cluster_size).astype(np.int64)
    full = op.Gather(_below(op, tail, lowest), op.weight("cluster_of_token", cluster_of_token), axis=1)
    # what is not real is written to a real exact token, which the last scatter overwrites
    first = op.ReduceMax(op.Where(valid, tokens, op.const(-1, np.int64)), op.ints(1), keepdims=1)
    if index.stages:
        coded = op.Where(scored, _below(op, scores, best), best)
        full = op.ScatterElements(full, op.Where(scored, scored_tokens, first), coded, axis=1)
    of_first = op.ReduceMax(op.Where(op.And(valid, op.Equal(tokens, first)), logits, op.const(np.float32(-3e38))), op.ints(1), keepdims=1)
    return {"logits": op.ScatterElements(full, op.Where(valid, tokens, first), op.Where(valid, logits, of_first), axis=1)}


def _below(op: Ops, x: ir.Value, exact: ir.Value) -> ir.Value:
    """Logits near or above `exact` pressed together below it in their order: see `reference.below`."""
    ceiling = op.Sub(exact, op.Mul(op.Add(op.Abs(exact), op.const(1.0)), op.const(BELOW)))
    edge = op.Sub(ceiling, op.const(1.0))
    pressed = op.Sub(ceiling, op.Exp(op.Min(op.Sub(edge, x), op.const(0.0))))
    return op.Where(op.Greater(x, edge), pressed, x)


def _scaled(op: Ops, z: ir.Value, code: Grid, name: str, coordinates: int) -> tuple[ir.Value, ir.Value | None]:
    """z times the steps of a code's columns [N, columns], and what the grid's halves add to every row's sum [N, 1]."""
    if code.columns < coordinates:
        z = op.Slice(z, op.ints(0), op.ints(code.columns), op.ints(1))
    if code.whole.dtype == np.float16:
        return z, None
    zs = op.Mul(z, op.weight(f"{name}.steps", code.steps))
    return zs, op.Mul(op.ReduceSum(zs, op.ints(1), keepdims=1), op.const(code.half)) if code.half else None


def _coordinates(index: HeadIndex) -> int:
    return index.hidden_size if index.rotation is None else index.rotation.columns + 1


def _nearness(gate: Gate) -> np.ndarray:
    """One over the items' own errors, [n] float32: a gap times it is what margins are counted in."""
    return (1 / own_error(gate)).astype(np.float32)


def _bound(op: Ops, unit: ir.Value, gate: Gate) -> ir.Value:
    """What a gap may be, [N, 1]: an infinite margin is a large number, so that no sum becomes NaN."""
    return op.Mul(unit, op.const(min(gate.margin, 1e30) if math.isfinite(gate.margin) else 1e30))


def _places(op: Ops, chosen: Selected, like: ir.Value) -> ir.Value:
    """Places of what was selected [N, k], where all stay in theirs as numbers."""
    if chosen.at is not None:
        return chosen.at
    every = op.Range(op.const(0, np.int64), op.Squeeze(op.Shape(like, start=1, end=2), op.ints(0)), op.const(1, np.int64))
    return op.Expand(op.Unsqueeze(every, op.ints(0)), op.Shape(like))
