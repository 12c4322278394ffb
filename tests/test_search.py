"""Margins and their price: against brute force on data small enough for it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead_edge.intervals import allowed_misses, wilson
from flashhead_edge.search import Group, Prepared, choose_margins, gate_gaps, mean_counts, misses, needs, trace


def prepared(power: float = 0.0) -> Prepared:
    g = torch.Generator().manual_seed(0)
    k, size, r = 6, 4, 10
    filled = torch.ones(k * size, dtype=torch.bool)
    filled[-1] = False
    layers = tuple((torch.randn(k * size, c, generator=g), 0.5 + torch.rand(k * size, generator=g)) for c in (4, 10))
    return Prepared(size, torch.randn(2, k, r, generator=g), 0.5 + torch.rand(k, generator=g), layers, filled, power)


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
        total = scores.repeat_interleave(4)
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


def test_chosen_margins_keep_the_promise_and_are_nearly_the_cheapest():
    """Against every combination of the states' own needs: the greedy search may cost a tenth more, no miss more."""
    p, z = prepared(), states()
    total = p.folds[0] @ z.T
    slots = (total.T.repeat_interleave(4, 1) + sum(z[:, : v.shape[1]] @ v.T for v, _ in p.layers)).masked_fill(~p.filled, -torch.inf).topk(2).indices[:, 1]
    need = needs(p, z, 0, slots)
    groups = [Group("a", 0, 30, 2), Group("b", 30, 40, 1)]
    traced = trace(p, [(z, 0)], [float(x) * 1.01 for x in need.amax(0)])
    price = [3.0, 10.0, 100.0]
    margins = choose_margins(need, groups, traced, price)
    lost = misses(need, torch.tensor(margins), groups)
    assert lost[0] <= 2
    assert lost[1] <= 1

    def cost(m):
        return sum(c * x for c, x in zip(mean_counts(traced, m)[1:], price))

    worst = need.topk(4, dim=0).values * 1.00001
    options = itertools.product(*[worst[:, j].tolist() for j in range(3)])
    allowed = [list(m) for m in options if all(a <= g.allowed for a, g in zip(misses(need, torch.tensor(list(m)), groups), groups))]
    assert cost(margins) <= 1.1 * min(cost(m) for m in allowed)
    assert cost(margins) < cost([float(x) for x in need.amax(0)])


def test_no_misses_allowed_lets_every_winner_pass():
    p, z = prepared(), states()
    need = needs(p, z, 0, torch.arange(40) % 23)
    groups = [Group("a", 0, 40, 0)]
    margins = choose_margins(need, groups, trace(p, [(z, 0)], [float(x) * 1.01 for x in need.amax(0)]), [1.0, 1.0, 1.0])
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
