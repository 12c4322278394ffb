"""The CUDA backend on a GPU, torch-free: made models of several shapes against numpy's truth, graphs, batches, memory.

`python -m pytest tests/gpu/test_cuda_backend.py` needs numpy, NVRTC and the library of launchers (setup.py build_ext --inplace). FLASHHEAD_BOARD names
another device (tests/cuda_boards.py) whose code and launch plans this GPU runs; tests/gpu/test_cuda_boards.py does that for each.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from cuda_boards import as_board
from cuda_truth import CHUNK, CONTEXT, MODELS, Truth, small_program

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.generation import PromptCache, stream
from flashhead_edge.jetson import ExportedEngine, cuda_session, open_engine
from flashhead_edge.jetson.cuda_backend import open_program, sample
from flashhead_edge.program.head import Device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")]
PROMPTS = [[1, 5, 9, 200, 31, 77, 1024, 8], [3, 17], [400, 12, 12, 12, 90, 7, 7, 300, 21, 55, 1000, 2], [8] * 70]


if "FLASHHEAD_BOARD" in os.environ and shutil.which("nvidia-smi"):
    as_board(os.environ["FLASHHEAD_BOARD"])


def gpu() -> Device:
    facts = cuda_session.device_facts()
    return Device(facts.multiprocessors, facts.shared_bytes, facts.capability)


def opened(program, **options):
    return open_program(program, dict(program.settings), "made", chunk=CHUNK, **options)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = small_program(tmp_path_factory.mktemp("programs") / name, name, gpu())
        return made[name]

    return make


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, programs):
    program = programs(request.param)
    with opened(program) as b:
        yield program, b


@pytest.fixture(scope="module")
def llama(programs):
    with opened(programs("llama")) as b:
        yield b


def near(found, want, precision):
    """Every node rounds to 8 or 11 bits of 1 + mantissa; sums of other orders flip some of these, and what follows carries them on: a few steps of the type."""
    step = 2.0**-8 if precision == "bfloat16" else 2.0**-11
    return np.abs(found - want).max() <= 16 * step * np.abs(want).max()


def test_states_are_the_truths(model):
    """A prompt of more than a chunk, then tokens one by one through the graph: prefill and decode have kernels of their own."""
    program, b = model
    ids = [int(t) for t in np.random.default_rng(0).integers(0, 5_000, 150)]
    body, truth = b.body(), Truth(program)
    assert near(body.feed(ids[:140])[0], truth.feed(ids[:140])[-1], program.precision)
    for token in ids[140:]:
        hidden = body.feed([token])
        assert near(hidden[0], truth.feed([token])[-1], program.precision)
        step = b.head.step(hidden)
        exact = b.head.exact_logits(hidden, step.ids[0])
        assert np.abs(exact - step.logits).max() <= 1e-3 * np.abs(exact).max()  # float32 sums of products of 16-bit numbers, in another order
        assert step.token[0] == step.ids[0, step.logits[0].argmax()]


def test_what_is_cut_leaves_no_trace(llama):
    body = llama.body()
    body.feed(PROMPTS[0])
    kept = body.snapshot()
    want = body.feed([100])
    body.restore(kept)
    body.feed([7])
    body.feed([8])
    body.cut(2)
    assert np.array_equal(body.feed([100]), want)  # bit by bit


def test_the_loop_and_the_device_decode_the_same_text(model):
    _, b = model
    for prompt in PROMPTS:
        on_device = [int(t[0]) for t in b.decode([prompt], 20)]
        body, by_loop = b.body(), []
        hidden = body.feed(prompt)
        for _ in range(20):
            by_loop.append(int(b.head.step(hidden).token[0]))
            hidden = body.feed(by_loop[-1:])
        assert by_loop == on_device


def test_rows_of_a_batch_are_what_they_are_alone(llama):
    """Equal prompts give equal rows. A row alone has its attention cut otherwise, whose rounding may turn a token in time: most are the same."""
    steps = 24
    rows = np.stack(list(llama.decode([PROMPTS[0]] * 3, steps)))
    assert (rows == rows[:, :1]).all()
    alone = [np.stack(list(llama.decode([p], steps)))[:, 0] for p in PROMPTS]
    together = np.stack(list(llama.decode(PROMPTS, steps))).T
    assert (together[:, 0] == [a[0] for a in alone]).all()  # the prompts are read one by one in both
    same = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), steps) for x, y in zip(alone, together)]
    assert sum(same) > 0.7 * steps * len(PROMPTS)


def test_overlapping_launches_change_nothing(programs, llama):
    """Not a bit: only when launches begin."""
    want = [np.stack(list(llama.decode(PROMPTS[:rows], 30))) for rows in (1, 4)]
    m = cuda_session.open_model(programs("llama"), chunk=CHUNK, overlap=False)
    try:
        found = [np.stack([mail.token for mail in cuda_session.decode(m, PROMPTS[:rows], 30)]) for rows in (1, 4)]
    finally:
        m.close()
    assert all(np.array_equal(a, b) for a, b in zip(want, found))


def test_fused_steps_have_the_programs_bits(model):
    """States of a text and tokens of batches, to the last bit; the fused kernels add in the order of those that they stand for."""
    program, b = model
    m = cuda_session.open_model(program, chunk=CHUNK, fuses=False)
    try:
        plain = type(b)(m, b.settings)
        for rows in (1, 2, 4):
            want, found = (np.stack(list(each.decode(PROMPTS[:rows], 40))) for each in (plain, b))
            assert np.array_equal(want, found)
        ours, theirs = b.body(), plain.body()
        for piece in ([5, 6, 7], *([t] for t in range(20, 60))):
            assert np.array_equal(ours.feed(piece), theirs.feed(piece))
    finally:
        m.close()


def engine_of(b):
    """Without a tokenizer."""
    return ExportedEngine(b, None, frozenset())


def test_states_of_a_draft_are_those_of_its_tokens_alone(model):
    """Several tokens at once have their attention cut otherwise; more of them than the head takes are two passes. The second time it is a graph."""
    program, b = model
    one, ids = b.body(), PROMPTS[2][: b.model.head.rows] + [9, 8, 7]
    one.feed(PROMPTS[0])
    want = np.concatenate([one.feed([t]) for t in ids])
    for _ in range(2):
        body = b.body()
        body.feed(PROMPTS[0])
        body.states([7, 7, 7])
        body.cut(3)
        found = body.states(ids)
        assert near(found, want, program.precision)
        step = b.head.step(found)
        assert (step.token == step.ids[np.arange(len(ids)), step.logits.argmax(1)]).all()
        body.cut(len(ids))
        verified = body.tokens_after(ids)
        assert np.array_equal(verified.token, step.token) and np.array_equal(verified.counts, step.counts)
        for i in range(len(ids)):  # the head's batch against the head alone, by a call of its own
            assert b.head.step(found[i : i + 1].copy()).token[0] == step.token[i]


def test_speculation_gives_the_greedy_text(llama):
    """Up to sums in another order: made weights have near ties, so that most of the text is asked for."""
    same = []
    for prompt in (PROMPTS[0] * 3, PROMPTS[2] * 2):
        want = [int(t[0]) for t in llama.decode([prompt], 40)]
        for longest in (3, 7, 20):
            run = stream(engine_of(llama), prompt, 40, speculate=longest)
            found = [t.id for t in run]
            assert run.summary.tokens == 40 == run.summary.passes + run.summary.accepted
            same.append(next((i for i, (a, b) in enumerate(zip(want, found)) if a != b), 40))
    assert sum(same) > 0.7 * 40 * len(same)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.75, top_k=40, seed=5)], ids=["greedy", "drawn"])
def test_a_text_goes_on_by_itself(model, sampling):
    """The loop's text is the device's, its cache holds it, and the next text goes on from there."""
    _, b = model
    cache, engine = PromptCache(), engine_of(b)
    want = [int(t[0]) for t in b.decode([PROMPTS[0]], 100, sampling)]
    assert [t.id for t in stream(engine, PROMPTS[0], 100, sampling, cache=cache)] == want
    assert cache.ids == [*PROMPTS[0], *want[:-1]]
    cache = PromptCache()  # a prompt that is not read as a whole has sums in another order
    stopped = stream(engine, PROMPTS[0], 100, sampling, stop=[want[30]], cache=cache)
    first = want[: want.index(want[30]) + 1]
    assert [t.id for t in stopped] == first and cache.ids == [*PROMPTS[0], *first[:-1]]
    longer = [*PROMPTS[0], *first, 17]
    kept = [t.id for t in stream(engine, longer, 20, sampling, cache=cache)]
    assert cache.ids[: len(longer)] == longer and len(kept) == 20


@pytest.mark.parametrize("settings", [{"temperature": 0.75, "top_k": 40}, {"temperature": 1.25, "top_p": 0.875, "min_p": 0.015625}, {"temperature": 0.6875}])
def test_draws_are_those_of_the_definition(llama, settings):  # of settings that float32 holds exactly, as the device has them
    m = llama.model
    for seed in (0, 3, 2**63 + 5):
        s = Sampling(seed=seed, **settings)
        found = [int(t[0]) for t in llama.decode([PROMPTS[0]], 8, s)]
        body = llama.body()
        hidden = body.feed(PROMPTS[0])
        for number, token in enumerate(found):
            step = llama.head.step(hidden)
            assert token == choose(step.ids, step.logits, s, [number], None, None, 1.0, None)[0]
            hidden = body.feed([token])
    assert (cuda_session.setting(m, "temperature") == 0).all()
    drawn = [[int(t[0]) for t in llama.decode([PROMPTS[0]], 30, Sampling(temperature=1.0, seed=seed))] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    together = np.stack(list(llama.decode([PROMPTS[0]] * 2, 2, Sampling(temperature=1.0, seed=1))))
    assert together[0].tolist() == [drawn[0][0], drawn[2][0]]


def test_full_width_logits_agree_with_the_step(llama):
    states = np.random.default_rng(1).standard_normal((llama.model.program.batch + 3, llama.settings.hidden_size)).astype(np.float32)
    step, logits = llama.head.step_with_logits(states)
    assert logits.shape == (len(states), llama.settings.vocab_size) and np.isfinite(logits).all() and (logits.argmax(1) == step.token).all()
    for row, (ids, values) in enumerate(zip(step.ids, step.logits)):
        assert np.array_equal(logits[row, ids[ids >= 0]], values[ids >= 0])
    assert llama.head.step(states[-1:]).token == step.token[-1]


def test_a_step_is_captured_once_for_each_number_of_rows(llama):
    for rows in (1, 2, 3):
        list(llama.decode(PROMPTS[:rows], 5))
    before = llama.model.captures
    for rows in (1, 2, 3):
        list(llama.decode(PROMPTS[:rows], 9))
    llama.body().feed([1])
    assert llama.model.captures == before


def test_thousands_of_steps_take_no_more_memory(programs):
    with opened(programs("llama")) as b:
        steps = CONTEXT - 10
        list(b.decode([PROMPTS[1]], steps))
        device = b.model.device
        free = device.memory()[0]
        for _ in range(2_000 // steps + 1):
            assert len(list(b.decode([PROMPTS[1]], steps))) == steps
        assert device.memory()[0] >= free


def test_a_text_that_is_left_in_the_middle_frees_its_memory(programs):
    program = programs("llama")
    with opened(program) as first:
        list(first.decode([PROMPTS[1]], 3))
        device = first.model.device
        before = device.memory()[0]
        for _ in range(3):
            with opened(program) as b:
                text = b.decode([PROMPTS[0]], 100)
                next(text), next(text)
                assert device.memory()[0] < before
            text.close()
        assert device.memory()[0] >= before - (2 << 20)  # the driver may keep a page of its own
        with pytest.raises(EngineError, match="it is closed"):
            next(b.decode([PROMPTS[0]], 3))


def test_two_sessions_in_a_process_do_not_see_each_other(programs, llama):
    want = np.stack(list(llama.decode(PROMPTS[:2], 12)))
    with opened(programs("llama")) as second:
        ours, theirs = llama.decode(PROMPTS[:2], 12), second.decode(PROMPTS[2:], 12)
        mixed = np.stack([next(ours) for _ in range(12) if next(theirs) is not None])
        alone = np.stack(list(second.decode(PROMPTS[:2], 12)))
    assert np.array_equal(mixed, want) and np.array_equal(alone, want)


def test_what_does_not_fit_is_a_sentence(llama):
    with pytest.raises(EngineError, match=f"expected at most the program's {CONTEXT} positions"):
        llama.body().feed([1] * (CONTEXT + 1))
    with pytest.raises(SettingsError, match="expected 1 to 4"):
        next(llama.decode([[1]] * 5, 2))
    older = llama.body()
    older.feed([1, 2])
    others = [llama.body() for _ in range(4)]
    others[0].feed([3])
    with pytest.raises(EngineError, match="another text has taken over the cache"):
        older.feed([4])


@pytest.mark.skipif("FLASHHEAD_CHECKPOINT" not in os.environ, reason="FLASHHEAD_CHECKPOINT names no checkpoint")
def test_a_checkpoints_text_is_the_same_by_the_loop_and_on_the_device():
    """The kernels' way from `generate --backend cuda`: the second opening reads what the first has made."""
    for _ in range(2):
        engine = open_engine(os.environ["FLASHHEAD_CHECKPOINT"], "cuda")
        with engine.backend as b:
            ids = engine.tokenizer("The capital of France is")["input_ids"]
            by_loop = [token.id for token in stream(engine, ids, 24)]
            on_device = [int(t[0]) for t in b.decode([ids], 24)]
            assert by_loop == on_device[: len(by_loop)] and np.isfinite(b.body().feed(ids)).all()


def test_pycudas_stream_is_ours_too(programs):
    """Both live in the primary context."""
    pytest.importorskip("pycuda")
    import pycuda.autoprimaryctx
    import pycuda.driver as cuda

    theirs = cuda.Stream()
    with opened(programs("llama"), stream=theirs.handle) as b:
        assert len(list(b.decode([PROMPTS[0]], 5))) == 5
    assert pycuda.autoprimaryctx.context is not None


def test_draw_settings_of_a_row_are_its_own(llama):
    m = llama.model
    sample(m, Sampling(temperature=1.0), [5, 6])
    try:
        assert cuda_session.setting(m, "seed")[:2].tolist() == [5, 6] and (cuda_session.setting(m, "temperature")[:2] == 1).all()
    finally:
        sample(m, Sampling(), [0] * m.program.batch)
