"""Greedy and sampling over candidates: the rules, once, in numpy. Other backends are tested against them seed by seed.

A step hands over candidates (`ids` [N, C] with -1 for no token, `logits` [N, C] raw). A rule is a pure function of
them, the settings, and what was said so far. The order is vLLM's (v1/sample/sampler.py) and, where they share a
setting, that of transformers: the model's own scale and soft-cap; allowed tokens; logit bias; repetition, frequency
and presence penalties; temperature; min-p; top-k; top-p. Then noise, and the largest wins.

**Noise belongs to a token, not to a place.** The Gumbel number of a token is a function of (seed, step, token id)
alone (Philox4x32-10), so a draw does not depend on the batch, on the order of the candidates or on how many there
are: argmax(logits / T + noise) over the candidates is the draw of the dense head under the same keys whenever that
token is a candidate. Truncation looks at the candidates only, so there the two may differ: `draw_agreement` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashhead_edge.errors import SettingsError

NOISE_BLOCK = 1 << 21  # numbers of noise made at a time


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy: the largest score, the smaller id on ties
    top_k: int = 0  # 0 is off; tokens that tie with the k-th stay
    top_p: float = 1.0  # 1 is off; the smallest set of likeliest tokens that reaches this mass
    min_p: float = 0.0  # 0 is off; tokens at least this likely, as a share of the likeliest
    repetition_penalty: float = 1.0  # 1 is off; over prompt and output: positive logits are divided, others multiplied
    presence_penalty: float = 0.0  # 0 is off; subtracted once from every token of the output
    frequency_penalty: float = 0.0  # 0 is off; subtracted for each time that the output holds the token
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added, by token id
    allowed: Sequence[int] | None = None  # the only tokens that may be chosen; None is all
    seed: int = 0  # 0 to 2^64 - 1

    def __post_init__(self) -> None:
        check_sampling(self)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.allowed is not None:
            object.__setattr__(self, "allowed", tuple(sorted({int(t) for t in self.allowed})))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether the order of the tokens can differ from that of the raw logits."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalised or bool(self.logit_bias) or self.allowed is not None

    @property
    def truncates(self) -> bool:
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def check_sampling(s: Sampling) -> None:
    """Raise SettingsError on the first setting that is out of range."""

    def want(ok: bool, name: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"sampling: {name} is {found}, expected {expected}; call again with another value")

    def number(value: object) -> bool:
        return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and math.isfinite(value)

    def whole(value: object) -> bool:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)

    want(number(s.temperature) and (s.temperature == 0 or s.temperature >= 1e-3), "temperature", s.temperature, "0 (greedy) or at least 0.001")
    want(whole(s.top_k) and s.top_k >= 0, "top_k", s.top_k, "a whole number, 0 (off) or more")
    want(number(s.top_p) and 0 < s.top_p <= 1, "top_p", s.top_p, "above 0, at most 1 (off)")
    want(number(s.min_p) and 0 <= s.min_p <= 1, "min_p", s.min_p, "0 (off) to 1")
    want(number(s.repetition_penalty) and s.repetition_penalty > 0, "repetition_penalty", s.repetition_penalty, "a number above 0 (1 is off)")
    want(number(s.presence_penalty), "presence_penalty", s.presence_penalty, "a finite number (0 is off)")
    want(number(s.frequency_penalty), "frequency_penalty", s.frequency_penalty, "a finite number (0 is off)")
    want(whole(s.seed) and 0 <= s.seed < 2**64, "seed", s.seed, "a whole number from 0 to 2^64 - 1")
    for token, bias in s.logit_bias.items():
        want(whole(token) and token >= 0, "a token of logit_bias", token, "a token id")
        want(number(bias), f"logit_bias of token {token}", bias, "a finite number")
    if s.allowed is not None:
        want(len(s.allowed) > 0, "allowed", "empty", "at least one token id")
        want(all(whole(t) and t >= 0 for t in s.allowed), "allowed", "not all token ids", "whole numbers, 0 or more")


def check_tokens(s: Sampling, vocab_size: int) -> None:
    """Raise SettingsError where a token of the settings lies outside the vocabulary."""
    for name, tokens in (("logit_bias", s.logit_bias), ("allowed", s.allowed or ())):
        largest = max(tokens, default=-1)
        if largest >= vocab_size:
            raise SettingsError(f"sampling: {name} names token {largest}, expected ids below {vocab_size}; use ids of this model's tokenizer")


def model_logits(raw: np.ndarray, scale: float = 1.0, softcap: float | None = None) -> np.ndarray:
    """The logits as the model defines them, float64: raw times `scale`, then softcap * tanh(x / softcap)."""
    x = raw.astype(np.float64) * scale
    if softcap is None:
        return x
    return np.where(np.isneginf(x), x, softcap * np.tanh(x / softcap))


def process(
    ids: np.ndarray, raw: np.ndarray, sampling: Sampling, prompt: np.ndarray | None = None, output: np.ndarray | None = None,
    scale: float = 1.0, softcap: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Logits after mask, bias and penalties, before temperature.

    Args:
        ids: [N, C] token ids, -1 where there is none.
        raw: [N, C] raw logits, any float dtype.
        prompt: [N, V] bool or counts, tokens of the prompt; needed for the repetition penalty.
        output: [N, V] counts of the tokens said so far; needed for any penalty.
        scale: the model multiplies its raw logits by this, then applies `softcap` where it has one.
    Returns:
        [N, C] float64, -inf where nothing can be chosen.
    """
    x = model_logits(raw, scale, softcap)
    x[ids < 0] = -np.inf
    if sampling.allowed is not None:
        x[~np.isin(ids, np.asarray(sampling.allowed, np.int64))] = -np.inf
    if sampling.logit_bias:
        tokens = np.array(sorted(sampling.logit_bias), np.int64)
        bias = np.array([sampling.logit_bias[t] for t in tokens.tolist()], np.float64)
        at = np.searchsorted(tokens, ids).clip(max=len(tokens) - 1)
        x += np.where(tokens[at] == ids, bias[at], 0.0)
    safe = np.maximum(ids, 0)
    said = None if output is None else np.where(ids < 0, 0, np.take_along_axis(output, safe, 1))
    if sampling.repetition_penalty != 1.0:
        seen = np.zeros(ids.shape, bool) if said is None else said > 0
        if prompt is not None:
            seen |= np.take_along_axis(prompt, safe, 1) > 0
        x = np.where(seen, np.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty), x)
    if said is not None:
        if sampling.frequency_penalty:
            x -= sampling.frequency_penalty * said
        if sampling.presence_penalty:
            x -= sampling.presence_penalty * (said > 0)
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf has probability 0, and so has everything in a row without a finite entry."""
    best = x.max(axis=-1, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(best), best, 0.0))
    return e / np.maximum(e.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def truncate(ids: np.ndarray, x: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Min-p, then top-k, then top-p over logits [N, C] already divided by the temperature; -inf where cut."""
    if sampling.min_p > 0.0:
        best = x.max(1, keepdims=True)
        x = np.where(x < best + math.log(sampling.min_p), -np.inf, x)
    if 0 < sampling.top_k < x.shape[1]:
        kth = np.partition(x, -sampling.top_k, axis=1)[:, [-sampling.top_k]]
        x = np.where(x < kth, -np.inf, x)
    if sampling.top_p < 1.0:
        order = np.lexsort((ids, -x), axis=1)  # likeliest first, the smaller id on ties
        mass = softmax(np.take_along_axis(x, order, 1))
        before = np.cumsum(mass, 1) - mass
        before[:, 0] = 0.0
        cut = np.zeros(x.shape, bool)
        np.put_along_axis(cut, order, before >= sampling.top_p, 1)
        x = np.where(cut, -np.inf, x)
    return x


