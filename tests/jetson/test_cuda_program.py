"""The CUDA backend's executor over an emulated GPU (tests/cuda_emulator.py): states, caches, batches, draws, the mailbox. On a real one: tests/gpu."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import emulated, host_bytes
from cuda_truth import CHUNK, CONTEXT, MODELS, VOCAB, Truth, small_program

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import CheckpointError, EngineError, SettingsError
from flashhead_edge.generation import PromptCache, stream
from flashhead_edge.jetson import cuda_backend, cuda_library, cuda_program, cuda_session, cuda_texts
from flashhead_edge.jetson.cuda_backend import Cuda
from flashhead_edge.jetson.engine import ExportedEngine
from flashhead_edge.program.nodes import Node

try:
    cuda_library.library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPTS = [[1, 5, 9, 200, 31, 77, 1024, 8], [3, 17], [400, 12, 12, 12, 90, 7, 7, 300, 21, 55, 1000, 2], [8] * 70]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = small_program(tmp_path_factory.mktemp("programs") / name, name)
        return made[name]

    return make


def opened(m) -> Cuda:
    return Cuda(m, cuda_backend.export_settings(m.program, dict(m.program.settings), "made"))


def near(found, want, precision):
    """Sums of other orders (as many rows at once) round some values of each node to the neighbour: a few steps of the type."""
    step = 2.0**-8 if precision == "bfloat16" else 2.0**-11
    return np.abs(found - want).max() <= 16 * step * np.abs(want).max()


@pytest.mark.parametrize("name", MODELS)
def test_states_are_the_truths(name, programs):
    """A prompt of several chunks, and tokens after it, past a window: every value lies where its readers look, and lives as long as they do."""
    program = programs(name)
    ids = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 150)]
    with emulated(program) as (m, _):
        b = opened(m)
        body, truth = b.body(), Truth(program)
        assert near(body.feed(ids[:144])[0], truth.feed(ids[:144])[-1], program.precision)
        for token in ids[144:]:
            hidden = body.feed([token])
            assert near(hidden[0], truth.feed([token])[-1], program.precision)
            step = b.head.step(hidden)
            assert step.token[0] == step.ids[0, step.logits[0].argmax()]
            exact = b.head.exact_logits(hidden, step.ids[0])
            assert np.abs(exact - step.logits).max() <= 1e-5 * np.abs(exact).max()  # the same products in another order


def test_texts_of_a_batch_are_what_each_is_alone(programs):
    """Prompts of any lengths; each row keeps its own cache, length and draws."""
    with emulated(programs("llama")) as (m, _):
        b = opened(m)
        for s in (None, Sampling(temperature=0.75, top_k=20, seed=7)):
            together = np.stack(list(b.decode(PROMPTS, 8, s))).T
            for row, prompt in enumerate(PROMPTS):
                one = None if s is None else dataclasses.replace(s, seed=7 + row)
                assert together[row].tolist() == [int(t[0]) for t in b.decode([prompt], 8, one)]


def test_the_loop_and_the_device_decode_the_same_text(programs):
    with emulated(programs("qwen")) as (m, _):
        b = opened(m)
        on_device = [int(t[0]) for t in b.decode([PROMPTS[3]], 10)]
        body = b.body()
        hidden, by_loop = body.feed(PROMPTS[3]), []
        for _ in range(10):
            by_loop.append(int(b.head.step(hidden).token[0]))
            hidden = body.feed(by_loop[-1:])
        assert by_loop == on_device


def test_draws_are_those_of_the_definition(programs):
    with emulated(programs("llama")) as (m, _):
        b = opened(m)
        s = Sampling(temperature=1.25, top_p=0.875, seed=2**63 + 5)
        found = [int(t[0]) for t in b.decode([PROMPTS[0]], 6, s)]
        body = b.body()
        hidden = body.feed(PROMPTS[0])
        for number, token in enumerate(found):
            step = b.head.step(hidden)
            assert token == choose(step.ids, step.logits, s, [number], None, None, 1.0, None)[0]
            hidden = body.feed([token])
        assert (cuda_session.setting(m, "temperature") == 0).all()


def test_a_step_runs_before_the_one_before_it_is_read_and_one_more_where_the_caller_stops(programs):
    with emulated(programs("llama")) as (m, called):
        text = cuda_session.decode(m, [PROMPTS[0]], 50)
        next(text)
        assert called.count("fh_advance") == 2
        mail = next(text)
        assert called.count("fh_advance") == 3 and mail.counts.shape == (1, m.head.counted) and mail.capped.tolist() == [0]
        text.close()
        assert called.count("fh_advance") == 3
        assert len(list(cuda_session.decode(m, [PROMPTS[0]], 4))) == 4 and called.count("fh_advance") == 7  # none beyond the last


def test_the_mailbox_goes_round(programs):
    with emulated(programs("llama")) as (m, _):
        steps = 2 * cuda_program.SLOTS + 5
        tokens = [int(mail.token[0]) for mail in cuda_session.decode(m, [PROMPTS[1]], steps)]
        assert tokens[:20] == [int(mail.token[0]) for mail in cuda_session.decode(m, [PROMPTS[1]], 20)] and m.number == steps + 20


def test_a_head_alone_takes_states_of_any_number(programs):
    with emulated(programs("llama")) as (m, called):
        b = opened(m)
        b.wide = host_bytes(4 * m.head.rows * VOCAB), host_bytes(4 * m.head.rows * VOCAB)  # full-width logits
        head = b.head
        states = np.random.default_rng(1).standard_normal((m.head.rows + 3, m.head.hidden)).astype(np.float32)
        step = head.step(states)
        assert len(step.token) == len(states)
        exact = head.exact_logits(states.astype(np.float16).astype(np.float32), np.arange(VOCAB))
        assert (exact.argmax(1) == step.token).all()
        some = head.exact_logits(states.astype(np.float16).astype(np.float32), np.arange(VOCAB)[1:])  # by the file's rows, on the host
        assert called.count("fh_dense_rows") == 2 and np.allclose(some, exact[:, 1:], rtol=1e-5, atol=1e-4)  # sums of another order


def test_sums_and_products_with_constants_and_values(programs):
    """Biases, as Qwen2 has them, are nodes of ONNX's own."""
    program = programs("llama")
    at = next(i for i, n in enumerate(program.nodes) if n.op == "GatedProduct")
    gated = program.nodes[at]
    width, offset = program.widths[gated.outputs[0]], program.places["embedding"][0]  # whose first values serve as a bias
    extra = Node("Add", "one/Add", (gated.outputs[0], "bias"), ("one",), {}, ""), Node("Mul", "two/Mul", ("one", "one"), ("two",), {}, "")
    after = [dataclasses.replace(n, inputs=tuple("two" if i == gated.outputs[0] else i for i in n.inputs)) for n in program.nodes[at + 1 :]]
    changed = dataclasses.replace(
        program, nodes=(*program.nodes[: at + 1], *extra, *after), constants={"bias": "bias"}, widths=dict(program.widths) | {"one": width, "two": width},
        places=dict(program.places) | {"bias": (offset, 2 * width)},
    )  # fmt: skip

    class Biased(Truth):
        def GatedProduct(self, node, a, x):
            y = super().GatedProduct(node, a, x)
            if node is not gated:
                return y
            row = self.data[offset : offset + 2 * width].view(np.float16).astype(np.float32)
            return self.rounded(self.rounded(y + row) ** 2)

    with emulated(changed) as (m, called):
        hidden = opened(m).body().feed(PROMPTS[0])
        assert called.count("fh_combine") == 2
    assert near(hidden[0], Biased(program).feed(PROMPTS[0])[-1], program.precision)


