"""The head-step kernel against the reference: tokens, counts, candidates; graphs; the plans of small boards."""

import functools
import math

import numpy as np
import pytest
import torch

from flashhead_edge.bench.head import LOGITS_WITHIN, with_shares
from flashhead_edge.cases import CASES, made_index, made_rows, made_states
from flashhead_edge.kernels.head import cuda_head, logits_launcher
from flashhead_edge.reference import run_stages, torch_head

pytestmark = pytest.mark.gpu

SMALL = [c for c in CASES if c.vocab_size < 60_000]
BOARDS = {
    "found": {},
    "Orin Nano": {"multiprocessors": 8, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "AGX Orin": {"multiprocessors": 16, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "sm_86": {"multiprocessors": 84, "shared_bytes": 99 << 10, "architecture": "compute_86"},
}
STATES = 96


@functools.cache
def heads(case, dtype):
    """Index, rows and states of a case, margins set on its own states."""
    weight = torch.from_numpy(made_rows(case)).to("cuda", dtype)
    hidden = torch.from_numpy(made_states(case, STATES)).to("cuda", dtype)
    index = with_shares(made_index(case), weight, hidden[:16], case.shares)
    reference = torch_head(index, weight)
    return index, weight, hidden, reference.step(hidden), near_misses(reference, hidden)


def near_misses(reference, hidden):
    """States of which an item lies so near to a margin, a cap or the winner that float32 may decide otherwise, [N] bool.

    Gaps are perturbed by what float32 sums may be wrong by (2^-24 times some hundred terms, relative to the scores), and
    a state whose counts or token move is left out.
    """
    import dataclasses

    from flashhead_edge.caps import with_gates

    index = reference.index
    margins = [index.probe.margin, *(s.gate.margin for s in index.stages)]
    caps = [index.probe.cap, *(s.gate.cap for s in index.stages)]
    want = run_stages(reference, hidden)
    out = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for factor in (1 - 2e-5, 1 + 2e-5):
        moved = run_stages(dataclasses.replace(reference, **gates_of(with_gates(index, [m * factor for m in margins], caps), reference)), hidden)
        out |= (moved.counts != want.counts).any(1)
    return out | want.capped  # where a cap cuts, the order of near equals decides: compared apart


def gates_of(index, reference):
    import dataclasses

    gates = [index.probe, *(s.gate for s in index.stages)]
    new = [dataclasses.replace(old, margin=g.margin) for g, old in zip(gates, [reference.probe, *(g for _, g in reference.stages)])]
    return {"probe": new[0], "stages": tuple((rows, g) for (rows, _), g in zip(reference.stages, new[1:]))}


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_step_is_the_reference(case, dtype, board):
    index, weight, hidden, want, near = heads(case, dtype)
    head = cuda_head(index, weight, **BOARDS[board])
    found = [head.step(part) for part in hidden.split([1, 3, 32, 28, 32])]
    token, counts = torch.cat([f.token for f in found]), torch.cat([f.counts for f in found])
    capped = torch.cat([f.capped for f in found])
    best = want.logits.amax(1)
    second = want.logits.masked_fill(want.logits == best[:, None], -math.inf).amax(1)
    clear = ~near & ((best - second) > 1e-5 * (1 + best.abs()))
    assert torch.equal(token[clear], want.token[clear])
    assert torch.equal(counts[~near], want.counts[~near])
    # a cap that cuts keeps exactly as many items, and the token of almost all states
    assert float((token == want.token).float().mean()) >= 0.97
    assert float((capped == want.capped).float().mean()) >= 0.97
    assert int((counts - want.counts).abs().max()) <= max(2, int(0.01 * want.counts.max()))
    n = 0
    for f in found:
        ids, logits = f.ids.cpu().numpy(), f.logits.double().cpu().numpy()
        for i in range(len(ids)):
            valid = ids[i] >= 0
            exact = (weight[torch.from_numpy(ids[i][valid]).cuda()].double() @ hidden[n].double()).cpu().numpy()
            scale = (weight[torch.from_numpy(ids[i][valid]).cuda()].double().abs() @ hidden[n].double().abs()).cpu().numpy()
            assert (np.abs(logits[i][valid] - exact) <= (case.hidden_size / 32 + 7) * 2.0**-24 * scale).all()
            assert int(valid.sum()) == int(counts[n, -1]) and (np.diff(ids[i][valid]) > 0).all()
            n += 1


@pytest.mark.parametrize("case", [c for c in SMALL if c.name in ("fitted", "every cap hit", "tied rows, caps hit", "published", "SmolLM2-135M")], ids=str)
def test_grid_batch_and_repetition_change_nothing(case):
    index, weight, hidden, _, _ = heads(case, torch.bfloat16)
    steps = [cuda_head(index, weight, multiprocessors=m).step(hidden[:64]) for m in (1, 7, 64, None)]
    head = cuda_head(index, weight)
    steps += [head.step(hidden[:64]) for _ in range(20)]
    for step in steps[1:]:
        for name in ("token", "ids", "logits", "counts", "capped"):
            assert torch.equal(getattr(step, name), getattr(steps[0], name)), name
    alone = torch.cat([head.step(hidden[i : i + 1]).token for i in range(64)])
    assert torch.equal(alone, steps[0].token)


@pytest.mark.parametrize("board", ["found", "Orin Nano"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_full_width_logits_are_those_of_the_reference(case, board):
    """Exact ones are the step's; coded ones and tails are float32 sums of what the reference sums in float64."""
    index, weight, hidden, _, near = heads(case, torch.bfloat16)
    head = cuda_head(index, weight, **BOARDS[board])
    want = torch_head(index, weight).logits(hidden)
    for part in (slice(0, 1), slice(1, 20), slice(20, STATES)):
        step, logits = head.step_with_logits(hidden[part])
        alone = head.step(hidden[part])
        assert torch.equal(step.token, alone.token) and torch.equal(step.ids, alone.ids)
        assert logits.shape == (len(alone.token), case.vocab_size) and bool(logits.isfinite().all())
        assert torch.equal(logits.argmax(1), step.token)
        there = step.ids >= 0
        assert torch.equal(logits.gather(1, step.ids.clamp(min=0))[there], step.logits[there])
        others = logits.scatter(1, step.ids.clamp(min=0), -math.inf)  # id 0 stands for none: at worst one token less is looked at
        assert bool((others.bfloat16().amax(1) < step.logits.amax(1).bfloat16()).all())
        clear = ~near[part]
        size = want[part].abs().amax(1, keepdim=True)
        assert bool(((logits - want[part]).abs() <= LOGITS_WITHIN * (1 + size))[clear].all())


@pytest.mark.parametrize("case", [c for c in SMALL if c.name in ("fitted", "every cap hit", "published", "bits alone")], ids=str)
def test_a_launcher_gives_the_same_logits_in_fresh_memory(case):
    index, weight, hidden, _, _ = heads(case, torch.bfloat16)
    head, totals = cuda_head(index, weight), torch.zeros(4, dtype=torch.int64, device="cuda")
    width = case.vocab_size + 61
    launcher = logits_launcher(head, width, totals)
    kept, rows = [], (1, 32, 7, 3, 1, 32)
    for n in rows:
        kept.append(launcher(hidden[:n]))
    want = cuda_head(index, weight).logits(hidden[:32])
    for n, found in zip(rows, kept):
        assert torch.equal(found[:, : case.vocab_size], want[:n])
        assert bool((found[:, case.vocab_size :] == -3.0e4).all())
    step = head.step(hidden[:32])
    wanted = [[n, *(int(step.counts[:n, j].sum()) for j in (0, -1)), int(step.capped[:n].sum())] for n in rows]
    assert totals.tolist() == [sum(column) for column in zip(*wanted)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launcher(hidden[:7])
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, kept[2])


def test_full_width_logits_in_a_graph():
    index, weight, hidden, _, _ = heads(SMALL[0], torch.bfloat16)
    head, state = cuda_head(index, weight), hidden[:4].clone()
    head.launch_logits(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *_, logits = head.launch_logits(state)
    for start in range(0, 64, 4):
        state.copy_(hidden[start : start + 4])
        logits.fill_(math.nan)
        graph.replay()
        assert torch.equal(logits, head.logits(hidden[start : start + 4]))


def test_a_graph_replays_on_new_states():
    case = SMALL[0]
    index, weight, hidden, want, near = heads(case, torch.bfloat16)
    head, state = cuda_head(index, weight), hidden[:4].clone()
    head.launch(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, *_ = head.launch(state)
    for start in range(0, 64, 4):
        state.copy_(hidden[start : start + 4])
        token.fill_(-1)
        graph.replay()
        keep = ~near[start : start + 4]
        assert torch.equal(token[keep], want.token[start : start + 4][keep])


def test_fakes_say_the_shapes():
    index, weight, hidden, _, _ = heads(SMALL[0], torch.bfloat16)
    head = cuda_head(index, weight)
    head.launch(hidden[:4])
    arguments = head.arguments(hidden[:4])
    for operator in (torch.ops.flashhead.head_step, torch.ops.flashhead.head_logits):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
