"""The reference against the words of its own contract, each written out independently with numpy loops."""

import dataclasses

import numpy as np
import pytest
import torch
from small_heads import everything_open, few_probes

from flashhead_edge.coding import decode, to_torch
from flashhead_edge.errors import SettingsError
from flashhead_edge.index import own_error
from flashhead_edge.reference import below, dense_logits, dense_tokens, full_logits, greedy, run_stages, torch_head


@pytest.fixture(scope="module")
def weight():
    return torch.randn(131, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def narrow(index, margins, caps=None, power=0.0):
    """The same index with these margins (and caps), its errors made unequal."""
    noise = np.random.default_rng(0)
    gates = [index.probe, *(s.gate for s in index.stages)]
    caps = caps or [len(g.error) for g in gates]
    gates = [
        dataclasses.replace(g, margin=m, cap=c, unit=0.5, error=noise.integers(0, 12, len(g.error)).astype(np.uint8)) for g, m, c in zip(gates, margins, caps)
    ]
    stages = tuple(dataclasses.replace(s, gate=g) for s, g in zip(index.stages, gates[1:]))
    return dataclasses.replace(index, probe=gates[0], stages=stages, state_power=power)


def by_hand(index, weight, h):
    """One state through the three stages, item by item: the exact ids, the counts and whether a cap was hit."""
    z = h.astype(np.float64)
    unit = 1.0
    if index.rotation is not None:
        z = (z - index.mean) @ decode(to_torch(index.rotation)).double().numpy()
        unit = np.sqrt((z**2).mean()) ** index.state_power
        z = np.concatenate([[1.0], z])

    def passing(scores, g):
        best = max(scores.values())
        gaps = {i: (best - s) / (own_error(g)[i] * unit) for i, s in scores.items()}
        inside = sorted((i for i in scores if gaps[i] <= g.margin), key=lambda i: (gaps[i], i))
        return set(inside[: g.cap]), len(inside) > g.cap

    centroids = decode(to_torch(index.centroids)).double().numpy()
    clusters = {k: float(c @ z[: len(c)]) for k, c in enumerate(centroids)}
    opened, capped = passing(clusters, index.probe)
    size, table = index.cluster_size, index.token_table.reshape(-1)
    slots = {s for s in range(len(table)) if table[s] >= 0 and (s // size in opened or table[s] in index.always_scored)}
    scores, counts = {s: clusters[s // size] for s in slots}, [len(opened)]
    for stage in index.stages:
        counts.append(len(slots))
        rows = decode(to_torch(stage.rows)).double().numpy()
        scores = {s: scores[s] + float(rows[s] @ z[: rows.shape[1]]) for s in slots}
        slots, over = passing(scores, stage.gate)
        capped |= over
    counts.append(len(slots))
    return sorted(int(table[s]) for s in slots), counts, capped


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize(("margins", "caps"), [((2.0, 1.5, 1.0), None), ((9.0, 9.0, 9.0), (4, 11, 3)), ((0.0, 0.0, 0.0), None)])
def test_stages_are_the_words(weight, hidden, margins, caps, power):
    index = narrow(everything_open(weight, cascade=True), margins, caps, power)
    found = torch_head(index, weight).step(hidden)
    for n in range(len(hidden)):
        ids, counts, capped = by_hand(index, weight, hidden[n].numpy())
        assert found.ids[n][found.ids[n] >= 0].tolist() == ids
        assert found.counts[n].tolist() == counts
        assert bool(found.capped[n]) == capped


def test_many_ties_go_to_the_smallest_id(weight):
    """A state of zeros makes every logit equal, more of them than the quick pass keeps."""
    assert dense_tokens(weight, None, torch.zeros(3, weight.shape[1]), len(weight)).tolist() == [0, 0, 0]


def test_published_head_opens_the_best_by_cosine(weight, hidden):
    index = few_probes(weight, 3)
    found = torch_head(index, weight).step(hidden)
    for n in range(8):
        ids, counts, _ = by_hand(index, weight, hidden[n].numpy())
        assert found.ids[n][found.ids[n] >= 0].tolist() == ids
        assert counts[0] == 3


@pytest.mark.parametrize("cascade", [False, True])
def test_everything_open_is_the_dense_head(weight, hidden, cascade):
    head = torch_head(everything_open(weight, cascade), weight)
    dense = dense_logits(weight, None, hidden, 131)
    assert torch.equal(full_logits(head, hidden), dense)
    assert torch.equal(head.step(hidden).token, dense.argmax(1))
    assert torch.equal(dense_tokens(weight, None, hidden, 131), dense.argmax(1))


def test_bias_and_padding_rows(weight, hidden):
    """Rows beyond the vocabulary would win every step if they were looked at."""
    padded = torch.cat([weight, 100 * torch.ones(5, 16, dtype=weight.dtype), -100 * torch.ones(5, 16, dtype=weight.dtype)])
    bias = torch.linspace(-3, 3, 141)
    head = torch_head(everything_open(padded, vocab_size=131), padded, bias)
    dense = (hidden.double() @ padded[:131].double().T + bias[:131].double()).float()
    assert torch.equal(full_logits(head, hidden), dense)
    assert torch.equal(dense_tokens(padded, bias, hidden, 131), dense.argmax(1))
    assert int(head.step(hidden).token.max()) < 131


def test_a_row_does_not_depend_on_its_neighbours(weight, hidden):
    index = narrow(everything_open(weight, cascade=True), (2.0, 1.5, 1.0))
    head = torch_head(index, weight)
    together = head.step(hidden)
    for n in range(len(hidden)):
        alone = head.step(hidden[n : n + 1])
        assert alone.token[0] == together.token[n]
        assert torch.equal(alone.counts[0], together.counts[n])
        ids, here = together.ids[n], together.ids[n] >= 0
        assert torch.equal(alone.ids[0], ids[here])
        assert torch.equal(alone.logits[0], together.logits[n][here])


def test_ties_go_to_the_smaller_id(hidden):
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    token = torch_head(everything_open(weight), weight).step(hidden).token
    assert int(token.max()) < 40
    assert torch.equal(token, dense_tokens(weight, None, hidden, 120))
    assert greedy(torch.tensor([[7, 3, 5]]), torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [3]


def test_full_width_is_finite_and_below_the_exact(weight, hidden):
    """Coded scores below the best exact logit, tails below the smallest, also in bfloat16."""
    index = narrow(everything_open(weight, cascade=True), (1.0, 1.0, 0.5))
    head = torch_head(index, weight)
    wide, found, trail = full_logits(head, hidden), head.step(hidden), run_stages(head, hidden)
    assert wide.shape == (64, 131)
    assert bool(wide.isfinite().all())
    assert torch.equal(wide.argmax(1), found.token)
    for n in range(64):
        ids = found.ids[n][found.ids[n] >= 0]
        assert torch.equal(wide[n, ids], found.logits[n][: len(ids)])
        others = torch.ones(131, dtype=torch.bool).scatter(0, ids, False)
        assert float(wide[n][others].bfloat16().max()) < float(wide[n, ids].bfloat16().max())
        others[head.token_table[trail.slot[trail.row == n]]] = False
        assert float(wide[n][others].bfloat16().max()) < float(wide[n, ids].bfloat16().min())


def test_a_state_that_is_not_finite_is_said(weight, hidden):
    head, broken = torch_head(everything_open(weight), weight), hidden.clone()
    broken[3, 5] = torch.nan
    with pytest.raises(SettingsError, match="a hidden state is not finite"):
        head.step(broken)


def test_pressing_below_keeps_the_order():
    x, exact = torch.linspace(-30, 25, 500), torch.tensor(14.5)
    pressed = below(x, exact)
    assert bool((pressed.diff() >= 0).all()) and bool((pressed[x < 24].diff()[x[x < 24][1:] < 24] > 0).all())
    assert torch.equal(pressed[x < 13], x[x < 13]) and float(pressed.bfloat16().max()) < float(exact.bfloat16())


def test_always_scored_tokens_enter_the_cascade(weight, hidden):
    index = dataclasses.replace(narrow(everything_open(weight, cascade=True), (0.0, 99.0, 99.0)), always_scored=np.array([17, 100], np.int32))
    found = torch_head(index, weight).step(hidden)
    for n in range(64):
        assert {17, 100} <= set(found.ids[n].tolist())


def test_dtypes_and_no_rows(weight):
    head = torch_head(everything_open(weight, cascade=True), weight)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        h = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert torch.equal(head.step(h).token, dense_logits(weight, None, h, 131).argmax(1))
    assert dense_tokens(weight, None, torch.zeros(0, 16), 131).shape == (0,)
    assert head.step(torch.zeros(0, 16)).token.shape == (0,)
    assert head.logits(torch.zeros(0, 16)).shape == (0, 131)
