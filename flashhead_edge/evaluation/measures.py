"""How faithful a head is, and what it reads: measures in numpy over anything that implements the `Head` protocol.

Everything is measured against the dense head on the same hidden states, block by block: the dense logits of a
block are made once and serve the dense token, the perplexities, the total variation and every rival beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from flashhead_edge.costs import bytes_per_step, dense_bytes
from flashhead_edge.errors import SettingsError
from flashhead_edge.head import Array, Head
from flashhead_edge.index import Gate, HeadIndex
from flashhead_edge.intervals import wilson
from flashhead_edge.progress import Progress, silent

BLOCK_BYTES = 64 << 20  # dense logits of a block of states, float32
CHUNK_BYTES = 4 << 20  # of which the softmax sees this much at a time: it stays in the cache
WORST_TOKENS = 20


@dataclass(frozen=True, eq=False)
class Found:
    """What a contender found for N hidden states."""

    token: np.ndarray  # [N] int64, its greedy tokens
    ids: np.ndarray | None  # [N, C] int64 candidates, -1 = none; None: every token is one
    logits: np.ndarray | None  # [N, C] float32 their raw logits
    counts: np.ndarray | None  # [N, 2 + stages] as in `head.Step`; None: nothing is chosen
    capped: np.ndarray | None  # [N] bool; None: it has no margins
    full: np.ndarray | None  # [N, V] float32 raw logits; None: not asked for, or not defined


class Dense(Protocol):
    """The head that is the judge."""

    def tokens(self, hidden: Array) -> np.ndarray:
        """Its greedy tokens, [N] int64: argmax of the exact logits, padding left out, the smaller id on ties."""
        ...

    def logits(self, hidden: Array) -> np.ndarray:
        """Its raw logits, [N, V] float32, an array that the caller may overwrite."""
        ...


class Contender(Protocol):
    """What is measured: a head, or a rival of one."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def find(self, hidden: Array, full: bool = True) -> Found:
        """What it finds for states [N, d]; its full-width logits only if `full`, and it has them."""
        ...

    def cost(self, counts: np.ndarray | None, n: int) -> np.ndarray:
        """Bytes that each of n steps reads, [n] int64."""
        ...


@dataclass(frozen=True, eq=False)
class HeadContender:
    """Any `Head`, with its bytes counted by `costs`."""

    name: str
    head: Head
    exact_row_bytes: int  # 2 d: the exact rows in two bytes per weight, as the dense head is counted
    full_width: bool = True  # measure the distribution over all tokens as well

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.head.index)

    def find(self, hidden: Array, full: bool = True) -> Found:
        step, wide = self.head.step_with_logits(hidden) if full and self.full_width else (self.head.step(hidden), None)
        # where the probe takes a count of clusters, its cap cuts at every step by design and says nothing
        capped = None if math.isinf(self.head.index.probe.margin) else to_numpy(step.capped)
        full_width = None if wide is None else to_numpy(wide)
        return Found(to_numpy(step.token), to_numpy(step.ids), to_numpy(step.logits), to_numpy(step.counts), capped, full_width)

    def cost(self, counts: np.ndarray | None, n: int) -> np.ndarray:
        assert counts is not None and len(counts) == n
        return bytes_per_step(self.head.index, counts, self.exact_row_bytes)


