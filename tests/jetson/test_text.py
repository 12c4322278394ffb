"""Text from an exported folder against the torch engine of its checkpoint: the same tokens, however they are chosen."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError, SettingsError
from flashhead_edge.generation import PromptCache, compile_grammar, exact_stream, generate, load_engine, prompt_ids, stream
from flashhead_edge.generation.cache import feed_ahead
from flashhead_edge.jetson import onnxruntime_backend, onnxruntime_body, open_engine
from flashhead_edge.jetson.evaluation import ExportedContender
from flashhead_edge.jetson.onnxruntime_body import OnnxBody
from flashhead_edge.jetson.onnxruntime_sessions import vector_unit
from flashhead_edge.jetson.onnxruntime_texts import free_start

NATIVE = pytest.mark.skipif(vector_unit() in (None, "plain"), reason="this installation has no native body: no C compiler, or a processor without AVX2")
PROMPT = [1, 17, 90, 5, 33, 128, 64]
DIALECTS = ("onnxruntime", "portable")
RULES = {
    "greedy": Sampling(),
    "plain": Sampling(temperature=1.2, seed=4),
    "truncated": Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02, seed=5),
    "penalties": Sampling(temperature=0.8, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, seed=6),
    "bias": Sampling(logit_bias={7: 6.0, 8: 5.0, 90: -50.0}),
    "few allowed": Sampling(temperature=1.0, allowed=(4, 9, 77, 130), seed=7),
}


def ids_of(run):
    return [token.id for token in run]


@pytest.fixture(scope="module")
def torch_engine(converted):
    return load_engine(converted("all"), "cpu", 1)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rule", RULES)
def test_tokens_are_those_of_the_torch_engine(exported, torch_engine, dialect, rule):
    """60 tokens in float32: a logit differs by float32 rounding, about 1e-6 of it, and two that are as near are not met on the way."""
    engine = open_engine(exported(dialect), threads=1)
    ours, theirs = stream(engine, PROMPT, 60, RULES[rule]), stream(torch_engine, PROMPT, 60, RULES[rule])
    assert ids_of(ours) == ids_of(theirs)
    for field in ("prompt_tokens", "tokens", "stopped", "clusters_opened", "capped_steps", "bytes_per_step", "dense_bytes_per_step", "allowed_steps", "notes"):
        assert getattr(ours.summary, field) == getattr(theirs.summary, field), field


@pytest.mark.parametrize("dialect", DIALECTS)
def test_grammars_log_probabilities_and_the_cache_are_those_of_the_torch_engine(exported, torch_engine, dialect):
    """In float32, as above; a log-probability is a logit of size 20 less a sum of such."""
    pytest.importorskip("llguidance")
    engine, cache = open_engine(exported(dialect), threads=1), PromptCache()
    ours, theirs = (compile_grammar(e, regex="([a-z]{1,9} ){3}[0-9]{2}") for e in (engine, torch_engine))
    for way in (stream, exact_stream):
        got, want = (list(way(e, PROMPT, 60, grammar=g, logprobs=2)) for e, g in ((engine, ours), (torch_engine, theirs)))
        assert [t.id for t in got] == [t.id for t in want]
        assert re.fullmatch("([a-z]{1,9} ){3}[0-9]{2}", "".join(t.text for t in got))
        assert [t.logprobs.logprob for t in got] == pytest.approx([t.logprobs.logprob for t in want], abs=1e-4)
        assert [[i for i, _ in t.logprobs.top] for t in got] == [[i for i, _ in t.logprobs.top] for t in want]
    first = ids_of(stream(engine, PROMPT, 8, cache=cache))
    for prompt, read in (([*PROMPT, *first, 9, 8], 3), ([*PROMPT, 9, 8, 7], 3)):
        run = stream(engine, prompt, 8, cache=cache)
        assert ids_of(run) == ids_of(stream(torch_engine, prompt, 8))
        assert run.summary.prompt_read == read


@pytest.mark.parametrize("dialect", DIALECTS)
def test_drafts_give_the_greedy_text(exported, dialect):
    """300 tokens of a model in float32, which repeats itself; a cache in place and one that grows are cut back."""
    engine = open_engine(exported(dialect), threads=1)
    run = stream(engine, PROMPT, 300, speculate=6)
    assert ids_of(run) == ids_of(stream(engine, PROMPT, 300))
    assert run.summary.passes < 300
    assert 0 < run.summary.accepted < run.summary.drafted


@pytest.mark.parametrize("dialect", DIALECTS)
def test_exact_mode_gives_the_dense_text_with_a_bad_head(exported, converted, torch_engine, dialect, monkeypatch):
    """Rounds of 5 whatever is measured: the cache is cut back after misses at every place of a round."""
    monkeypatch.setattr("flashhead_edge.generation.decode.round_length", lambda *a, **k: 5)
    run = exact_stream(open_engine(exported(dialect, index="bad"), threads=1), PROMPT, 60)
    assert ids_of(run) == ids_of(stream(torch_engine, PROMPT, 60))
    assert run.summary.missed > 3
    assert run.summary.repeated_steps > 0
    bad = load_engine(converted("bad"), "cpu", 1)
    theirs = exact_stream(bad, PROMPT, 60)
    assert ids_of(theirs) == ids_of(stream(torch_engine, PROMPT, 60))
    assert (run.summary.missed, run.summary.rounds) == (theirs.summary.missed, theirs.summary.rounds)


def test_a_dense_pass_in_parts_is_the_dense_pass(exported, monkeypatch):
    """Up to the order of 32 float32 additions, which the width of a product decides."""
    engine = open_engine(exported(), threads=1)
    hidden = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    whole = engine.backend.head.exact_logits(hidden, np.arange(256))
    monkeypatch.setattr(onnxruntime_backend, "TOKENS_AT_ONCE", 50)
    bound = 32 * 2.0**-24 * np.linalg.norm(hidden, axis=1, keepdims=True) * 4  # no row of the matrix is longer than 4
    parts = engine.backend.head.exact_logits(hidden, np.arange(256))
    assert (np.abs(parts - whole) <= bound).all()
    assert np.abs(parts).max() > 1
    assert engine.backend.head.exact_logits(hidden, np.arange(0)).shape == (7, 0)
    assert np.array_equal(engine.backend.head.logits(hidden).argmax(1), engine.backend.head.step(hidden).token)


def test_where_a_text_comes_from_and_ends(exported, torch_engine):
    """From a prompt to a text: template, pieces, stop tokens, stop strings, as the torch engine does it."""
    engine = open_engine(exported())
    assert (engine.context_length, engine.stop_ids, engine.embedding_rows) == (8192, frozenset({255}), 256)
    assert prompt_ids(engine, "a lamp") == prompt_ids(torch_engine, "a lamp")
    assert prompt_ids(engine, "a lamp", False) == prompt_ids(torch_engine, "a lamp", False)
    want, _ = generate(torch_engine, "a lamp", 40)
    said, summary = generate(engine, "a lamp", 40)
    assert said == want
    ids = ids_of(stream(engine, PROMPT, 40))
    assert ids_of(stream(engine, PROMPT, 40, stop=[ids[20]])) == ids[: ids.index(ids[20]) + 1]
    stop = want[len(want) // 2 :][:2]
    for exact in (False, True):
        said, summary = generate(engine, "a lamp", 40, exact=exact, stop_strings=[stop])
        assert (said, summary.stopped) == (want[: want.index(stop)], "stop string")


def states(body, ids, parts):
    """Hidden states after each part of `ids`."""
    cuts = np.cumsum(parts)
    return np.concatenate([body.feed(ids[a:b]) for a, b in zip([0, *cuts], cuts)])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_cache_grows_and_is_cut_without_a_trace(exported, dialect, monkeypatch):
    """Bit by bit: a cache that doubles from 2 positions, and one that was cut back after wrong tokens."""
    backend = open_engine(exported(dialect), threads=1).backend
    ids = np.random.default_rng(1).integers(0, 255, 40).tolist()
    parts = [11] + [1] * 29
    want = states(backend.body(), ids, parts)
    monkeypatch.setattr(onnxruntime_body, "FIRST_CAPACITY", 2)
    assert np.array_equal(states(backend.body(), ids, parts), want)
    body = backend.body()
    kept = states(body, ids[:20], [11] + [1] * 9)
    before = body.snapshot()
    for wrong in (3, 1, 4):
        body.feed([wrong])
    body.cut(2)
    body.feed([9])
    body.restore(before)
    assert np.array_equal(np.concatenate([kept, states(body, ids[20:], [1] * 20)]), want)


def test_a_cache_in_place_is_the_growing_one(exported):
    backend = open_engine(exported(), threads=1).backend
    assert backend.settings.cache == "in_place"
    growing = dataclasses.replace(backend.settings, cache="growing")
    ids, parts = list(range(60)), [40] + [1] * 20
    assert np.array_equal(states(OnnxBody(backend.session("body"), growing), ids, parts), states(backend.body(), ids, parts))


def test_a_long_prompt_is_fed_in_parts(exported, monkeypatch):
    """What attention makes of a part does not depend on the parts before it: only products of another height round differently."""
    backend = open_engine(exported(), threads=1).backend
    ids = np.random.default_rng(2).integers(0, 255, 100).tolist()
    whole = backend.body().feed(ids)
    monkeypatch.setattr(onnxruntime_body, "PROMPT_BLOCK", 30)
    assert np.allclose(backend.body().feed(ids), whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_states_are_the_callers_to_keep(exported):
    body = open_engine(exported(), threads=1).backend.body()
    first = body.feed([1, 2])
    kept = first.copy()
    body.feed([3])
    body.feed([4])
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("way", [stream, exact_stream])
def test_requests_out_of_range_are_refused_before_anything_runs(exported, way):
    engine = open_engine(exported())
    for prompt, text in (
        ([], "the prompt is empty"),
        ([256], "the prompt holds ids 256 to 256, expected 0 to 255"),
        ([1] * 8192, "the prompt has 8,192 tokens"),
    ):
        with pytest.raises(SettingsError, match=text):
            way(engine, prompt)
    body = engine.body()
    with pytest.raises(EngineError, match="the text has 8,193 tokens, expected at most the model's 8,192 positions"):
        body.feed([1] * 8193)


def test_a_damaged_export_is_one_sentence(exported, tmp_path):
    """The real thing, with a byte less of its weights."""
    import shutil

    folder = shutil.copytree(exported(), tmp_path / "cut")
    for data in folder.glob("*.onnx.data"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"body.onnx: its external data is missing or cut off"):
        open_engine(folder)


def test_int4_bodies_make_text(exported):
    """Coded weights: another text than the checkpoint's, the same one every time, and exact mode's where the head leaves nothing out."""
    engine = open_engine(exported(body="int4"), threads=1)
    first = ids_of(stream(engine, PROMPT, 40))
    assert first == ids_of(stream(engine, PROMPT, 40)) == ids_of(exact_stream(engine, PROMPT, 40))


def genai_greedy(folder, prompt, n):
    """ONNX Runtime GenAI's own greedy text over a folder."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    written = []
    while not generator.is_done():
        generator.generate_next_token()
        written.append(int(generator.get_next_tokens()[0]))
    return written


