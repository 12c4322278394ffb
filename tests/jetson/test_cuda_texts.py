"""Several texts in the cache of the CUDA backend, over an emulated GPU: who stands where, who goes along, who leaves. On a real one: tests/gpu."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
from cuda_emulator import emulated, host_bytes
from cuda_truth import CONTEXT, VOCAB, small_program
from small_readers import Reader, alone, come_and_go, together

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError
from flashhead_edge.generation import PromptCache, stream
from flashhead_edge.jetson import cuda_ahead, cuda_backend, cuda_kernels, cuda_library, cuda_program, cuda_session, cuda_texts
from flashhead_edge.jetson.cuda_backend import Cuda
from flashhead_edge.jetson.engine import ExportedEngine
from flashhead_edge.program.head import Device

try:
    cuda_library.library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPTS = [[1, 5, 9, 200, 31, 77, 1024, 8], [3, 17], [400, 12, 12, 12, 90, 7, 7, 300, 21, 55, 1000, 2], [8] * 70, [2, 2, 9]]
SETTINGS = [
    Sampling(), Sampling(temperature=0.75, top_k=20, seed=7), Sampling(temperature=1.0, seed=3), Sampling(frequency_penalty=0.5), Sampling(temperature=1.5),
]  # fmt: skip # the last two are chosen by the loop


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return small_program(tmp_path_factory.mktemp("programs") / "llama", "llama")


def opened(m) -> Cuda:
    b = Cuda(m, cuda_backend.export_settings(m.program, dict(m.program.settings), "made"))
    b.wide = host_bytes(4 * m.head.rows * VOCAB), host_bytes(4 * m.head.rows * VOCAB)  # full-width logits
    return b


def engine_of(b: Cuda) -> ExportedEngine:
    """Without a tokenizer."""
    return ExportedEngine(b, None, frozenset())


def test_texts_that_join_and_leave_are_what_they_are_alone(program):
    """Drawn by the device, greedy, chosen by the loop; they begin one after the other, end at different tokens, and more of them come than there are rows."""
    with emulated(program) as (m, _):
        engine = engine_of(opened(m))
        texts = [(PROMPTS[n], 6 + 3 * n, SETTINGS[n]) for n in range(5)]
        wanted = [alone(engine, *text) for text in texts]
        assert come_and_go(engine, texts, 4) == wanted


def test_texts_of_the_device_share_every_step_and_each_step_runs_before_the_one_before_it_is_read(program):
    with emulated(program) as (m, called):
        b, tokens = opened(m), 12
        wanted = [alone(engine_of(b), PROMPTS[n], tokens, SETTINGS[n]) for n in range(3)]
        engine = engine_of(b)
        readers = [Reader(engine, PROMPTS[n], tokens, SETTINGS[n]) for n in range(3)]
        for r in readers:
            r.take()
        before = called.count("fh_advance")
        for step in range(1, tokens):
            together(readers)
            assert called.count("fh_advance") == before + min(step + 1, tokens - 1)  # one ahead, and none beyond the last
        assert [r.found for r in readers] == wanted


def test_who_leaves_takes_no_step_from_the_others(program):
    """The step that was under way when a text ended is the others' next one."""
    with emulated(program) as (m, called):
        b = opened(m)
        engine = engine_of(b)
        wanted = [alone(engine_of(b), PROMPTS[n], 20, Sampling()) for n in range(3)]
        readers = [Reader(engine, PROMPTS[n], 20, Sampling()) for n in range(3)]
        for r in readers:
            r.take()
        together(readers)
        readers[0].stream.close()
        before = called.count("fh_advance")
        together(readers[1:])
        assert called.count("fh_advance") == before
        for _ in range(17):
            together(readers[1:])
        assert [r.found for r in readers[1:]] == wanted[1:] and len(readers[0].found) == 2
        assert called.count("fh_advance") == before + 17
        assert readers[0].cache.ids == [*PROMPTS[0], wanted[0][0]] and [readers[n].cache.body.row for n in (1, 2)] == [1, 0]


def test_what_a_row_held_is_there_when_its_text_goes_on(program):
    """Rows change places; a prompt that goes on from an ended text is not read again."""
    with emulated(program) as (m, _):
        b = opened(m)
        engine = engine_of(b)
        readers = [Reader(engine, PROMPTS[n], 5, Sampling()) for n in range(4)]
        for _ in range(5):
            together(readers)
        for n in (3, 1, 2, 0):
            longer = [*PROMPTS[n], *readers[n].found, 44]
            want = alone(engine_of(opened(m)), longer, 6, Sampling())
            run = stream(engine, longer, 6, cache=readers[n].cache)
            assert [t.id for t in run] == want and run.summary.prompt_read == 2 and readers[n].cache.body.row == 0