def to_numpy(values: Array) -> np.ndarray:
    """A backend's array as a numpy array on the host; no copy where it is there already."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def settings_of(index: HeadIndex) -> dict[str, Any]:
    """The settings of a head as JSON: an infinite margin is null."""

    def gate(g: Gate) -> dict[str, Any]:
        return {"margin": None if math.isinf(g.margin) else g.margin, "cap": g.cap}

    def code(c: Any) -> str:
        width = "" if c.widths is None or c.kind == "bits" else str(int(c.widths.max()))
        return f"{c.kind}{width}, {c.columns} coordinates in {c.data.shape[1]} bytes"

    return {
        "n_clusters": index.n_clusters,
        "cluster_size": index.cluster_size,
        "centroids": code(index.centroids),
        "probe": gate(index.probe),
        "stages": [{"rows": code(s.rows), **gate(s.gate)} for s in index.stages],
        "rotation": None if index.rotation is None else code(index.rotation),
        "always_scored": int(index.always_scored.size),
    }


def head_kind(index: HeadIndex) -> str:
    """`published` where nothing is calibrated and rows are exact, else `fitted`."""
    return "published" if index.rotation is None and not index.stages and math.isinf(index.probe.margin) else "fitted"


@dataclass(frozen=True, eq=False)
class Measured:
    """One contender on N positions, position by position: what every summary is made from."""

    dense_token: np.ndarray  # [N] int64
    token: np.ndarray  # [N] int64, the contender's
    agrees: np.ndarray  # [N] bool
    covered: np.ndarray  # [N] bool: the dense winner is among the candidates
    bytes: np.ndarray  # [N] int64
    counts: np.ndarray | None  # [N, 2 + stages]
    capped: np.ndarray | None  # [N] bool
    target_covered: np.ndarray  # [N] bool: the text's next token is among the candidates; False where there is none
    loss_dense: np.ndarray  # [N] float64: -log p(next token of the text), nan where there is none
    loss: np.ndarray  # [N] float64, the same under the contender's full-width logits, nan where it has none
    variation: np.ndarray  # [N] float64: total variation at temperature 1, full width, nan where it has none
    variation_candidates: np.ndarray  # [N] float64: the same if only candidates are drawn


def join(parts: Sequence[Measured]) -> Measured:
    """The same contender on further positions, as one."""

    def rows(name: str) -> np.ndarray | None:
        arrays = [getattr(p, name) for p in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return Measured(**{f.name: rows(f.name) for f in dataclasses.fields(Measured)})  # type: ignore[arg-type]


def final_logits(raw: np.ndarray, scale: float = 1.0, softcap: float | None = None) -> np.ndarray:
    """The logits that the model itself would sample from: its scale, then its soft-cap. float32."""
    logits = raw.astype(np.float32) * np.float32(scale)
    return logits if softcap is None else (softcap * np.tanh(logits / np.float32(softcap))).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, V] float32 at temperature 1; -inf is probability 0."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, dtype=np.float64, keepdims=True).astype(np.float32)
    return p


def measure(
    contender: Contender, hidden: Array, targets: np.ndarray, dense_token: np.ndarray, probabilities: np.ndarray, scale: float, softcap: float | None
) -> Measured:
    """One block: a contender against the dense head.

    Args:
        hidden: [N, d] states after the final norm.
        targets: [N] int64, the text's next tokens, -1 = none.
        dense_token: [N] int64, the dense head's tokens.
        probabilities: [N, V] float32, the dense head's at temperature 1.
        scale, softcap: what the model does to logits after the head.
    """
    found, n = contender.find(hidden), len(targets)
    every = np.ones(n, bool)
    covered = every if found.ids is None else (found.ids == dense_token[:, None]).any(1)
    target_covered = every if found.ids is None else (found.ids == targets[:, None]).any(1)
    loss_dense, loss, variation, variation_candidates = (np.full(n, np.nan) for _ in range(4))
    for start in range(0, n, chunk := max(1, CHUNK_BYTES // (4 * probabilities.shape[1]))):
        rows = slice(start, min(start + chunk, n))
        at, target = np.arange(rows.stop - start), targets[rows]
        known = target >= 0
        p = probabilities[rows]
        loss_dense[rows][known] = surprise(p[at[known], target[known]])
        if found.full is not None:
            q = softmax(final_logits(found.full[rows], scale, softcap))
            loss[rows][known] = surprise(q[at[known], target[known]])
            variation[rows] = 0.5 * np.abs(p - q).sum(1, dtype=np.float64)
        if found.ids is not None and found.logits is not None:
            ids = found.ids[rows]
            held = np.where(ids >= 0, np.take_along_axis(p, np.maximum(ids, 0), 1), 0.0)
            q = softmax(np.where(ids >= 0, final_logits(found.logits[rows], scale, softcap), -np.inf).astype(np.float32))
            variation_candidates[rows] = 0.5 * (np.abs(held - q).sum(1, dtype=np.float64) + 1 - held.sum(1, dtype=np.float64))
    return Measured(
        dense_token=dense_token,
        token=found.token,
        agrees=found.token == dense_token,
        covered=covered,
        bytes=contender.cost(found.counts, n),
        counts=found.counts,
        capped=found.capped,
        target_covered=target_covered & (targets >= 0),
        loss_dense=loss_dense,
        loss=loss,
        variation=variation,
        variation_candidates=np.maximum(variation_candidates, 0.0),
    )


def surprise(p: np.ndarray) -> np.ndarray:
    """-log p in nats, float64; a probability that float32 rounds to nothing counts as its smallest normal number."""
    return -np.log(np.maximum(p.astype(np.float64), np.finfo(np.float32).tiny))


def measure_all(
    contenders: Sequence[Contender],
    hidden: Array,
    targets: np.ndarray,
    dense: Dense,
    *,
    vocab_size: int,
    scale: float = 1.0,
    softcap: float | None = None,
    progress: Progress = silent,
) -> list[Measured]:
    """Every contender on the same states, in blocks; one pass of the dense head for all of them.

    Raises:
        SettingsError: there is no state, or not one target a state.
    """
    n = len(hidden)
    if n == 0 or len(targets) != n:
        raise SettingsError(f"evaluation: {n} hidden states and {len(targets)} targets, expected one target for each of at least one state; give a longer text")
    block = max(1, min(n, BLOCK_BYTES // (4 * vocab_size)))
    parts: list[list[Measured]] = [[] for _ in contenders]
    for start in range(0, n, block):
        h, t = hidden[start : start + block], np.asarray(targets[start : start + block], np.int64)
        tokens, p = dense.tokens(h), dense.logits(h)
        for row in range(0, len(t), chunk := max(1, CHUNK_BYTES // (4 * vocab_size))):
            p[row : row + chunk] = softmax(final_logits(p[row : row + chunk], scale, softcap))
        for i, contender in enumerate(contenders):
            progress(f"measuring {contender.name}", (start + len(t) * i / len(contenders)) / n)
            parts[i].append(measure(contender, h, t, tokens, p, scale, softcap))
    progress("measured", 1.0)
    return [join(p) for p in parts]


@dataclass(frozen=True)
class Spread:
    """A quantity over steps."""

    mean: float
    p50: float
    p90: float
    p99: float


def spread(values: np.ndarray) -> Spread:
    """Mean and quantiles of one value a step."""
    return Spread(float(np.mean(values)), *(float(q) for q in np.quantile(values, [0.5, 0.9, 0.99])))


def histogram(values: np.ndarray, bins: int = 30) -> dict[str, list[float]]:
    """How many of the positive `values` lie between edges that grow by one factor: {"edges": bins + 1, "steps": bins}.

    Where whole numbers lie closer than the bins, neighbouring bins are one.
    """
    low, high = float(values.min()), float(values.max()) + 1
    edges = np.unique(np.ceil(np.geomspace(low, high, bins + 1)))
    edges[0], edges[-1] = low, high
    return {"edges": edges.tolist(), "steps": np.histogram(values, edges)[0].tolist()}


@dataclass(frozen=True)
class Evaluation:
    """What a contender's measures come to. Shares are 0 to 1, losses in nats; None where a measure does not apply."""

    name: str
    positions: int
    top1_agreement: float
    top1_agreement_interval: tuple[float, float]  # Wilson, 95 %
    coverage: float
    bytes_per_step: float
    bytes_per_step_p99: float
    dense_bytes_per_step: int
    bytes_share: float  # of the dense head
    clusters_opened: Spread | None
    rows_scored: tuple[Spread, ...]  # by each code of the cascade
    exact_rows: Spread | None
    capped_steps: int | None
    capped_share: float | None
    target_coverage: float | None  # the text's next token is among the candidates
    perplexity: float | None  # of the text, under the full-width logits
    perplexity_dense: float | None
    perplexity_covered: float | None  # over the positions whose next token is a candidate
    perplexity_covered_dense: float | None  # the dense head over the same positions
    total_variation: float | None  # mean, at temperature 1, full width
    total_variation_p99: float | None
    total_variation_candidates: float | None  # if only candidates are drawn
    total_variation_candidates_p99: float | None
    worst_tokens: tuple[dict[str, Any], ...]  # dense winners most often missed: id, text, missed, of
    bytes_percentiles: tuple[int, ...]  # 0th, 1st ... 100th percentile of bytes a step: the distribution to plot
    bytes_histogram: dict[str, list[float]]  # `edges`, growing by one factor, and `steps` between them
    clusters_opened_histogram: dict[str, list[float]] | None
    free_running: dict[str, Any] | None = None  # identical greedy text: prompts, tokens, mean, median, whole
    settings: dict[str, Any] = field(default_factory=dict)