def test_no_two_living_values_share_bytes(programs):
    for name in MODELS:
        program = programs(name)
        places, size = cuda_program.placed_values(program, CHUNK)
        sizes = cuda_program.value_sizes(program, CHUNK)
        born = {o: i for i, n in enumerate(program.nodes) for o in n.outputs}
        dies = {v: i for i, n in enumerate(program.nodes) for v in (*n.outputs, *n.inputs)}
        names = list(places)
        assert max(places[n] + sizes[n] for n in names) <= size < 0.5 * sum(sizes.values())
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                together = born[a] <= dies[b] and born[b] <= dies[a]
                apart = places[a] + sizes[a] <= places[b] or places[b] + sizes[b] <= places[a]
                assert apart or not together, (a, b)


def test_what_does_not_fit_is_a_sentence(programs):
    with emulated(programs("llama")) as (m, called):
        b = opened(m)
        with pytest.raises(EngineError, match=f"expected at most the program's {CONTEXT} positions"):
            b.body().feed([1] * (CONTEXT + 1))
        with pytest.raises(SettingsError, match="decode: 5 texts, expected 1 to 4"):
            next(b.decode([[1]] * 5, 2))
        with pytest.raises(EngineError, match=f"expected at most the program's {CONTEXT} positions; ask for fewer"):
            next(b.decode([[1]], CONTEXT + 1))
        with pytest.raises(EngineError, match="a text without a token"):
            next(b.decode([[1], []], 2))
        with pytest.raises(SettingsError, match="penalties"):
            next(b.decode([[1]], 2, Sampling(repetition_penalty=1.5)))
        older = b.body()
        others = [b.body() for _ in range(m.program.batch)]
        with pytest.raises(EngineError, match="another text has taken over the cache, expected at most 4 at a time"):
            older.feed([4])
        assert not called and {body.row for body in others} == set(range(4))


