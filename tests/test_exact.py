"""The length of a round of exact mode: its formulas against a simulation, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from flashhead_edge.exact import LONGEST_ROUND, REPEATED_LIMIT, Record, forwards_per_round, round_length, tokens_per_round


def simulate(m: int, rate: float, replay: bool, rounds: int = 200_000) -> tuple[float, float]:
    """Mean tokens and body steps of a round: decode m, verify, put the first wrong one right."""
    wrong = np.random.default_rng(1).random((rounds, m)) < rate
    first = np.where(wrong.any(1), wrong.argmax(1), m)  # tokens before the first miss
    tokens = np.minimum(first + 1, m)
    again = np.where(first < m - 1, first, 0) * replay  # a miss on the last one leaves nothing to run again
    return float(tokens.mean()), float((m + again).mean())


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(("m", "rate"), [(1, 0.1), (2, 0.5), (8, 0.005), (8, 0.05), (20, 0.02)])
def test_formulas_are_those_of_a_simulated_round(m, rate, replay):
    tokens, forwards = simulate(m, rate, replay)
    assert tokens_per_round(m, rate) == pytest.approx(tokens, rel=0.005)
    assert forwards_per_round(m, rate, replay) == pytest.approx(forwards, rel=0.005)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("rate", [0.0005, 0.003, 0.01, 0.05, 0.3, 1.0])
def test_the_round_is_the_cheapest_within_the_limit(rate, replay):
    body, fast = 3.7, 0.02
    m = round_length(rate, body, fast, replay)

    def cost(k):
        return (forwards_per_round(k, rate, replay) * (body + fast) + 1) / tokens_per_round(k, rate)

    def repeated(k):
        return forwards_per_round(k, rate, replay) / tokens_per_round(k, rate) - 1

    allowed = [k for k in range(1, LONGEST_ROUND + 1) if repeated(k) <= REPEATED_LIMIT]
    assert m == min(allowed, key=cost)


def test_at_the_promised_agreement_the_figures_are_reached():
    """99.5 % agreement, the body of a 135M model: under a fifth of the dense bytes, under 3 % of the work repeated."""
    m = round_length(0.005, 3.75, 0.02)
    tokens, forwards = tokens_per_round(m, 0.005), forwards_per_round(m, 0.005, False)
    assert (1 + forwards * 0.02) / tokens < 0.2
    assert forwards / tokens - 1 < 0.03


def test_rounds_adapt():
    assert round_length(0.3, 3.7, 0.02) == 1
    assert round_length(0.0, 3.7, 0.02) == LONGEST_ROUND
    record = Record()
    start = round_length(record.rate, 3.7, 0.02)
    record.checked, record.missed = 2000, 2
    assert round_length(record.rate, 3.7, 0.02) > start
    record.missed = 400
    assert round_length(record.rate, 3.7, 0.02) == 1