def summarise(contender: Contender, measured: Measured, dense_bytes_per_step: int, text_of: Callable[[int], str] | None = None) -> Evaluation:
    """Condense a contender's positions. `text_of` names a token id in the list of worst tokens."""
    m, n = measured, len(measured.agrees)
    right = int(m.agrees.sum())
    percent = np.linspace(0, 1, 101)

    def mean(values: np.ndarray) -> float | None:
        return float(np.mean(values)) if len(values) and not np.isnan(values).all() else None

    def perplexity(loss: np.ndarray, where: np.ndarray) -> float | None:
        average = mean(loss[where])
        return None if average is None else math.exp(average)

    def p99(values: np.ndarray) -> float | None:
        return None if mean(values) is None else float(np.quantile(values, 0.99))

    known = ~np.isnan(m.loss_dense)
    counts = m.counts
    return Evaluation(
        name=contender.name,
        positions=n,
        top1_agreement=right / n,
        top1_agreement_interval=wilson(right, n),
        coverage=float(m.covered.mean()),
        bytes_per_step=float(m.bytes.mean()),
        bytes_per_step_p99=float(np.quantile(m.bytes, 0.99)),
        dense_bytes_per_step=dense_bytes_per_step,
        bytes_share=float(m.bytes.mean()) / dense_bytes_per_step,
        clusters_opened=None if counts is None else spread(counts[:, 0]),
        rows_scored=() if counts is None else tuple(spread(counts[:, i]) for i in range(1, counts.shape[1] - 1)),
        exact_rows=None if counts is None else spread(counts[:, -1]),
        capped_steps=None if m.capped is None else int(m.capped.sum()),
        capped_share=None if m.capped is None else float(m.capped.mean()),
        target_coverage=mean(m.target_covered[known].astype(float)),
        perplexity=perplexity(m.loss, known),
        perplexity_dense=perplexity(m.loss_dense, known),
        perplexity_covered=perplexity(m.loss, known & m.target_covered),
        perplexity_covered_dense=perplexity(m.loss_dense, known & m.target_covered),
        total_variation=mean(m.variation),
        total_variation_p99=p99(m.variation),
        total_variation_candidates=mean(m.variation_candidates),
        total_variation_candidates_p99=p99(m.variation_candidates),
        worst_tokens=worst_tokens(m.dense_token, m.agrees, text_of),
        bytes_percentiles=tuple(int(b) for b in np.quantile(m.bytes, percent)),
        bytes_histogram=histogram(m.bytes),
        clusters_opened_histogram=None if counts is None else histogram(counts[:, 0]),
        settings=contender.settings,
    )