def test_a_text_that_has_lost_the_cache_says_so(programs):
    """Settings of the text that took it over stay."""
    with emulated(programs("llama")) as (m, _):
        b = opened(m)
        for take in (b.body, lambda: next(b.decode([[5]], 9, Sampling(temperature=0.75)))):
            text = b.decode([[1, 2]], 9)
            next(text), next(text)
            kept = take()
            with pytest.raises(EngineError, match="decode: another text has taken over the cache"):
                next(text)
            del kept
        want = [int(t[0]) for t in b.decode([[1, 2]], 9)]
        first, second = b.decode([[1, 2]], 9), b.decode([[3]], 9, Sampling(temperature=0.75, seed=3))
        next(first), next(second)
        first.close()
        assert cuda_session.setting(m, "temperature")[0] == 0.75
        second.close()
        assert cuda_session.setting(m, "temperature")[0] == 0 and [int(t[0]) for t in b.decode([[1, 2]], 9)] == want


def test_a_program_for_another_gpu_is_refused(programs):
    from cuda_emulator import FACTS

    program = programs("llama")
    head = cuda_program.head_of(program)
    cuda_session.check_program(program, head, FACTS)
    for changed, match in (
        ({"multiprocessors": 8}, "planned for 16 multiprocessors"),
        ({"shared_bytes": 1000}, "this GPU has 16 and 1,000"),
        ({"capability": 75}, "capability 7.5, expected 8.0 or more"),
    ):
        with pytest.raises(EngineError, match=match):
            cuda_session.check_program(program, head, dataclasses.replace(FACTS, **changed))
    strange = dataclasses.replace(program, nodes=(Node("Conv", "x/Conv", ("a",), ("x",), {}), *program.nodes))
    with pytest.raises(EngineError, match="nodes of kind Conv"):
        cuda_session.check_program(strange, head, FACTS)
    with pytest.raises(EngineError, match="the last node is"):
        cuda_program.head_of(dataclasses.replace(program, nodes=program.nodes[:-1]))


def test_the_emulator_covers_every_launcher():
    import cuda_emulator

    assert all(hasattr(cuda_emulator, name) for name in cuda_library.LAUNCHERS)
    assert Path(cuda_emulator.__file__).is_file()


def engine_of(b: Cuda) -> ExportedEngine:
    """Without a tokenizer."""
    return ExportedEngine(b, None, frozenset())


def loop(b: Cuda, prompt: list[int], tokens: int) -> list[int]:
    """Greedy, token by token."""
    body, found = b.body(), []
    hidden = body.feed(prompt)
    for _ in range(tokens):
        found.append(int(b.head.step(hidden).token[0]))
        hidden = body.feed(found[-1:])
    return found


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_states_of_a_draft_are_those_of_its_tokens_alone(name, programs):
    """More than the head takes at once, behind a prompt; what is cut is written again."""
    program = programs(name)
    with emulated(program) as (m, called):
        b = opened(m)
        one, ids = b.body(), PROMPTS[2]
        one.feed(PROMPTS[0])
        want = np.concatenate([one.feed([t]) for t in ids])
        body = b.body()
        body.feed(PROMPTS[0])
        body.states([7, 7, 7])
        body.cut(3)
        before = called.count("fh_head_step")
        found = body.states(ids)
        assert len(ids) > m.head.rows and called.count("fh_head_step") == before + 2
        assert near(found, want, program.precision) and body.length == len(PROMPTS[0]) + len(ids)
        step = b.head.step(found)
        assert (step.token == step.ids[np.arange(len(ids)), step.logits.argmax(1)]).all() and called.count("fh_head_step") == before + 2
        body.cut(len(ids))
        verified = body.tokens_after(ids)
        assert (verified.token == step.token).all() and (verified.counts == step.counts).all() and not verified.capped.any()
        for wide in (body.states, body.tokens_after):
            with pytest.raises(EngineError, match="positions; guess fewer"):
                wide([1] * (CONTEXT - body.length + 1))


def test_speculation_gives_the_greedy_text(programs):
    with emulated(programs("llama")) as (m, _):
        b = opened(m)
        prompt = PROMPTS[0] * 3
        want = loop(b, prompt, 40)
        for longest in (3, 7, 20):
            run = stream(engine_of(b), prompt, 40, speculate=longest)
            assert [t.id for t in run] == want
            assert run.summary.tokens == 40 == run.summary.passes + run.summary.accepted and run.summary.drafted