def scores(
    ids: np.ndarray, raw: np.ndarray, sampling: Sampling, prompt: np.ndarray | None = None, output: np.ndarray | None = None,
    scale: float = 1.0, softcap: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Everything but the noise: the log of unnormalised probabilities, [N, C] float64 (logits where greedy)."""
    x = process(ids, raw, sampling, prompt, output, scale, softcap)
    return x if sampling.greedy else truncate(ids, x / sampling.temperature, sampling)


def choose(
    ids: np.ndarray, raw: np.ndarray, sampling: Sampling, steps: np.ndarray | Sequence[int],
    prompt: np.ndarray | None = None, output: np.ndarray | None = None, scale: float = 1.0, softcap: float | None = None,
) -> np.ndarray:  # fmt: skip
    """The next token of each row.

    Args:
        ids, raw, prompt, output, scale, softcap: as in `process`.
        steps: [N] number of the step in its sequence, 0 to 2^32 - 1: half of the noise's key, beside the seed.
    Returns:
        [N] int64.
    Raises:
        SettingsError: a row has no candidate that may be chosen; score the allowed rows and call again.
    Source: Gumbel-max trick, Maddison et al., NeurIPS 2014, section 2.
    """
    x = scores(ids, raw, sampling, prompt, output, scale, softcap)
    return pick(ids, x if sampling.greedy else x + gumbel(sampling.seed, steps, ids))


def pick(ids: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The id of each row's largest value [N, C], the smaller id on ties: [N] int64."""
    best = x.max(1, keepdims=True)
    if not bool((best > -np.inf).all()):
        row = int(np.flatnonzero(best[:, 0] == -np.inf)[0])
        raise SettingsError(f"sampling: no candidate of row {row} may be chosen, expected at least one; score the allowed tokens exactly and choose among them")
    return np.where(x == best, ids, np.iinfo(np.int64).max).min(1).astype(np.int64)


def probabilities(
    ids: np.ndarray, raw: np.ndarray, sampling: Sampling, prompt: np.ndarray | None = None, output: np.ndarray | None = None,
    scale: float = 1.0, softcap: float | None = None,
) -> np.ndarray:  # fmt: skip
    """What `choose` draws from, over the candidates: [N, C] float64, each row sums to 1 (one-hot where greedy)."""
    x = scores(ids, raw, sampling, prompt, output, scale, softcap)
    return (ids == pick(ids, x)[:, None]).astype(np.float64) if sampling.greedy else softmax(x)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int], rounds: int = 10) -> tuple[np.ndarray, ...]:
    """Philox4x32: four words of 32 random bits for each counter of four words, under a key of two.

    Args:
        counter: four uint64 arrays of one shape, values below 2^32.
    Returns:
        Four uint64 arrays of that shape, values below 2^32.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, section 3.3.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (c.copy() for c in np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter)))
    k0, k1 = key
    a, b = np.empty_like(c0), np.empty_like(c0)
    for _ in range(rounds):  # in place: new arrays for each of a hundred operations took as long as the operations
        np.multiply(c0, np.uint64(0xD2511F53), out=a)
        np.multiply(c2, np.uint64(0xCD9E8D57), out=b)
        for product, other, k, high, rest in ((b, c1, k0, c0, c1), (a, c3, k1, c2, c3)):
            np.right_shift(product, half, out=high)
            np.bitwise_xor(high, other, out=high)
            np.bitwise_xor(high, np.uint64(k), out=high)
            np.bitwise_and(product, low, out=rest)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, steps: np.ndarray | Sequence[int], ids: np.ndarray) -> np.ndarray:
    """A number in the open interval (0, 1) for each token of each row.

    The counter is (token id, step, 0, 0), the key the seed's low and high half. Of the first two words the upper
    26 bits each make a whole number x below 2^52, and u = (x + 0.5) / 2^52: exact in float64, never 0 or 1.

    Args:
        seed: 0 to 2^64 - 1.
        steps: [N] 0 to 2^32 - 1.
        ids: [N, C]; -1 gets some number too.
    Returns:
        [N, C] float64.
    """
    step = np.asarray(steps)
    if step.shape != (len(ids),) or (len(step) and (int(step.min()) < 0 or int(step.max()) >= 2**32)):
        found = f"{list(step.shape)} numbers for {len(ids)} rows, {step.min(initial=0)} to {step.max(initial=0)}"
        raise SettingsError(f"sampling: steps are {found}, expected one from 0 to 2^32 - 1 for each row; pass the step of each row")
    token = np.maximum(ids, 0).astype(np.uint64)
    zero = np.zeros(1, np.uint64)
    w0, w1, _, _ = philox((token, step.astype(np.uint64)[:, None], zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    x = (w0 >> np.uint64(6)) << np.uint64(26) | (w1 >> np.uint64(6))
    return (x.astype(np.float64) + 0.5) * 2.0**-52


def gumbel(seed: int, steps: np.ndarray | Sequence[int], ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise -log(-log(u)) of each token, [N, C] float64: see `uniform`."""
    return -np.log(-np.log(uniform(seed, steps, ids)))


