"""The decode thread over the CUDA backend, on an emulated GPU: several texts share its steps. On a real one: tests/gpu/test_cuda_texts.py."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("starlette")

from cuda_emulator import emulated, host_bytes
from cuda_truth import VOCAB, small_program
from small_decoders import made_at_once

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError
from flashhead_edge.jetson import cuda_backend, cuda_library, cuda_texts
from flashhead_edge.jetson.engine import ExportedEngine
from flashhead_edge.serve.orders import Order
from flashhead_edge.serve.run import texts_at_once

try:
    cuda_library.library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def engine(tmp_path):
    """An engine, and the launchers that have been called."""
    with emulated(small_program(tmp_path / "llama", "llama")) as (m, called):
        b = cuda_backend.Cuda(m, cuda_backend.export_settings(m.program, dict(m.program.settings), "made"))
        b.wide = host_bytes(4 * m.head.rows * VOCAB), host_bytes(4 * m.head.rows * VOCAB)  # full-width logits
        yield ExportedEngine(b, None, frozenset()), called


def order(ids, tokens, sampling=None, *, logprobs=None, dense=False, afresh=False) -> Order:
    return Order(tuple(ids), tokens, sampling or Sampling(), (), None, logprobs, dense, afresh)


ORDERS = [
    order([1, 2, 3], 40),
    order([9, 8], 30, Sampling(temperature=1.0, seed=3), afresh=True),
    order([7] * 150, 20, Sampling(temperature=0.5, top_p=0.9, seed=4)),
    order([5, 5, 5, 5], 6, Sampling(frequency_penalty=0.5), logprobs=2),
    order([40, 41], 25, dense=True),
    order([40, 42], 35),
    order([9, 8, 7], 12, Sampling(temperature=1.0, seed=3), afresh=True),
]


def test_texts_at_once_share_steps_and_are_what_each_is_alone(engine):
    """More texts than rows: drawn and greedy by the device, by the loop with log-probabilities, by the dense head."""
    engine, called = engine
    rows, extra = texts_at_once(engine, 64)
    assert rows == engine.backend.model.program.batch == 4 and extra == 0 and texts_at_once(engine, 2) == (2, 0)
    want = [made_at_once(engine, [one], rows)[0][0] for one in ORDERS]
    steps = called.count("fh_advance")
    called.clear()
    tokens, ended = made_at_once(engine, ORDERS, rows)
    assert tokens == want and set(ended) == {"max_new_tokens"}
    assert called.count("fh_advance") < 0.6 * steps


def test_one_whose_states_are_no_numbers_harms_no_other(engine, monkeypatch):
    """The pass fails, each is fed alone, and only whose fault it was ends with an error."""
    engine, _ = engine
    want = [made_at_once(engine, [one], 4)[0][0] for one in ORDERS[:3]]
    orders = [*ORDERS[:3], dataclasses.replace(ORDERS[3], ids=(11, 12))]
    real, bodies = cuda_texts.Texts.step, []

    def failing(self, some, tokens):
        bodies.extend(body for body in some if body.going is None and body not in bodies)
        if any(body in bodies and body.length > 4 for body in some):
            raise CheckpointError("planted: expected nothing of the kind; go on")
        real(self, some, tokens)

    monkeypatch.setattr(cuda_texts.Texts, "step", failing)
    tokens, ended = made_at_once(engine, orders, 4)
    assert ended == [*3 * ["max_new_tokens"], "engine_failed"] and tokens[:3] == want and len(tokens[3]) == 4