def worst_tokens(
    dense_token: np.ndarray, agrees: np.ndarray, text_of: Callable[[int], str] | None = None, most: int = WORST_TOKENS
) -> tuple[dict[str, Any], ...]:
    """The dense winners most often missed, the smaller id first of equals: id, text, how often missed, how often the winner."""
    ids, missed = np.unique(dense_token[~agrees], return_counts=True)
    order = np.lexsort((ids, -missed))[:most]
    return tuple(
        {"id": int(ids[i]), "text": None if text_of is None else text_of(int(ids[i])), "missed": int(missed[i]), "of": int((dense_token == ids[i]).sum())}
        for i in order
    )


def identical_length(tokens: np.ndarray, dense_tokens: np.ndarray) -> np.ndarray:
    """Leading tokens that equal the dense head's in each text: [texts, n] and [texts, n] -> [texts] int64."""
    same = tokens == dense_tokens
    return np.where(same.all(1), same.shape[1], same.argmin(1)).astype(np.int64)


def free_running(contender: Contender, states: Array, dense_tokens: np.ndarray) -> dict[str, Any]:
    """How long greedy text stays the dense head's.

    A head's own text has the dense text's states up to the first token that differs, so the states of the dense
    text are enough: no second text is generated.

    Args:
        states: [texts * n, d] of the dense head's own greedy texts, text after text.
        dense_tokens: [texts, n] int64, those texts.
    """
    same = identical_length(contender.find(states, full=False).token.reshape(dense_tokens.shape), dense_tokens)
    return {
        "prompts": len(same),
        "tokens": dense_tokens.shape[1],
        "mean": float(same.mean()),
        "median": float(np.median(same)),
        "whole": float((same == dense_tokens.shape[1]).mean()),
    }


def evaluate(
    head: Head,
    *,
    hidden: Array,
    targets: np.ndarray | None = None,
    dense: Dense,
    scale: float = 1.0,
    softcap: float | None = None,
    text_of: Callable[[int], str] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """One head against the dense head on given states.

    Args:
        hidden: [N, d] states after the final norm, in the kind of array that the head takes.
        targets: [N] next tokens of the text, -1 = none; None: no perplexity.
        dense: the dense head on the same weights.
        scale, softcap: what the model does to logits after the head.
        text_of: names a token id.
    """
    index = head.index
    contender = HeadContender(head_kind(index), head, 2 * index.hidden_size)
    wanted = np.full(len(hidden), -1) if targets is None else np.asarray(targets)
    (measured,) = measure_all([contender], hidden, wanted, dense, vocab_size=index.vocab_size, scale=scale, softcap=softcap, progress=progress)
    return summarise(contender, measured, dense_bytes(index.vocab_size, index.hidden_size), text_of)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """A record of plain values, lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(evaluation).items()}