def test_standard_operators_give_genais_text(exported):
    """An int4 body has another sum order in our operators; in ONNX Runtime's, GenAI's model is the same graph."""
    engine = open_engine(exported(body="int4"), threads=1, native=False)
    assert {engine.backend.about[name] for name in ("head_operators", "body_operators")} == {"standard operators"}
    ours = ids_of(stream(engine, PROMPT, 40))
    assert genai_greedy(exported(body="int4"), PROMPT, 40)[: len(ours)] == ours


@NATIVE
def test_a_native_body_goes_back_and_on(exported):
    """Beyond the first cache and the first part of attention; what is forgotten and read again gives the same bits."""
    backend = open_engine(exported(body="int4"), threads=1).backend
    assert backend.about["body_operators"] == "native"
    ids = np.random.default_rng(3).integers(0, 255, 320).tolist()
    body = backend.body()
    body.feed(ids[:250])
    steps = [body.feed([token]) for token in ids[250:]]
    body.cut(60)
    assert np.array_equal(body.feed([ids[260]]), steps[10])
    body.cut(11)
    assert np.array_equal(np.concatenate([body.feed([token]) for token in ids[250:]]), np.concatenate(steps))


@NATIVE
def test_texts_side_by_side_have_the_states_that_each_has_alone(exported, monkeypatch):
    """To the bit: rooms that double from 2 positions, are left, found again and moved; texts that begin late, go back, and end."""
    backend = open_engine(exported(body="int4"), threads=1).backend
    monkeypatch.setattr(onnxruntime_body, "FIRST_CAPACITY", 2)
    generator = np.random.default_rng(4)
    texts = [generator.integers(0, 255, n).tolist() for n in (70, 9, 40, 25, 60, 3)]
    want = []
    for ids in texts:
        alone = open_engine(exported(body="int4"), threads=1).backend.body()
        want.append(np.concatenate([alone.feed(ids[:2]), *(alone.feed([token]) for token in ids[2:])]))
    bodies, found = {}, {n: [] for n in range(len(texts))}
    for turn in range(400):
        ready = [n for n in found if len(found[n]) + 1 < len(texts[n]) and turn >= 3 * n]
        for n in [n for n in ready if n not in bodies]:
            bodies[n] = backend.body()
            found[n].append(bodies[n].feed(texts[n][:2]))
        for n in [n for n in bodies if n not in ready]:
            del bodies[n]  # its room is free
        if not ready:
            break
        if turn % 7 == 5:  # forgotten, and read again
            bodies[ready[0]].cut(1)
            found[ready[0]].pop()
        chosen = [n for n in ready if generator.random() < 0.7] or ready
        chosen = [n for n in chosen if 0 < len(found[n]) < len(texts[n]) - 1]
        if chosen:
            states = bodies[chosen[0]].feed_together([bodies[n] for n in chosen], [[texts[n][len(found[n]) + 1]] for n in chosen])
            for n, state in zip(chosen, states):
                found[n].append(state)
    for n, rows in found.items():
        assert np.array_equal(np.concatenate(rows), want[n]), n
    assert backend.shared.capacity < 3 * sum(map(len, texts))  # rooms are used again