def test_a_text_goes_on_by_itself_one_step_ahead(programs):
    """Greedy and drawn, ended by a stop token, by the caller and by its length; the cache then holds all tokens but the last."""
    with emulated(programs("llama")) as (m, called):
        b, cache = opened(m), PromptCache()
        engine = engine_of(b)
        want = loop(b, PROMPTS[0], 30)
        run = stream(engine, PROMPTS[0], 30, cache=cache)
        before = called.count("fh_advance")
        assert next(run).id == want[0] and called.count("fh_advance") == before + 2  # the second is under way
        assert [t.id for t in run] == want[1:] and called.count("fh_advance") == before + 30
        assert cache.ids == [*PROMPTS[0], *want[:-1]] and run.summary.stopped == "max_new_tokens" and run.summary.clusters_opened == 40
        stopped = stream(engine, PROMPTS[0], 30, stop=[want[4]], cache=cache)
        assert [t.id for t in stopped] == want[: want.index(want[4]) + 1] and stopped.summary.prompt_read == 1
        assert cache.ids == [*PROMPTS[0], *want[: want.index(want[4])]]
        longer = [*cache.ids, want[4], 17, 19]
        assert [t.id for t in stream(engine, longer, 9, cache=cache)] == loop(b, longer, 9)
        s = Sampling(temperature=0.75, top_k=20, seed=11)
        assert [t.id for t in stream(engine, PROMPTS[1], 20, s)] == [int(t[0]) for t in b.decode([PROMPTS[1]], 20, s)]
        left = stream(engine, PROMPTS[1], 20, s, cache=cache)
        next(left), next(left)
        left.close()
        assert len(cache.ids) == len(PROMPTS[1]) + 1 and cache.body is not None and (cuda_session.setting(m, "temperature") == 0).all()


def test_what_the_device_cannot_choose_stays_in_the_loop(programs):
    with emulated(programs("llama")) as (m, called):
        b = opened(m)
        engine = engine_of(b)
        b.wide = host_bytes(4 * m.head.rows * VOCAB), host_bytes(4 * m.head.rows * VOCAB)  # full-width logits
        for s in (Sampling(temperature=1.5), Sampling(frequency_penalty=0.5), Sampling(allowed=(5, 6, 7)), Sampling(logit_bias={5: 1.0})):
            called.clear()
            assert len(list(stream(engine, PROMPTS[1], 4, s))) == 4 and called.count("fh_decode") == 0
        assert "among the candidates" in stream_notes(engine, Sampling(temperature=1.0))
        assert not stream_notes(engine, Sampling())


def test_a_cut_draw_is_the_devices_and_asks_for_no_logits_of_other_tokens(programs, monkeypatch):
    """The loop of an engine that does not go on by itself draws what the device draws."""
    with emulated(programs("llama")) as (m, _):
        engine = engine_of(opened(m))  # without room for full-width logits, which would ask for a GPU
        for s in (Sampling(temperature=1.25, top_p=0.875, seed=3), Sampling(temperature=0.75, top_k=5, min_p=0.01, seed=4)):
            want = [t.id for t in stream(engine, PROMPTS[1], 12, s)]
            with monkeypatch.context() as patch:
                patch.setattr(cuda_texts.CudaBody, "continues", lambda self, sampling: False)
                assert [t.id for t in stream(engine, PROMPTS[1], 12, s)] == want


def stream_notes(engine: ExportedEngine, s: Sampling) -> str:
    run = stream(engine, PROMPTS[1], 2, s)
    list(run)
    return " ".join(run.summary.notes)


def test_states_that_are_no_numbers_end_a_text_that_goes_on_by_itself(programs, monkeypatch):
    with emulated(programs("llama")) as (m, _):
        body = opened(m).body()
        body.feed(PROMPTS[0])
        monkeypatch.setattr(cuda_texts, "LOOKED_AT", 3)
        text = body.continued(20, Sampling())
        next(text), next(text)
        real = cuda_session.fetch

        def broken(m, rows, hidden, candidates):
            found = real(m, rows, hidden, candidates)
            found["hidden_states"][:] = np.inf
            return found

        monkeypatch.setattr(cuda_session, "fetch", broken)
        with pytest.raises(CheckpointError, match="NaN or infinity found"):
            next(text)


def test_a_text_that_goes_on_by_itself_and_has_lost_the_cache_says_so(programs):
    with emulated(dataclasses.replace(programs("llama"), batch=1)) as (m, _):
        b = opened(m)
        older = stream(engine_of(b), PROMPTS[0], 20)
        next(older)
        newer = PromptCache()
        newer.begin(engine_of(b), PROMPTS[1])
        with pytest.raises(EngineError, match="another text has taken over the cache"):
            next(older)
