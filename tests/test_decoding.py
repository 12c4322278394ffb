"""The rules of greedy and sampling: known answers, the distribution of draws, transformers' processors, coupling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead_edge.decoding import (
    Sampling,
    check_tokens,
    choose,
    draw_agreement,
    gumbel,
    model_logits,
    philox,
    probabilities,
    process,
    scores,
    uniform,
)
from flashhead_edge.errors import SettingsError

RANDOM123 = [  # philox4x32 10 of the kat_vectors file: counter, key, answer
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def chi_square_is_plausible(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Below the 99 % point of chi-square, by the Wilson-Hilferty approximation."""
    k = len(expected) - 1
    return float(((observed - expected) ** 2 / expected).sum()) < k * (1 - 2 / (9 * k) + 2.326 * np.sqrt(2 / (9 * k))) ** 3


def kolmogorov_is_plausible(quantiles: np.ndarray) -> bool:
    """Whether numbers that should be uniform are: Kolmogorov's statistic below its 99 % point."""
    n = len(quantiles)
    return float(np.abs(np.sort(quantiles) - (np.arange(n) + 0.5) / n).max() * np.sqrt(n)) < 1.63


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def case(n: int, c: int, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """All of a small vocabulary as candidates: ids and logits [n, c]."""
    logits = np.random.default_rng(seed).normal(0, spread, (n, c)).astype(np.float32)
    return np.broadcast_to(np.arange(c), (n, c)).copy(), logits


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_philox_gives_the_published_answers(counter, key, answer):
    got = philox(tuple(np.array([w], np.uint64) for w in words(counter)), tuple(words(key)))
    assert [int(w[0]) for w in got] == words(answer)


def test_uniform_is_the_stated_function_of_token_step_and_seed():
    seed, step, token = 0x123456789ABCDEF0, 70_000, 131_071
    w = philox(tuple(np.array([x], np.uint64) for x in (token, step, 0, 0)), (seed & 0xFFFFFFFF, seed >> 32))
    want = ((((int(w[0][0]) >> 6) << 26) | (int(w[1][0]) >> 6)) + 0.5) / 2**52
    assert uniform(seed, [step], np.array([[token]]))[0, 0] == want


def test_noise_is_uniform_and_independent_along_each_key():
    ids = np.arange(200_000)[None]
    u = uniform(7, [3], ids)[0]
    assert u.min() > 0
    assert u.max() < 1
    assert kolmogorov_is_plausible(u)
    for other in (uniform(7, [4], ids)[0], uniform(8, [3], ids)[0], uniform(7 + 2**32, [3], ids)[0], np.roll(u, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 5 / np.sqrt(len(u))
    g = gumbel(7, [3], ids)[0]
    assert kolmogorov_is_plausible(np.exp(-np.exp(-g)))
    assert abs(g.mean() - np.euler_gamma) < 5 * 1.283 / np.sqrt(len(g))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.5, seed=11), Sampling(temperature=1.5, top_k=9), Sampling(temperature=1.0, top_p=0.8),
     Sampling(temperature=1.0, min_p=0.1), Sampling(temperature=0.9, logit_bias={3: 2.0, 5: -1.0}), Sampling(temperature=1.0, allowed=(1, 2, 17))],
    ids=str,
)  # fmt: skip
def test_draws_follow_their_probabilities(sampling):
    """Chi-square over 40,000 draws at a fixed seed; cells that expect fewer than 5 draws are pooled."""
    n = 40_000
    ids, logits = case(1, 20, seed=5, spread=1.5)
    p = probabilities(ids, logits, sampling)[0]
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    drawn = choose(np.repeat(ids, n, 0), np.repeat(logits, n, 0), sampling, np.arange(n))
    counts = np.bincount(drawn, minlength=20)
    assert counts[p == 0].sum() == 0
    rare = (n * p < 5) & (p > 0)
    observed, expected = np.append(counts[(p > 0) & ~rare], counts[rare].sum()), np.append(n * p[(p > 0) & ~rare], n * p[rare].sum())
    keep = expected > 0
    assert chi_square_is_plausible(observed[keep], expected[keep])