def test_rooms_are_found_where_positions_are_free():
    """Stretches that are taken, the cache's length, positions that are wanted, where the text is now; where it will be."""
    for taken, capacity, room, now, want in (
        ([], 0, 2, 0, None), ([], 8, 8, 0, 0), ([], 8, 9, 0, None), ([(0, 4)], 8, 4, 0, 4), ([(0, 4)], 8, 5, 0, None), ([(4, 8)], 8, 4, 0, 0),
        ([(0, 2), (6, 8)], 16, 4, 2, 2), ([(0, 2), (6, 8)], 16, 6, 2, 8), ([(2, 4), (6, 8)], 8, 2, 6, 0), ([(0, 2), (4, 6)], 12, 4, 7, 7),
    ):  # fmt: skip
        assert free_start(taken, capacity, room, now) == want


@NATIVE
def test_a_pass_of_several_texts_that_fails_changes_none_of_them(exported):
    backend = open_engine(exported(body="int4"), threads=1).backend
    one, two, apart = backend.body(), backend.body(), open_engine(exported(body="int4"), threads=1).backend.body()
    for body in (one, two, apart):
        body.feed([1, 2, 3])
    with pytest.raises(EngineError, match="body: ONNX Runtime failed on 2 tokens after 3 and 3"):
        one.feed_together([one, two], [[4], [10**6]])
    with pytest.raises(EngineError, match="no token was given"):
        one.feed_together([one, two], [[4], []])
    want = apart.feed([4])
    assert all(np.array_equal(state, want) for state in one.feed_together([one, two], [[4], [4]]))