def test_a_texts_row_is_free_when_nobody_holds_it(program):
    with emulated(program) as (m, _):
        b = opened(m)
        bodies = [b.body() for _ in range(4)]
        assert [body.row for body in bodies] == [0, 1, 2, 3]
        bodies[2] = None
        gc.collect()
        fifth = b.body()
        assert fifth.row == 2 and bodies[0].row == 0
        for body in (bodies[1], fifth, bodies[3]):
            body.feed([1, 2])
        sixth = b.body()  # in the place of whom nobody has fed for longest
        assert sixth.row == 0 and bodies[0].row == -1
        seventh = b.body()  # one that has just begun is not the one
        assert sixth.row == 0 and seventh.row == 1
        with pytest.raises(EngineError, match="expected at most 4 at a time"):
            bodies[0].feed([1])


def test_one_text_alone_has_the_row_that_it_had(program):
    """A cache begins a new text without a second row."""
    with emulated(dataclasses.replace(program, batch=1)) as (m, _):
        b, cache = opened(m), PromptCache()
        engine = engine_of(b)
        for prompt in (PROMPTS[0], PROMPTS[1]):
            assert [t.id for t in stream(engine, prompt, 5, cache=cache)] == alone(engine_of(opened(m)), prompt, 5, Sampling())
        assert m.plan.exchange_bytes == 0 and cache.body.row == 0


def test_what_fails_has_changed_nobody(program, monkeypatch):
    with emulated(program) as (m, _):
        b = opened(m)
        one, two, full = b.body(), b.body(), b.body()
        for body in (one, two):
            body.feed(PROMPTS[0])
        full.feed([5] * CONTEXT)
        with pytest.raises(EngineError, match=f"{CONTEXT + 1} tokens, expected at most the program's {CONTEXT} positions"):
            one.feed_together([one, full], [[4], [4]])
        with pytest.raises(EngineError, match="2 tokens of a text beside others, expected one of each"):
            one.feed_together([one, two], [[4], [4, 5]])
        with monkeypatch.context() as patch:
            patch.setattr(cuda_texts, "to_float32", lambda values, precision: np.full(values.shape, np.nan, np.float32))
            with pytest.raises(CheckpointError, match="NaN or infinity"):
                one.feed_together([one, two], [[4], [4]])
        assert one.length == two.length == len(PROMPTS[0])
        states = one.feed_together([one, two], [[4], [4]])
        assert np.array_equal(*states) and one.length == two.length == len(PROMPTS[0]) + 1
        assert b.head.step(states[1]).token == b.head.step(one.last[0]).token


def test_a_draft_beside_other_texts_leaves_them_alone(program):
    with emulated(program) as (m, _):
        b = opened(m)
        engine = engine_of(b)
        wanted = [alone(engine_of(b), PROMPTS[0], 9, Sampling()), alone(engine_of(b), PROMPTS[3], 20, Sampling())]
        other = Reader(engine, PROMPTS[0], 9, Sampling())
        other.take()
        drafted = stream(engine, PROMPTS[3], 20, speculate=5)
        found = []
        for _ in range(8):
            found.append(next(drafted).id)
            other.take()
        found += [t.id for t in drafted]
        assert [other.found, found] == wanted


def test_a_step_is_cut_for_all_rows_whichever_of_them_it_takes(program):
    """So that a row has the same bits beside any others. A prompt is cut for itself."""
    with emulated(program) as (m, _):
        m.program = dataclasses.replace(program, context=4096)  # for which a text alone would be cut otherwise on this GPU
        node = next(n for n in m.program.nodes if n.op == "DecodeAttention")

        def cut(rows: int, queries: int) -> tuple[int, int]:
            plan = cuda_program.attention_arguments(m, node, cuda_program.Run(rows, queries, 0, 0, 0))[1]
            return plan.splits, plan.cluster

        whole = cut(4, 1)
        assert {cut(rows, 1) for rows in (1, 2, 3)} == {whole}
        m.cut = 1
        assert cut(4, 1) == cut(1, 1) != whole


@pytest.mark.parametrize(("multiprocessors", "capability"), [(16, 87), (20, 110)])
def test_kernels_made_ahead_are_enough_for_any_number_of_texts(multiprocessors, capability, tmp_path):
    """A board without a compiler serves as many texts as its program's head takes."""
    made = small_program(tmp_path / "board", "llama", Device(multiprocessors, 163 << 10, capability), batch=1)
    made = dataclasses.replace(made, context=2048)  # of which a text alone may have several blocks share the cache
    ahead = set(cuda_ahead.launched_there(made))
    for texts in range(1, 9):
        model = cuda_session.planned_model(dataclasses.replace(made, batch=texts), cuda_ahead.facts_of(made.device))
        assert set(cuda_kernels.launched_by(lambda model=model: cuda_program.dry_pass(model))) <= ahead, texts