def reference_scores(processors, logits, prompt, said):
    """What transformers' processors make of logits [1, V] after these tokens."""
    from transformers import LogitsProcessorList

    ids = torch.tensor([list(prompt) + list(said)])
    return LogitsProcessorList(processors)(ids, torch.from_numpy(logits.copy()).double()).numpy()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000), temperature=st.floats(0.2, 3), top_k=st.integers(0, 40), top_p=st.floats(0.05, 1), repetition=st.floats(0.5, 2),
    said=st.lists(st.integers(0, 36), max_size=12), prompt=st.lists(st.integers(0, 36), min_size=1, max_size=12),
)  # fmt: skip
def test_rules_are_those_of_transformers(seed, temperature, top_k, top_p, repetition, said, prompt):
    """Repetition penalty, temperature, top-k, top-p in transformers' order: the same tokens stay, with the same scores."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids, logits = case(1, 37, seed)
    counts = [np.bincount(np.array(x, np.int64), minlength=37)[None] for x in (prompt, said)]
    ours = scores(ids, logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition), *counts)
    processors = [RepetitionPenaltyLogitsProcessor(float(repetition)), TemperatureLogitsWarper(float(temperature))]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    theirs = reference_scores(processors, logits, prompt, said)
    kept, want = np.isfinite(ours), np.isfinite(theirs)
    differ = int((kept != want).sum())
    assert differ <= 1  # a token whose mass ends at top_p to the last bit may fall on either side
    both = kept & want
    np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.2, 3), min_p=st.floats(0.001, 1))
def test_min_p_is_that_of_transformers(seed, temperature, min_p):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper

    ids, logits = case(1, 37, seed)
    ours = scores(ids, logits, Sampling(temperature=temperature, min_p=min_p))
    theirs = reference_scores([TemperatureLogitsWarper(float(temperature)), MinPLogitsWarper(float(min_p))], logits, [0], [])
    assert (np.isfinite(ours) == np.isfinite(theirs)).all()


def test_presence_and_frequency_count_the_output_alone():
    ids, logits = np.array([[4, 6, 9, -1]]), np.array([[1.0, 2.0, -3.0, -np.inf]], np.float32)
    prompt, output = np.zeros((1, 10), int), np.zeros((1, 10), int)
    prompt[0, 4], output[0, 6], output[0, 9] = 5, 3, 1
    got = process(ids, logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, output)
    np.testing.assert_array_equal(got, [[1.0, 2.0 - 0.5 - 0.75, -3.0 - 0.5 - 0.25, -np.inf]])


def test_order_bias_then_repetition_then_frequency():
    ids, logits = np.array([[2]]), np.array([[1.0]], np.float32)
    output = np.array([[0, 0, 2]])
    got = process(ids, logits, Sampling(logit_bias={2: 3.0}, repetition_penalty=2.0, frequency_penalty=0.25), None, output)
    assert got[0, 0] == (1.0 + 3.0) / 2.0 - 0.5


def test_scale_and_softcap_come_first():
    raw = np.array([[8.0, -np.inf]], np.float32)
    want = 30 * np.tanh(8.0 * 0.25 / 30)
    assert model_logits(raw, 0.25, 30.0)[0, 0] == want
    got = process(np.array([[0, -1]]), raw, Sampling(repetition_penalty=2.0), np.array([[1]]), None, 0.25, 30.0)
    np.testing.assert_array_equal(got, [[want / 2, -np.inf]])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**64 - 1), rng=st.integers(0, 1000), temperature=st.floats(0.1, 5), c=st.integers(1, 30), step=st.integers(0, 2**32 - 1))
def test_a_draw_from_candidates_is_the_dense_draw_where_that_is_a_candidate(seed, rng, temperature, c, step):
    """Whatever the candidates are, in whatever order: the promise of keyed noise."""
    ids, dense = case(1, 200, rng)
    sampling = Sampling(temperature=temperature, seed=seed)
    want = choose(ids, dense, sampling, [step])[0]
    some = np.random.default_rng(rng).permutation(200)[:c]
    got = choose(some[None], dense[:, some], sampling, [step])[0]
    assert (got == want) == (want in some)


def test_a_draw_does_not_depend_on_the_batch():
    ids, logits = case(50, 100, 3)
    sampling, steps = Sampling(temperature=1.0, top_p=0.9, seed=5), np.arange(50) * 17
    together = choose(ids, logits, sampling, steps)
    assert (together == [choose(ids[[i]], logits[[i]], sampling, steps[[i]])[0] for i in range(50)]).all()
    assert len(set(together.tolist())) > 10


def test_greedy_ties_go_to_the_smaller_id_in_any_order():
    ids, logits = np.array([[9, 4, 7, -1]]), np.array([[1.0, 1.0, 0.5, -np.inf]], np.float32)
    assert choose(ids, logits, Sampling(), [0])[0] == 4
    np.testing.assert_array_equal(probabilities(ids, logits, Sampling()), [[0, 1, 0, 0]])


def test_top_p_of_tied_tokens_keeps_the_smaller_ids():
    ids, logits = np.array([[9, 4, 7, 5]]), np.zeros((1, 4), np.float32)
    kept = np.isfinite(scores(ids, logits, Sampling(temperature=1.0, top_p=0.5)))
    np.testing.assert_array_equal(kept, [[False, True, False, True]])


def test_draw_agreement_counts_equal_draws_and_covered_ones():
    """Plain temperature: equal is covered. Truncation: fewer candidates mean another nucleus, and that is counted."""
    rng = np.random.default_rng(0)
    dense = rng.normal(0, 2, (300, 400)).astype(np.float32)
    ids = np.sort(np.argsort(-dense, 1)[:, :40], 1)
    logits = np.take_along_axis(dense, ids, 1)
    plain = draw_agreement(ids, logits, dense, Sampling(temperature=1.0), draws=4)
    assert plain.draws == 1200
    assert plain.equal == plain.covered
    assert 0.3 < plain.share < 0.99
    cut = draw_agreement(ids, logits, dense, Sampling(temperature=1.0, top_p=0.7), draws=4)
    assert cut.equal < cut.covered
    whole = draw_agreement(np.broadcast_to(np.arange(400), dense.shape), dense, dense, Sampling(temperature=1.0, top_p=0.7), draws=2)
    assert whole.equal == whole.covered == whole.draws
    want = 0
    for seed in range(4):
        sampling, steps = Sampling(temperature=1.0, seed=seed), np.arange(300)
        want += int((choose(ids, logits, sampling, steps) == choose(case(300, 400)[0], dense, sampling, steps)).sum())
    assert plain.equal == want


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"temperature": -1}, "temperature is -1, expected 0 (greedy) or at least 0.001"), ({"temperature": float("nan")}, "temperature is nan"),
     ({"top_k": -3}, "top_k is -3"), ({"top_k": 2.5}, "top_k is 2.5"), ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.1}, "top_p is 1.1"),
     ({"min_p": 2.0}, "min_p is 2.0"), ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
     ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
     ({"frequency_penalty": None}, "frequency_penalty is None"), ({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "expected a whole number from 0 to 2^64 - 1"),
     ({"logit_bias": {-4: 1.0}}, "a token of logit_bias is -4"), ({"logit_bias": {4: float("inf")}}, "logit_bias of token 4 is inf"),
     ({"allowed": ()}, "allowed is empty"), ({"allowed": (1, -1)}, "allowed is not all token ids")],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_in_one_sentence(wrong, text):
    with pytest.raises(SettingsError) as caught:
        Sampling(**wrong)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_refused():
    for sampling, name in ((Sampling(logit_bias={100: 1.0}), "logit_bias"), (Sampling(allowed=(3, 100)), "allowed")):
        check_tokens(sampling, 101)
        with pytest.raises(SettingsError, match=f"{name} names token 100, expected ids below 100"):
            check_tokens(sampling, 100)


def test_a_row_without_an_allowed_candidate_is_refused():
    ids, logits = case(2, 5)
    with pytest.raises(SettingsError, match="no candidate of row 0 may be chosen"):
        choose(ids, logits, Sampling(allowed=(7,)), [0, 1])


@pytest.mark.parametrize("steps", [[0], [0, -1], [0, 2**32], [[0, 1]]], ids=str)
def test_steps_that_are_no_keys_are_refused(steps):
    ids, logits = case(2, 5)
    with pytest.raises(SettingsError, match="expected one from 0 to 2\\^32 - 1 for each row"):
        choose(ids, logits, Sampling(temperature=1.0), steps)


def test_module_imports_without_torch():
    import subprocess
    import sys

    code = "import sys, flashhead_edge.decoding; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
