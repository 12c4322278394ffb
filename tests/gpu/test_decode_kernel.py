"""The decode kernel against decoding.py: the same tokens seed by seed, log-probabilities, graphs that follow their settings."""

import numpy as np
import pytest
import torch

from flashhead_edge.cases import DECODE_CASES, DecodeCase, made_candidates
from flashhead_edge.decoding import Sampling, choose, gumbel, scores, softmax
from flashhead_edge.kernels.ops import decode

pytestmark = pytest.mark.gpu

ROWS = 64
ARCHITECTURE = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""


def settings(case, rows, seed, steps):
    """The arrays of the kernel's settings, one value for all rows."""
    floats = [torch.full((rows,), x, dtype=torch.float64, device="cuda") for x in (case.temperature, case.top_p, case.min_p)]
    whole = torch.full((rows,), case.top_k, dtype=torch.int64, device="cuda")
    bits = torch.full((rows,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cuda")
    return [*floats, whole, bits, torch.from_numpy(steps).cuda()]


def padded(ids, logits, count):
    """Candidates as decoding.py takes them: -1 behind a row's count."""
    behind = np.arange(ids.shape[1]) >= count[:, None]
    return np.where(behind, -1, ids), np.where(behind, -np.inf, logits.astype(np.float64))


@pytest.mark.parametrize("architecture", ["found", "compute_86", "compute_87"])  # a draw has no plan: a block a row, of fixed size
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_tokens_are_those_of_the_definition(case, architecture):
    ids, logits, count = made_candidates(case, ROWS)
    sampling = {"temperature": case.temperature, "top_k": case.top_k, "top_p": case.top_p, "min_p": case.min_p}
    wanted_ids, wanted_logits = padded(ids, logits, count)
    counts = torch.full((ROWS, 3), -5, dtype=torch.int64, device="cuda")
    counts[:, -1] = torch.from_numpy(count)
    on_device = torch.from_numpy(ids).cuda(), torch.from_numpy(logits).cuda(), counts[:, -1]
    for seed, first in ((0, 0), (1, 2**32 - ROWS), (2**64 - 3, 5), (2**40 + 7, 10**9)):
        steps = first + np.arange(ROWS)
        code = ARCHITECTURE if architecture == "found" else architecture
        token, logprob, best_ids, best_logprobs = decode(*on_device, *settings(case, ROWS, seed, steps), 20, code)
        s = Sampling(seed=seed, **sampling)
        assert token.tolist() == choose(wanted_ids, wanted_logits, s, steps).tolist()
        order = np.lexsort((wanted_ids, -wanted_logits))[:, :20]
        there = np.isfinite(np.take_along_axis(wanted_logits, order, 1))
        log = np.log(np.maximum(softmax(wanted_logits), 1e-300))
        found, found_log = best_ids.cpu().numpy()[:, : order.shape[1]], best_logprobs.cpu().numpy()[:, : order.shape[1]]
        assert (found == np.where(there, np.take_along_axis(wanted_ids, order, 1), -1)).all()
        expected = np.take_along_axis(log, order, 1)
        assert (np.isneginf(found_log) == ~there).all()
        assert (np.abs(found_log - expected)[there] <= 2.0**-23 * np.abs(expected)[there] + 1e-12).all()
        mine = np.take_along_axis(log, (wanted_ids == token.cpu().numpy()[:, None]).argmax(1)[:, None], 1)[:, 0]
        assert (np.abs(logprob.cpu().numpy() - mine) <= 2.0**-23 * np.abs(mine) + 1e-12).all()
        assert (best_ids[:, order.shape[1] :] == -1).all() and (best_logprobs[:, order.shape[1] :] == -torch.inf).all()
        alone, *_ = decode(*on_device, *settings(case, ROWS, seed, steps), 0, code)
        assert torch.equal(alone, token)


def test_draws_follow_the_distribution():
    """20,000 draws of one row, each with its own step: shares within five standard deviations of the probabilities."""
    case, n = DecodeCase(1.0, top_p=0.95, candidates=30), 20_000
    ids, logits, _ = made_candidates(case, 1)
    steps = np.arange(n)
    count = torch.full((n,), 30, dtype=torch.int64, device="cuda")
    many = [torch.from_numpy(x).cuda().expand(n, -1).contiguous() for x in (ids, logits)]
    token, *_ = decode(*many, count, *settings(case, n, 11, steps), 0, ARCHITECTURE)
    p = softmax(scores(ids, logits, Sampling(temperature=1.0, top_p=0.95)))[0]
    share = (token[:, None] == torch.from_numpy(ids).cuda()).double().mean(0).cpu().numpy()
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all()
    assert (token.cpu().numpy() == ids[0][(scores(ids, logits, Sampling(temperature=1.0, top_p=0.95)) + gumbel(11, steps, ids.repeat(n, 0))).argmax(1)]).all()


def test_rows_have_their_own_settings_and_a_graph_follows_them():
    n, cases = 8, [DECODE_CASES[i] for i in (0, 2, 14, 20, 30, 40, 45, 3)]
    ids, logits, count = made_candidates(DecodeCase(candidates=134), n)
    wanted_ids, wanted_logits = padded(ids, logits, count)
    on_device = [torch.from_numpy(x).cuda() for x in (ids, logits, count)]
    columns = [settings(c, 1, i, np.array([i])) for i, c in enumerate(cases)]
    arrays = [torch.cat(parts) for parts in zip(*columns)]
    decode(*on_device, *arrays, 0, ARCHITECTURE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, *_ = decode(*on_device, *arrays, 0, ARCHITECTURE)
    for turn in range(4):
        token.fill_(-7)
        graph.replay()
        for i, c in enumerate(cases):
            s = Sampling(c.temperature, c.top_k, c.top_p, c.min_p, seed=i)
            assert token[i].item() == choose(wanted_ids[i : i + 1], wanted_logits[i : i + 1], s, [i + turn])[0]
        arrays[-1] += 1


def test_nothing_to_choose_is_said():
    case = DecodeCase(candidates=8)
    ids, logits, count = (torch.from_numpy(x).cuda() for x in made_candidates(case, 3))
    logits[1] = -torch.inf
    count[2] = 0
    token, logprob, best_ids, best_logprobs = decode(ids, logits, count, *settings(case, 3, 0, np.arange(3)), 2, ARCHITECTURE)
    assert (token >= 0).tolist() == [True, False, False]
    assert token[1:].tolist() == [-1, -1] and (best_ids[1:] == -1).all() and (best_logprobs[1:] == -torch.inf).all() and (logprob[1:] == -torch.inf).all()


def test_fakes_say_the_shapes():
    case = DecodeCase(candidates=8)
    ids, logits, count = (torch.from_numpy(x).cuda() for x in made_candidates(case, 3))
    arguments = (ids, logits, count, *settings(case, 3, 0, np.arange(3)), 2, ARCHITECTURE)
    torch.library.opcheck(decode, arguments, test_utils=("test_schema", "test_faketensor"))