@NATIVE
def test_a_token_that_was_fed_ahead_is_not_fed_again(exported):
    engine = open_engine(exported(body="int4"), threads=1)
    caches, prompts = [PromptCache(), PromptCache()], ([5, 9, 77], [8, 2])
    want = [ids_of(stream(engine, prompt, 20)) for prompt in prompts]
    streams = [stream(engine, prompt, 20, cache=cache) for prompt, cache in zip(prompts, caches)]
    found = [[next(s).id] for s in streams]
    assert all(cache.feeds_together for cache in caches)
    for _ in range(19):
        feed_ahead(caches, [ids[-1] for ids in found])
        assert [cache.ids[-1] for cache in caches] == [ids[-1] for ids in found]
        for ids, s in zip(found, streams):
            ids.append(next(s).id)
    assert found == want
    feed_ahead(caches, [7, 7])  # nobody takes these: the texts are over
    again = [ids_of(stream(engine, [*prompt, *ids[:4]], 16, cache=cache)) for prompt, ids, cache in zip(prompts, found, caches)]
    assert again == [ids[4:] for ids in want]


@NATIVE
def test_a_lone_last_token_of_a_prompt_goes_with_its_part(exported, monkeypatch):
    body = open_engine(exported(body="int4"), threads=1).backend.body
    ids = np.random.default_rng(2).integers(0, 255, 91).tolist()
    whole = body().feed(ids)
    monkeypatch.setattr(onnxruntime_body, "PROMPT_BLOCK", 30)
    assert onnxruntime_body.parts(91) == [(0, 30), (30, 60), (60, 91)]
    assert np.array_equal(body().feed(ids), whole)


