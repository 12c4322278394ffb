"""The dense head's kernel against float64: logits, tokens, ties, graphs, the plans of small boards."""

import functools

import pytest
import torch

from flashhead_edge.cases import DENSE_CASES, made_dense, made_states
from flashhead_edge.coding import decode, to_torch
from flashhead_edge.kernels.dense import cuda_dense
from flashhead_edge.kernels.ops import dense_head

pytestmark = pytest.mark.gpu

STATES = 32
BOARDS = {
    "found": {},
    "Orin Nano": {"multiprocessors": 8, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "AGX Orin": {"multiprocessors": 16, "shared_bytes": 163 << 10, "architecture": "compute_87"},
    "sm_86": {"multiprocessors": 84, "shared_bytes": 99 << 10, "architecture": "compute_86"},
}


@functools.lru_cache(maxsize=1)  # the large ones take gigabytes
def made(case):
    """Coded rows, their values in float64 (exact: 8 bits times 11), and states in float32."""
    rows = made_dense(case)
    return rows, decode(to_torch(rows, "cuda")).double(), torch.from_numpy(made_states(case, STATES)).cuda()


@pytest.fixture(autouse=True, scope="module")
def _memory():
    yield
    made.cache_clear()


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_tokens_and_logits_are_those_of_float64(case, dtype, board):
    rows, values, states = made(case)
    hidden = states.to(dtype)
    head = cuda_dense(rows, **BOARDS[board])
    want = hidden.double() @ values.T
    size = hidden.double().abs() @ values.abs().T  # sum of |products|, by which d additions may be wrong in float32
    best = want.amax(1)
    for n in (m for m in (1, 3, 8, 13, 32) if m <= head.most_rows):
        head.workspace.zero_()
        token, logit = head.launch(hidden[:n])
        bound = (case.hidden_size + 8) * 2.0**-23 * size[:n].gather(1, token.clamp(0, case.vocab_size - 1)[:, None])[:, 0]
        mine = want[:n].gather(1, token[:, None])[:, 0]
        assert ((logit.double() - mine).abs() <= bound).all(), n
        assert (best[:n] - mine <= 2 * (case.hidden_size + 8) * 2.0**-23 * size[:n].amax(1)).all(), n
        clear = (want[:n] >= (best[:n] - 2 * (case.hidden_size + 8) * 2.0**-23 * size[:n].amax(1))[:, None]).sum(1) == 1
        assert torch.equal(token[clear], want[:n].argmax(1)[clear]), n
        assert not head.workspace.any(), n
        if case.states == "tied":
            assert (token % 2 == 0).all()
        elif case.states == "negative":
            assert (logit < 0).all()


@pytest.mark.parametrize("case", [c for c in DENSE_CASES if c.vocab_size == 5_003 and c.states == "normal"], ids=str)
def test_grid_batch_and_repetition_change_nothing(case):
    rows, _, states = made(case)
    hidden = states.bfloat16()
    token, logit = cuda_dense(rows).launch(hidden)
    for other in (cuda_dense(rows, multiprocessors=m) for m in (1, 7, 64, 132)):
        for parts in (1, 8, 16, 32):
            found = [other.launch(part) for part in hidden.split(parts)]
            assert torch.equal(torch.cat([t for t, _ in found]), token)
            assert torch.equal(torch.cat([x for _, x in found]), logit)


def test_a_graph_replays_on_new_states():
    rows, values, states = made(DENSE_CASES[0])
    head, hidden = cuda_dense(rows), states[:4].bfloat16()
    head.launch(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, _ = head.launch(hidden)
    for start in range(0, STATES, 4):
        hidden.copy_(states[start : start + 4])
        token.fill_(-1)
        graph.replay()
        assert torch.equal(token, (hidden.double() @ values.T).argmax(1))


def test_states_of_any_size_keep_their_order():
    """Powers of two far from 1 change no token."""
    rows, _, states = made(DENSE_CASES[0])
    head = cuda_dense(rows)
    want, logit = head.launch(states.bfloat16())
    for power in (-90, -20, 20, 90):
        token, scaled = head.launch((states * 2.0**power).bfloat16())
        assert torch.equal(token, want)
        assert torch.equal(scaled, logit * 2.0**power)
    assert head.launch(torch.zeros_like(states).bfloat16())[0].tolist() == [0] * STATES


def test_a_state_that_is_not_a_number_does_not_touch_its_neighbours():
    rows, _, states = made(DENSE_CASES[0])
    head, hidden = cuda_dense(rows), states.bfloat16()
    want, _ = head.launch(hidden)
    hidden[3] = float("nan")
    token, logit = head.launch(hidden)
    want[3] = 0
    assert torch.equal(token, want)
    assert logit.isnan().nonzero().flatten().tolist() == [3]


def test_fakes_say_the_shapes():
    rows, _, states = made(DENSE_CASES[0])
    head = cuda_dense(rows)
    arguments = (states[:4].bfloat16(), head.codes, head.scales, head.workspace, head.vocab_size, head.bits, head.group, head.blocks, head.architecture)
    torch.library.opcheck(dense_head, arguments, test_utils=("test_schema", "test_faketensor"))
