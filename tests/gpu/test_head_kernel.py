"""The head-step kernel against the reference: tokens, counts, candidates; graphs; the plans of small boards."""

import functools
import math

import numpy as np
import pytest
import torch

from flashhead_edge.bench.head import LOGITS_WITHIN, with_shares
from flashhead_edge.caps import with_gates
from flashhead_edge.cases import CASES, FEW_CODES, Case, huge_row, made_index, made_rows, made_states
from flashhead_edge.errors import SettingsError
from flashhead_edge.kernels.build import architecture_of, function, static_shared
from flashhead_edge.kernels.head import cuda_head, logits_launcher, token_launcher
from flashhead_edge.kernels.packing import STATIC_SHARED
from flashhead_edge.reference import torch_head

pytestmark = pytest.mark.gpu

SMALL = [c for c in CASES if c.vocab_size < 60_000]
FEW = Case("SmolLM2-135M, few codes", 49_152, 576, rows=FEW_CODES.rows, centroids=FEW_CODES.centroids, shares=FEW_CODES.mean, caps=FEW_CODES.caps)
SMALL.append(FEW)  # what the benches' "fitted" has
BOARDS = {
    "found": {},
    "Orin Nano": {"multiprocessors": 8, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "AGX Orin": {"multiprocessors": 16, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "sm_86": {"multiprocessors": 84, "shared_bytes": 99 << 10, "architecture": "compute_86"},  # sm_120 gives a block as much
}
STATES = 96
COMPARED = 0.4  # of a case's states, at least, float32 cannot decide otherwise
DRAWS = 6  # of that rounding: an item nearer to a margin, to a cap's threshold or to the winner than the kernel is wrong moves in one of them, nearly surely


@functools.cache
def heads(case, dtype, device="cuda"):
    """Index, rows and states of a case, margins set on its own states; what the reference says, and which states float32 may decide otherwise."""
    weight = torch.from_numpy(made_rows(case)).to(device, dtype)
    hidden = torch.from_numpy(made_states(case, STATES)).to(device, dtype)
    index = with_shares(made_index(case), weight, hidden[:16], case.shares)
    reference = torch_head(index, weight)
    want = reference.step(hidden)
    return index, weight, hidden, want, near_misses(reference, hidden, want)


def near_misses(reference, hidden, want):
    """States in which an item lies so near to a margin, to where a cap cuts, or to the winner that float32 may decide otherwise, [N] bool.

    These are the states for which the definition itself, in float64, gives other candidates, counts or another token once they are moved by what
    rounding does. A sum of d terms in float32 is wrong by at most (d / 32 + 12) 2^-24 times the sum of their sizes (head_step.cu), which is at most
    sqrt(d) times the root of the sum of their squares (Cauchy and Schwarz): so every element moves by that share of itself, at random, which moves a sum
    by as much of that root. Equal rows with equal codes stay equal however the state moves, so ties are no near misses.
    """
    d = hidden.shape[1]
    rounding = (d / 32 + 12) * 2.0**-24 * math.sqrt(d)
    generator = torch.Generator("cpu").manual_seed(5)
    out = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for _ in range(DRAWS):
        noise = torch.randn(hidden.shape, dtype=torch.float64, generator=generator).to(hidden.device)
        moved = reference.step(hidden.double() * (1 + rounding * noise))
        width = max(moved.ids.shape[1], want.ids.shape[1])
        other = (wide_ids(moved, width) != wide_ids(want, width)).any(1)
        out |= other | (moved.counts != want.counts).any(1) | (moved.token != want.token) | (moved.capped != want.capped)
    return out


def wide_ids(step, width):
    """A step's candidates [N, width], -1 where there is none."""
    return torch.nn.functional.pad(step.ids, (0, width - step.ids.shape[1]), value=-1)


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_step_is_the_reference(case, dtype, board):
    index, weight, hidden, want, near = heads(case, dtype)
    head = cuda_head(index, weight, **BOARDS[board])
    found = [head.step(part) for part in hidden.split([1, 3, 32, 28, 32])]
    token, counts = torch.cat([f.token for f in found]), torch.cat([f.counts for f in found])
    capped = torch.cat([f.capped for f in found])
    clear = ~near
    assert float(clear.float().mean()) >= COMPARED
    assert torch.equal(token[clear], want.token[clear])
    assert torch.equal(counts[clear], want.counts[clear])
    assert torch.equal(capped[clear], want.capped[clear])
    # the others: an item at a threshold goes either way
    assert float((token == want.token).float().mean()) >= 0.97
    assert int((counts - want.counts).abs().max()) <= max(2, int(0.01 * want.counts.max()))
    width = max(s.ids.shape[1] for s in (want, *found))
    assert torch.equal(torch.cat([wide_ids(f, width) for f in found])[clear], wide_ids(want, width)[clear])
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


@pytest.mark.parametrize("case", [c for c in SMALL if c.states in ("tied", "huge")], ids=str)
def test_cases_are_what_they_are_called(case):
    """Most winners of tied cases are two equal rows, and the huge row wins where its logit is not negative."""
    _, _, _, want, near = heads(case, torch.bfloat16)
    share = (want.token == huge_row(case.vocab_size)) if case.states == "huge" else (want.logits == want.logits.amax(1, keepdim=True)).sum(1) > 1
    assert float(share[~near].float().mean()) > 0.3


def test_bias_spare_rows_and_other_types():
    """A bias, rows beyond the vocabulary that would win, and states of another type than the rows."""
    case = next(c for c in SMALL if c.name == "two codes")
    index, weight, hidden, _, _ = heads(case, torch.bfloat16)
    v = case.vocab_size
    bias = 3 * torch.randn(v, generator=torch.Generator("cuda").manual_seed(6), device="cuda").to(weight.dtype)
    spare = torch.full((61, case.hidden_size), 50.0, dtype=weight.dtype, device="cuda")
    head = cuda_head(index, torch.cat([weight, spare]), torch.cat([bias, bias.new_full((61,), 1e4)]))
    for states in (hidden, hidden.half(), hidden.float()):
        reference = torch_head(index, weight, bias)
        seen = states if states.dtype != torch.float32 else states.to(weight.dtype)
        want, found = reference.step(seen), head.step(states)
        clear = ~near_misses(reference, seen, want)
        assert float(clear.float().mean()) >= COMPARED
        assert torch.equal(found.token[clear], want.token[clear]) and torch.equal(found.counts[clear], want.counts[clear])
        width = max(found.ids.shape[1], want.ids.shape[1])
        assert torch.equal(wide_ids(found, width)[clear], wide_ids(want, width)[clear])
        off = (found.logits.amax(1) - want.logits.amax(1)).abs() / (1 + want.logits.amax(1).abs())
        assert float(off[clear].max()) < 1e-5  # float32 sums of 256 terms
        logits = head.logits(states)
        assert logits.shape == (STATES, v) and torch.equal(logits.argmax(1), found.token)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_harms_no_other(value):
    for name in ("fitted", "published", "bits alone"):
        case = next(c for c in SMALL if c.name == name)
        index, weight, hidden, _, _ = heads(case, torch.bfloat16)
        head, bad = cuda_head(index, weight), hidden[:8].clone()
        bad[3, 17] = value
        others = [0, 1, 2, 4, 5, 6, 7]
        want, token = head.token(hidden[:8]), head.token(bad)
        assert torch.equal(token[others], want[others]) and 0 <= int(token[3]) < case.vocab_size
        assert torch.equal(head.token(hidden[:8]), want)  # the workspace is as it was


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
    tokens = token_launcher(head, totals)
    found = [tokens(hidden[:n]) for n in (32, 5)]
    assert torch.equal(found[0], step.token) and torch.equal(found[1], step.token[:5])
    assert int(totals[0]) == sum(rows) + 37
    for few in (launcher, tokens):
        with pytest.raises(SettingsError, match="33 states were given, expected 1 to 32"):
            few(torch.cat([hidden[:32], hidden[:1]]))
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


def test_a_cap_cuts_among_thousands_that_are_equal():
    """A state of zeros: all clusters score alike, and the cap keeps those of the smallest numbers."""
    case = Case("zeros", 49_152, 64, 16, (), "float16", (math.inf,), (256 / 3072,), always=0, state_power=0.0)
    weight = torch.from_numpy(made_rows(case)).to("cuda", torch.bfloat16)
    index = with_gates(made_index(case), [math.inf], [256])
    hidden = torch.zeros(3, 64, dtype=torch.bfloat16, device="cuda")
    hidden[1] = torch.from_numpy(made_states(case, 1)[0]).to(hidden)
    want, found = torch_head(index, weight).step(hidden), cuda_head(index, weight).step(hidden)
    assert bool(found.capped.all()) and found.counts.tolist() == want.counts.tolist()
    for i in (0, 2):
        assert torch.equal(found.ids[i], want.ids[i]) and int(found.token[i]) == int(want.token[i])


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


def test_a_step_is_traced():
    index, weight, hidden, _, _ = heads(SMALL[0], torch.bfloat16)
    head = cuda_head(index, weight)

    def step(states):
        return head.launch(2 * states)[0] + 1

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(hidden[:4]), step(hidden[:4]))


def test_the_kernel_declares_as_much_shared_memory_as_plans_leave_it():
    for architecture in (architecture_of(torch.device("cuda", 0)), "compute_87"):
        for name in ("flashhead_step", "flashhead_widen"):
            assert static_shared(function("head_step.cu", name, 0, architecture), name) <= STATIC_SHARED


def test_fakes_say_the_shapes():
    index, weight, hidden, _, _ = heads(SMALL[0], torch.bfloat16)
    head = cuda_head(index, weight)
    head.launch(hidden[:4])
    arguments = head.arguments(hidden[:4])
    for operator in (torch.ops.flashhead.head_step, torch.ops.flashhead.head_logits):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