@dataclass(frozen=True)
class DrawAgreement:
    """How often a seeded draw from candidates is the dense head's draw under the same keys."""

    draws: int
    equal: int  # the same token
    covered: int  # the dense head's token was a candidate; the same number as `equal` where nothing is truncated

    @property
    def share(self) -> float:
        return self.equal / self.draws


def draw_agreement(
    ids: np.ndarray, raw: np.ndarray, dense: np.ndarray, sampling: Sampling, draws: int = 1, scale: float = 1.0, softcap: float | None = None
) -> DrawAgreement:
    """Count equal draws: row i is step i, and each of `draws` seeds from sampling.seed on draws once a row.

    Args:
        ids, raw: candidates, [N, C].
        dense: raw logits of the dense head, [N, V].
    Raises:
        SettingsError: N or draws is 0.
    """
    n, v = dense.shape
    if n * draws < 1:
        raise SettingsError(f"draw agreement: {n} rows and {draws} draws, expected at least one of each; pass more")
    equal = covered = 0
    every = np.arange(v, dtype=np.int64)
    for rows in np.array_split(np.arange(n), max(1, n * v // NOISE_BLOCK)):
        here, all_ids = ids[rows], np.broadcast_to(every, (len(rows), v))
        small, large = scores(here, raw[rows], sampling, None, None, scale, softcap), scores(all_ids, dense[rows], sampling, None, None, scale, softcap)
        for seed in range(sampling.seed, sampling.seed + draws):
            noise = 0.0 if sampling.greedy else gumbel(seed % 2**64, rows, all_ids)
            want = pick(all_ids, large + noise)
            # the noise of a candidate is that of its id: no need to make it twice
            got = pick(here, small if sampling.greedy else small + np.take_along_axis(np.asarray(noise), np.maximum(here, 0), 1))
            equal += int((got == want).sum())
            covered += int((here == want[:, None]).any(1).sum())
    return DrawAgreement(n * draws, equal, covered)
