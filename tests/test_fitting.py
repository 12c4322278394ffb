"""Fitting against sums made one state at a time: what is fitted to which states, and what its errors are the errors of."""

import numpy as np
import pytest
import torch
from small_states import SIZE, D, V, small_bias, small_states, small_table, small_weight
from torch import Tensor

from flashhead_edge.fitting import Moments, accumulate, coded_errors, fit_centroids, fit_coordinates, fit_layers, fold_of
from flashhead_edge.index import ERROR_STEPS

SOURCES = [small_states(700), small_states(300, seed=5)]
STATES = torch.cat(SOURCES)
FOLDS = torch.cat([fold_of(len(s)) for s in SOURCES])


@pytest.fixture(scope="module")
def moments() -> Moments:
    return accumulate(small_weight(), small_bias(), SOURCES, {SIZE: small_table()})[0]


@pytest.fixture(scope="module")
def best() -> Tensor:
    """The best logit of each cluster, [n, K] float64."""
    logits = STATES.double() @ small_weight().double().T + small_bias().double()
    return torch.stack([logits[:, torch.from_numpy(row[row >= 0]).long()].amax(1) for row in small_table()], 1)


def lifted(coordinates, moments: Moments) -> Tensor:
    x = torch.cat([torch.ones(len(STATES), 1, dtype=torch.float64), STATES.double() - moments.mean], 1)
    return x @ coordinates.lift


def rms(x: Tensor) -> Tensor:
    return x.square().mean(0).sqrt()


def test_a_fold_holds_whole_samples_and_starts_anew_in_every_source():
    assert fold_of(300).tolist() == [0] * 128 + [1] * 128 + [0] * 44
    assert FOLDS[700:828].tolist() == [0] * 128


def test_moments_are_those_of_every_state(moments, best):
    x = torch.cat([torch.ones(len(STATES), 1, dtype=torch.float64), STATES.double() - STATES.double().mean(0)], 1)
    assert sum(moments.count) == len(STATES)
    for fold in (0, 1):
        here = fold == FOLDS
        assert moments.count[fold] == int(here.sum())
        # sums of a few hundred float32 products
        assert torch.allclose(moments.second[fold], x[here].T @ x[here], rtol=1e-4, atol=1e-2)
        assert torch.allclose(moments.best[SIZE][fold], x[here].T @ best[here], rtol=1e-4, atol=1e-2)
        assert torch.allclose(moments.best_square[SIZE][fold], best[here].square().sum(0), rtol=1e-4)


def test_winners_come_in_the_order_of_the_states():
    _, winners = accumulate(small_weight(), small_bias(), SOURCES, {SIZE: small_table()})
    logits = STATES.double() @ small_weight().double().T + small_bias().double()
    assert torch.equal(winners, logits.argmax(1))


def test_rows_give_their_logits_in_the_coordinates_as_coded(moments):
    """With every coordinate there, what coding the rotation has changed is made good by the rows."""
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 6.0)
    z = lifted(coordinates, moments)
    logits = STATES.double() @ small_weight().double().T + small_bias().double()
    assert coordinates.rows.shape == (V, D + 1)
    assert float((z @ coordinates.rows.double().T - logits).abs().max()) < 0.02  # the states' ridge, a thousandth, holds rows back
    assert torch.allclose(rms(z[:, 1:]), torch.ones(D, dtype=torch.float64), atol=0.01)


def test_what_dropped_coordinates_lose_is_counted(moments):
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 0.5)
    assert coordinates.rows.shape[1] < D + 1
    logits = STATES.double() @ small_weight().double().T + small_bias().double()
    missing = logits - lifted(coordinates, moments) @ coordinates.rows.double().T
    assert torch.allclose(coordinates.lost.double().sqrt(), rms(missing), rtol=0.02)  # the ridge again


def test_states_of_a_fold_open_clusters_that_were_fitted_without_them(moments):
    """What the states of fold 0 say changes the centroids of fold 1 alone, and those as stored."""
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 6.0)
    noise = torch.randn(moments.best[SIZE][0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = Moments(moments.mean, moments.count, moments.second, {SIZE: moments.best[SIZE] + 100 * torch.stack([noise, 0 * noise])}, moments.best_square)
    before, after = (fit_centroids(coordinates, m, small_table(), "float16") for m in (moments, other))
    assert torch.equal(before.folds[0], after.folds[0])
    assert not torch.allclose(before.folds[1], after.folds[1], atol=0.01)
    assert not torch.allclose(before.values, after.values, atol=0.01)


@pytest.mark.parametrize("code", ["float16", "product4"])
def test_a_centroids_error_is_that_of_states_it_was_fitted_without(moments, best, code):
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 6.0)
    centroids = fit_centroids(coordinates, moments, small_table(), code)
    z = lifted(coordinates, moments)
    missing = torch.cat([best[f == FOLDS] - z[f == FOLDS] @ centroids.folds[f].double().T for f in (0, 1)])
    assert torch.allclose(centroids.error, rms(missing), rtol=1e-3)
    if code == "float16":  # in the states that they were fitted to they are better
        seen = torch.cat([best[f != FOLDS] - z[f != FOLDS] @ centroids.folds[f].double().T for f in (0, 1)])
        assert float((rms(seen) < rms(missing)).float().mean()) > 0.9


def test_centroids_fit_the_best_logit_better_than_the_members_mean(moments, best):
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 6.0)
    centroids = fit_centroids(coordinates, moments, small_table(), "float16")
    means = torch.stack([coordinates.rows[torch.from_numpy(row[row >= 0]).long()].mean(0) for row in small_table()])
    z = lifted(coordinates, moments)
    assert float((rms(best - z @ centroids.values.double().T) < 0.5 * rms(best - z @ means.double().T)).float().mean()) > 0.95


def test_each_layer_codes_what_is_left_and_its_error_is_what_is_left_then(moments):
    coordinates = fit_coordinates(small_weight(), small_bias(), moments, 6.0)
    centroids = fit_centroids(coordinates, moments, small_table(), "float16")
    layers = fit_layers(coordinates, centroids.values, small_table(), ("bits4", "bits8"))
    z = lifted(coordinates, moments)
    logits = STATES.double() @ small_weight().double().T + small_bias().double()
    slots = small_table().reshape(-1)
    filled = torch.from_numpy(slots >= 0)
    score = (z @ centroids.values.double().T).repeat_interleave(SIZE, 1)
    errors = []
    for layer in layers:
        score = score + z[:, : layer.values.shape[1]] @ layer.values.double().T
        errors.append(rms((logits[:, np.where(slots < 0, 0, slots)] - score)[:, filled]))
        assert torch.allclose(layer.error[filled], errors[-1], rtol=0.02)  # the metric has the states' ridge
    assert float((errors[1] < 0.5 * errors[0]).float().mean()) > 0.95


def test_errors_come_back_from_a_byte_within_half_a_step():
    error = torch.logspace(-2, 1, 500, dtype=torch.float64)
    data, unit, back = coded_errors(error)
    assert data.dtype == np.uint8
    assert torch.equal(back, unit * torch.exp2(torch.from_numpy(data).double() / ERROR_STEPS))
    assert float((back / error).log2().abs().max()) <= 0.5 / ERROR_STEPS + 1e-6
