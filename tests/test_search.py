"""Margins and their price: against brute force on data small enough for it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead_edge.intervals import allowed_misses, wilson
from flashhead_edge.search import TAIL_RATE, Group, Prepared, choose_margins, gate_gaps, mean_counts, misses, needs, trace


def prepared(power: float = 0.0) -> Prepared:
    g = torch.Generator().manual_seed(0)
    k, size, r = 6, 4, 10
    filled = torch.ones(k * size, dtype=torch.bool)
    filled[-1] = False
    layers = tuple((torch.randn(k * size, c, generator=g), 0.5 + torch.rand(k * size, generator=g)) for c in (4, 10))
    return Prepared(size, torch.randn(2, k, r, generator=g), torch.randn(k, r, generator=g), 0.5 + torch.rand(k, generator=g), layers, filled, power)


def states(n: int = 40) -> torch.Tensor:
    z = torch.randn(n, 10, generator=torch.Generator().manual_seed(1))
    z[:, 0] = 1
    return z


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_need_is_the_smallest_margin_that_lets_the_winner_pass(power):
    p, z = prepared(power), states()
    slots = torch.randint(23, (40,), generator=torch.Generator().manual_seed(2))
    need = needs(p, z, 1, slots)
    for n in range(40):
        unit = float(z[n, 1:].square().mean().sqrt()) ** power
        scores = p.folds[1] @ z[n]
        cluster = int(slots[n]) // 4
        assert float(need[n, 0]) == pytest.approx(float((scores.max() - scores[cluster]) / p.probe_error[cluster] / unit), rel=1e-4, abs=1e-4)
        total = (p.centroids @ z[n]).repeat_interleave(4)  # codes add to the centroids as stored, whatever fold opened
        for j, (values, error) in enumerate(p.layers, 1):
            total = total + values @ z[n, : values.shape[1]]
            best = total[p.filled].max()
            assert float(need[n, j]) == pytest.approx(float((best - total[slots[n]]) / error[slots[n]] / unit), rel=1e-4, abs=1e-4)


def test_prices_are_counts_of_what_passes():
    p, z = prepared(), states()
    traced = trace(p, [(z[:25], 0), (z[25:], 1)], [5.0, 6.0, 7.0])
    margins = [2.0, 1.5, 1.0]
    totals = torch.zeros(4)
    for part, fold in ((z[:25], 0), (z[25:], 1)):
        gaps = gate_gaps(p, part, fold)
        opened = gaps[0] <= 2.0
        first = opened.repeat_interleave(4, 1) & p.filled & (gaps[1] <= 1.5)
        totals += torch.tensor([opened.sum(), opened.sum() * 23 / 6, first.sum(), (first & (gaps[2] <= 1.0)).sum()])
    assert mean_counts(traced, margins) == pytest.approx((totals / 40).tolist(), rel=1e-5)


def lawful(n: int = 20_000, gates: int = 3) -> torch.Tensor:
    """Needs that follow the law which margins are chosen by: at every gate the share above m is e^(-TAIL_RATE m)."""
    return -torch.rand(n, gates, generator=torch.Generator().manual_seed(3)).log() / TAIL_RATE


def cost_of(traced, price, margins) -> float:
    return sum(c * x for c, x in zip(mean_counts(traced, margins)[1:], price))


def test_chosen_margins_keep_the_promise_and_are_nearly_the_cheapest():
    """On needs that follow the law: no combination of margins that keeps the promise is a tenth cheaper."""
    p, z, need, price = prepared(), states(200), lawful(), [3.0, 10.0, 30.0]
    groups = [Group("a", 0, 15_000, 40), Group("b", 15_000, 20_000, 10)]
    traced = trace(p, [(z, 0)], [9.0] * 3)
    margins = choose_margins(need, groups, traced, price)
    lost = misses(need, torch.tensor(margins), groups)
    assert lost[0] <= 40
    assert lost[1] <= 10
    assert lost[0] == 40 or lost[1] == 10  # no slack is left
    grid = [[m + x for x in torch.linspace(-1.5, 1.5, 13).tolist()] for m in margins]
    options = [list(m) for m in itertools.product(*grid)]
    allowed = [m for m in options if all(a <= g.allowed for a, g in zip(misses(need, torch.tensor(m), groups), groups))]
    assert len(allowed) > 100
    assert cost_of(traced, price, margins) <= 1.1 * min(cost_of(traced, price, m) for m in allowed)


def test_a_gate_that_costs_more_has_the_lower_margin():
    p, need, groups = prepared(), lawful(), [Group("a", 0, 20_000, 40)]
    traced = trace(p, [(states(200), 0)], [9.0] * 3)
    cheap, dear = (choose_margins(need, groups, traced, [3.0, 10.0, x]) for x in (3.0, 300.0))
    assert cheap[2] - cheap[0] > dear[2] - dear[0] + 0.3


def test_no_misses_allowed_lets_every_winner_pass():
    p, z = prepared(), states()
    need = needs(p, z, 0, torch.arange(40) % 23)
    groups = [Group("a", 0, 40, 0)]
    margins = choose_margins(need, groups, trace(p, [(z, 0)], [float(need.max()) + 2] * 3), [1.0, 1.0, 1.0])
    assert misses(need, torch.tensor(margins), groups) == [0]


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 1998, table I: 81/263, 15/148, 0/20 and 1/29."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.sampled_from([0.98, 0.995, 0.999, 0.9995, 0.9999]))
def test_allowed_misses_are_the_most_that_the_interval_allows(n, share):
    m = allowed_misses(n, share)
    assert m == -1 or wilson(n - m, n)[0] >= share
    assert wilson(n - m - 1, n)[0] < share