@NATIVE
def test_evaluation_measures_the_head_that_decodes(exported):
    """Its candidates' logits to the bit: those of full-width logits, by standard operators, are summed in another order."""
    engine = open_engine(exported(), threads=1)
    hidden = np.random.default_rng(4).normal(size=(20, engine.hidden_size)).astype(np.float32)
    found, step = ExportedContender(engine, {}).find(hidden), engine.step(hidden)
    assert found.full is not None and np.array_equal(found.logits, step.logits)
    assert not np.array_equal(engine.step_with_logits(hidden)[0].logits, step.logits)


@pytest.mark.parametrize("body", ["int4", "fp32"])
def test_what_onnx_runtime_fails_on_is_one_error(exported, body):
    fed = open_engine(exported(body=body), threads=1).backend.body()
    with pytest.raises(EngineError, match="body: ONNX Runtime failed on 1 tokens after 0"):
        fed.feed([10**6])
    with pytest.raises(EngineError, match="no token was given, expected at least one"):
        fed.feed([])


def test_an_exported_folder_is_no_checkpoint(exported):
    with pytest.raises(CheckpointError, match=r"the folder is exported to ONNX, expected a checkpoint; open it with flashhead_edge.jetson.open_engine"):
        load_engine(exported())


def test_text_without_torch_and_transformers(exported, torch_engine):
    """A process that can import neither: the same text, through the command line."""
    want, _ = generate(torch_engine, "a lamp", 30)
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnx', 'onnx_ir'):\n    sys.modules[name] = None\n"
        f"from flashhead_edge.cli import main\nmain(['generate', {str(exported())!r}, '--prompt', 'a lamp', '--max-new-tokens', '30'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == want + "\n"
