"""The head index: the arrays and settings of one FlashHead. numpy only, no behaviour; it checks itself once.

The words: a *slot* is a place in the token table, cluster after cluster (slot = cluster * cluster_size + place);
row codes are stored in the order of slots, so that opening a cluster reads one block. A *coordinate* is an entry
of z, what stages 1 and 2 see of a hidden state: z = h where there is no rotation (the published head), else
z = [1, P (h - mean)]. Coordinate 0 is the constant 1: what a row adds to every state (its product with the mean).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashhead_edge.codes import Coded
from flashhead_edge.errors import CheckpointError

FORMAT_VERSION = 1
MOST_CANDIDATES = 8192  # decode.h: rows scored exactly in a step, among which a GPU's kernel draws
ERROR_STEPS = 8  # values of a coded error in a doubling: relative rounding of at most 2^(1/16) - 1 = 4.4 %


def default_probes(n_clusters: int) -> int:
    """Clusters that the published method opens where a checkpoint does not say: a sixteenth of them."""
    return max(1, n_clusters // 16)


@dataclass(frozen=True, eq=False)
class Gate:
    """Who passes a stage: items whose score lies within margin x own error of the best, at most `cap` of them."""

    error: np.ndarray  # [n] uint8, logarithmic: the item's own error is unit * 2^(error / ERROR_STEPS)
    unit: float  # the smallest error, in logits
    margin: float  # in units of the item's own error (times the state's, see state_power); inf: all up to the cap
    cap: int  # items kept at most, 1 to n


@dataclass(frozen=True, eq=False)
class Stage:
    """One row code of the cascade: it adds decode(slot) . z to the score that the slot has so far."""

    rows: Coded  # [slots, columns]
    gate: Gate  # over slots


@dataclass(frozen=True, eq=False)
class HeadIndex:
    """Everything of a head but its exact rows, which are the model's own. C order."""

    vocab_size: int  # V: tokens that can be returned; padding rows of the matrix lie at V and beyond
    hidden_size: int  # d
    token_table: np.ndarray  # [K, cluster_size] int32, each id 0..V-1 exactly once, -1 = empty, only at a row's end
    centroids: Coded  # [K, columns]; score of cluster k is decode(k) . z
    probe: Gate  # over clusters
    stages: tuple[Stage, ...]  # the cascade, coarsest first; empty in the published head
    always_scored: np.ndarray  # [A] int32, ascending token ids that are scored whether their cluster opens or not
    mean: np.ndarray | None  # [d] float32, subtracted from h; None: z = h
    rotation: Coded | None  # P, transposed: [d, r - 1], what entry i of h - mean gives to coordinates 1 to r - 1
    tail_scale: float  # an unscored token's full-width logit is tail_scale * (score of its cluster) + tail_offset,
    tail_offset: float  # below the smallest exact one
    fingerprint: str  # of the head's weights that the index was made for
    summary: dict[str, Any] = field(default_factory=dict)  # JSON: how it was calibrated and what that showed
    state_power: float = 0.0  # a state's margins are multiplied by rms(coordinates 1 to r - 1) ** state_power

    def __post_init__(self) -> None:
        check_index(self)

    @property
    def n_clusters(self) -> int:
        return self.token_table.shape[0]

    @property
    def cluster_size(self) -> int:
        return self.token_table.shape[1]

    @property
    def slots(self) -> int:
        return self.token_table.size


def own_error(gate: Gate) -> np.ndarray:
    """The items' own errors in logits, [n] float64."""
    return gate.unit * np.exp2(gate.error.astype(np.float64) / ERROR_STEPS)


def slot_of_token(index: HeadIndex) -> np.ndarray:
    """Where each token stands, [V] int64 slots."""
    flat = index.token_table.reshape(-1)
    filled = np.flatnonzero(flat >= 0)
    out = np.empty(index.vocab_size, np.int64)
    out[flat[filled]] = filled
    return out


def check_index(index: HeadIndex) -> None:
    """Raise CheckpointError on the first array or setting that breaks a rule of the format."""

    def want(ok: bool, what: str, found: object, expected: object) -> None:
        if not ok:
            raise CheckpointError(f"head index: {what} is {found}, expected {expected}; convert the model again, or restore the file")

    def gate(g: Gate, n: int, name: str) -> None:
        want(g.error.dtype == np.uint8 and g.error.shape == (n,), f"{name} error", f"{g.error.dtype} {list(g.error.shape)}", f"uint8 [{n}]")
        want(math.isfinite(g.unit) and g.unit > 0, f"{name} unit", g.unit, "a positive number")
        want(not math.isnan(g.margin) and g.margin >= 0, f"{name} margin", g.margin, "0 or more")
        want(1 <= g.cap <= n, f"{name} cap", g.cap, f"1 to {n}")

    V, d, table = index.vocab_size, index.hidden_size, index.token_table
    want(V >= 1 and d >= 1, "size of the head", [V, d], "at least [1, 1]")
    want(table.dtype == np.int32 and table.ndim == 2, "token_table", f"{table.dtype} {list(table.shape)}", "int32 [K, cluster_size]")
    empty = table < 0
    want(bool((np.diff(empty.astype(np.int8), axis=1) >= 0).all()), "token_table", "with an empty slot before a token", "empty slots only at the end of a row")
    tokens = table[~empty]
    want(tokens.size == V and bool((np.sort(tokens) == np.arange(V)).all()), "token_table", f"{tokens.size} tokens", f"each id 0 to {V - 1} exactly once")
    want(index.centroids.n == index.n_clusters, "centroids", index.centroids.n, f"{index.n_clusters} rows")
    gate(index.probe, index.n_clusters, "probe")
    for i, stage in enumerate(index.stages, 1):
        want(stage.rows.n == index.slots, f"stage {i} rows", stage.rows.n, f"{index.slots} (one for each slot)")
        gate(stage.gate, index.slots, f"stage {i}")
    a = index.always_scored
    want(a.dtype == np.int32 and a.ndim == 1, "always_scored", f"{a.dtype} {list(a.shape)}", "int32 [A]")
    want(a.size == 0 or (a[0] >= 0 and a[-1] < V and bool((np.diff(a) > 0).all())), "always_scored", "out of order or range", f"ascending ids below {V}")
    want((index.mean is None) == (index.rotation is None), "rotation", "given without mean, or mean without it", "both or neither")
    coordinates = d
    if index.rotation is not None and index.mean is not None:
        want(index.mean.dtype == np.float32 and index.mean.shape == (d,), "mean", f"{index.mean.dtype} {list(index.mean.shape)}", f"float32 [{d}]")
        want(bool(np.isfinite(index.mean).all()), "mean", "not finite", "finite values")
        want(index.rotation.n == d, "rotation", f"{index.rotation.n} rows", f"{d}, one for each entry of a hidden state")
        coordinates = index.rotation.columns + 1
    for name, coded in [("centroids", index.centroids)] + [(f"stage {i} rows", s.rows) for i, s in enumerate(index.stages, 1)]:
        want(coded.columns <= coordinates, name, f"{coded.columns} columns", f"at most {coordinates} coordinates")
    want(index.rotation is not None or index.state_power == 0, "state_power", index.state_power, "0 where there is no rotation")
    want(0 <= index.state_power <= 1, "state_power", index.state_power, "0 to 1")
    want(math.isfinite(index.tail_scale) and math.isfinite(index.tail_offset), "tail", [index.tail_scale, index.tail_offset], "finite numbers")
