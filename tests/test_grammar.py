"""Grammars, log-probabilities and the prompt cache in the decode loop, over the torch engine of a tiny model of bytes."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_exports import write_exportable, write_with_index
from small_heads import everything_open, few_probes
from small_models import small_model

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.generation import Engine, PromptCache, compile_grammar, decode, exact_stream, generate, load_engine, prompt_ids, stream
from flashhead_edge.generation.grammar import SPACE
from flashhead_edge.generation.text import fitting_ids
from flashhead_edge.reference import dense_logits

pytest.importorskip("llguidance")

OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "city": {"enum": ["Paris", "Rome"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
PROMPT = [1, 17, 90, 5, 33, 128, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("grammar") / "tiny")


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its head leaves nothing out."""
    out = write_with_index(folder, tmp_path_factory.mktemp("good") / "out", lambda w, fingerprint: everything_open(w, cascade=True, fingerprint=fingerprint))
    return load_engine(out, "cpu", 1)


@pytest.fixture(scope="module")
def bad(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its head opens one cluster of 32."""
    out = write_with_index(folder, tmp_path_factory.mktemp("bad") / "out", lambda w, fingerprint: few_probes(w, 1, fingerprint=fingerprint))
    return load_engine(out, "cpu", 1)


def ids_of(run):
    return [token.id for token in run]


def text_of(run):
    return "".join(token.text for token in run)


def dense_text(engine: Engine, grammar, n: int, sampling: Sampling | None = None) -> list[int]:
    """The dense path under the same mask and keys: one forward over the whole text a step, every logit, the mask beside it."""
    s, matching, text = sampling or Sampling(), decode.Matching(grammar), list(PROMPT)
    states = []
    hook = engine.model.get_output_embeddings().register_forward_hook(lambda m, args, out: states.append(args[0][:, -1]))
    every = np.arange(engine.vocab_size)[None]
    for i in range(n):
        with torch.no_grad():
            engine.model(torch.tensor([text]))
        raw = dense_logits(engine.head.weight, None, states[-1], engine.vocab_size).numpy()
        raw[0, ~matching.mask()] = -np.inf
        text.append(int(choose(every, raw, s, [i])[0]))
        matching.accept(text[-1])
        if matching.complete or text[-1] in engine.stop_ids:
            break
    hook.remove()
    return text[len(PROMPT) :]


GRAMMARS = {"object": {"json_schema": OBJECT}, "any": {"json_schema": {}}, "pattern": {"regex": "[A-Z][a-z ]{5,40}[.]"}, "wide": {"regex": "[^0-9]{30,40}"}}


@pytest.mark.parametrize("few", [2048, 20])
@pytest.mark.parametrize("name", GRAMMARS)
def test_the_text_is_the_dense_head_s_under_the_same_mask(good, name, few, monkeypatch):
    """Greedy and drawn. 20 forces the path of many allowed tokens, with which 256 tokens cannot have to do otherwise."""
    monkeypatch.setattr(decode, "FEW_ALLOWED", few)
    grammar = compile_grammar(good, **GRAMMARS[name])
    assert ids_of(stream(good, PROMPT, 60, grammar=grammar)) == ids_of(exact_stream(good, PROMPT, 60, grammar=grammar)) == dense_text(good, grammar, 60)
    hot = Sampling(temperature=1.2, seed=3)
    assert ids_of(stream(good, PROMPT, 60, hot, grammar=grammar)) == dense_text(good, grammar, 60, hot)


def test_a_text_is_what_the_grammar_says_and_ends_with_it(good):
    """Whatever is drawn: the schema's object, the whole pattern."""
    schema, pattern = compile_grammar(good, json_schema=json.dumps(OBJECT)), compile_grammar(good, regex="(red|green) [0-9]{3}")
    for seed in range(5):
        run = stream(good, PROMPT, 300, Sampling(temperature=1.0, seed=seed), grammar=schema)
        found = json.loads(text_of(run))
        assert set(found) == {"name", "age", "city"} and 0 <= found["age"] <= 150 and found["city"] in ("Paris", "Rome")
        assert run.summary.stopped == "grammar complete"
        said, summary = generate(good, "a lamp", 40, Sampling(temperature=1.0, seed=seed), grammar=pattern)
        assert re.fullmatch("(red|green) [0-9]{3}", said)
        assert summary.stopped == "grammar complete"


def test_spaces_of_a_json_text_are_bounded(good):
    """However likely a space is made: as many as an indented document needs, and the text goes on."""
    spaces = Sampling(logit_bias=dict.fromkeys(good.tokenizer(" \n\t")["input_ids"], 1000.0))
    text = text_of(stream(good, PROMPT, 400, spaces, grammar=compile_grammar(good, json_schema={"type": "array", "items": {"const": 1}, "maxItems": 2})))
    assert json.loads(text) in ([], [1], [1, 1])
    runs = re.findall(r"\s+", text)
    assert len(runs) > 1 and max(map(len, runs)) > 10
    assert all(re.fullmatch(SPACE, run) for run in runs)


def test_the_stop_token_comes_only_where_the_grammar_accepts(good):
    """It is the only one that may follow, or one of several; before, it is banned however likely it is made."""
    always = Sampling(logit_bias={255: 1000.0})
    run = stream(good, PROMPT, 40, always, grammar=compile_grammar(good, regex="ab[a-z]*"))
    assert ids_of(run)[-1] == 255
    assert len(ids_of(stream(good, PROMPT, 40, always, grammar=compile_grammar(good, regex="ab[a-z]*")))) == 3
    assert run.summary.stopped == "stop token"


def test_none_of_the_candidates_allowed_is_counted_and_still_dense(bad, monkeypatch):
    """One cluster opens: often nothing of it is allowed, and every row that is, is read."""
    monkeypatch.setattr(decode, "FEW_ALLOWED", 4)
    grammar = compile_grammar(bad, regex="[0-9 ]{30,40}")
    run = stream(bad, PROMPT, 40, grammar=grammar)
    text = text_of(run)
    assert re.fullmatch("[0-9 ]{30,40}", text.removesuffix("\ufffd"))  # the stop token is a byte here, 255
    assert 0 < run.summary.dense_steps <= run.summary.allowed_steps
    exact = exact_stream(bad, PROMPT, 40, grammar=grammar)
    assert ids_of(exact) == dense_text(bad, grammar, 40)
    assert exact.summary.exact


def test_stop_strings_lengths_and_streams_are_as_without_a_grammar(good):
    grammar = compile_grammar(good, regex="[a-z]{50}")
    whole = [t.text for t in stream(good, PROMPT, 50, grammar=grammar)]
    assert len([t for t in whole if t]) == 50
    text = "".join(whole)
    run = stream(good, PROMPT, 50, stop_strings=[text[9:12]], grammar=grammar)
    assert text_of(run) == text[: text.index(text[9:12])]
    assert run.summary.stopped == "stop string"
    short = stream(good, PROMPT, 7, grammar=grammar)
    assert text_of(short) == text[:7]
    assert short.summary.stopped == "max_new_tokens"
    assert "ends before its grammar does" in short.summary.notes[0]
    assert run.summary.notes == []


def test_a_model_without_a_stop_token_ends_where_nothing_can_follow(good):
    """The library takes some token for a stop token where none is named: no token of the text may be it."""
    model = copy.deepcopy(good.model)
    model.generation_config.eos_token_id = None
    endless = dataclasses.replace(good, model=model)
    assert endless.stop_ids == frozenset()
    run = stream(endless, PROMPT, 40, grammar=compile_grammar(endless, regex="[!]{3,9}"))
    assert text_of(run) == "!" * 9
    assert run.summary.stopped == "grammar complete"


@pytest.mark.parametrize(
    ("grammar", "text"),
    [({"json_schema": "{"}, "the JSON schema is no JSON (Expecting property name"), ({"json_schema": "[]"}, "the JSON schema is a list, expected an object"),
     ({"json_schema": {"type": "strin"}}, "the JSON schema cannot be used (Invalid type: strin), expected one that some text satisfies; correct it"),
     ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength (5) is greater than maxLength (2)"),
     ({"json_schema": False}, "the JSON schema is a bool, expected an object such as {}"), ({"regex": "("}, "the pattern cannot be used (unclosed group)"),
     ({"regex": r"(a)\1"}, "backreferences are not supported"), ({"regex": "[^\\x00-\\U0010ffff]"}, "the pattern cannot be used ("),
     ({}, "a JSON schema and a pattern were given, or neither"), ({"regex": "a", "json_schema": {}}, "expected one of them")],
)  # fmt: skip
def test_a_grammar_that_cannot_be_is_one_sentence(good, grammar, text):
    with pytest.raises(SettingsError) as error:
        compile_grammar(good, **grammar)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_no_token_in_common_is_one_sentence(good):
    run = stream(good, PROMPT, 5, Sampling(allowed=(3, 4)), grammar=compile_grammar(good, regex="[a-z]+"))
    with pytest.raises(SettingsError, match="the grammar and the allowed tokens have none in common"):
        next(run)


def test_tokenizers_that_are_not_of_bytes_and_a_missing_library_are_one_sentence(good, monkeypatch):
    from test_generation import engine_of, word_tokenizer

    model = small_model("llama")
    with pytest.raises(EngineError, match="the engine has no tokenizer"):
        compile_grammar(engine_of(model), regex="a")
    with pytest.raises(EngineError, match="llguidance cannot read the tokenizer"):
        compile_grammar(engine_of(model, tokenizer=odd_tokenizer(word_tokenizer())), regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=r"llguidance is not installed, .*pip install 'flashhead-edge\[grammar\]'"):
        compile_grammar(good, regex="a")


def test_a_grammar_needs_neither_torch_nor_transformers(folder):
    """In a fresh process, over the tokenizer of an exported folder."""
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from flashhead_edge.generation.grammar import Matching, compile_grammar
from flashhead_edge.jetson.tokenizer import load_chat_tokenizer
engine = SimpleNamespace(tokenizer=load_chat_tokenizer(Path({str(folder)!r})), stop_ids=frozenset({{255}}), vocab_size=256)
assert Matching(compile_grammar(engine, json_schema={{"type": "boolean"}})).mask().sum() == 2
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def odd_tokenizer(fast):
    """One whose pieces the library cannot turn into bytes: it says nothing of how they are joined."""
    fast.backend_tokenizer.decoder = None
    return fast


# ---- log-probabilities


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
def test_logprobs_are_those_of_the_dense_head(good, exact, constrained):
    """The head leaves nothing out, so that its full-width logits are exact: up to float32 rounding of a logit, of size 20 here."""
    grammar = compile_grammar(good, regex="[a-z]{20}") if constrained else None
    run = (exact_stream if exact else stream)(good, PROMPT, 20, grammar=grammar, logprobs=3)
    tokens = list(run)
    plain = ids_of((exact_stream if exact else stream)(good, PROMPT, 20, grammar=grammar))
    assert [t.id for t in tokens] == plain
    states, text = [], list(PROMPT)
    hook = good.model.get_output_embeddings().register_forward_hook(lambda m, args, out: states.append(args[0][:, -1]))
    for token in tokens:
        with torch.no_grad():
            good.model(torch.tensor([text]))
        want = torch.log_softmax(dense_logits(good.head.weight, None, states[-1], good.vocab_size).double()[0], 0)
        best = want.topk(3)
        assert token.logprobs.logprob == pytest.approx(float(want[token.id]), abs=1e-4)
        assert [t for t, _ in token.logprobs.top] == best.indices.tolist()
        assert [x for _, x in token.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        text.append(token.id)
    hook.remove()


def test_logprobs_out_of_range_are_refused_and_none_are_given_unasked(good):
    assert next(stream(good, PROMPT, 2)).logprobs is None
    assert next(stream(good, PROMPT, 2, logprobs=0)).logprobs.top == ()
    for wrong in (-1, 101):
        with pytest.raises(SettingsError, match=f"logprobs is {wrong}, expected 0 to 100"):
            stream(good, PROMPT, 2, logprobs=wrong)


# ---- the prompt cache


def fed(model, calls):
    return model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"].shape[1]), with_kwargs=True)


@pytest.mark.parametrize("way", [stream, exact_stream])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_a_turn_reads_only_what_is_new(family, way):
    """Counted by the model's calls: the second prompt goes on from the first answer, the third differs in the middle."""
    from test_generation import engine_of

    model, calls = small_model(family), []
    engine, cache = engine_of(model), PromptCache()
    hook = fed(model, calls)
    first = ids_of(way(engine, PROMPT, 8, cache=cache))
    longer = [*PROMPT, *first, 9, 8, 7]
    calls.clear()
    run = way(engine, longer, 5, cache=cache)
    second = ids_of(run)
    assert calls[0] == run.summary.prompt_read == 4  # the last token of an answer is never fed while it is written
    assert second == ids_of(way(engine, longer, 5))
    calls.clear()
    other = [*longer[:10], 77, 78]
    run = way(engine, other, 5, cache=cache)
    assert ids_of(run) == ids_of(way(engine, other, 5))
    assert calls[0] == run.summary.prompt_read == (2 if family == "llama" else len(other))  # a recurrent state cannot be cut
    hook.remove()


def test_the_same_prompt_again_reads_one_token(good):
    cache = PromptCache()
    want = ids_of(stream(good, PROMPT, 5, cache=cache))
    again = stream(good, PROMPT, 5, cache=cache)
    assert ids_of(again) == want
    assert again.summary.prompt_read == 1


def test_a_feed_that_fails_leaves_an_empty_cache(good, monkeypatch):
    cache = PromptCache()
    run = stream(good, PROMPT, 5, cache=cache)
    next(run)
    with monkeypatch.context() as broken:
        broken.setattr(type(cache.body), "feed", lambda self, ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(run)
    assert cache.body is None
    after = stream(good, PROMPT, 5, cache=cache)
    assert len(ids_of(after)) == 5
    assert after.summary.prompt_read == len(PROMPT)


def test_the_oldest_turns_go_where_the_context_is_full(good):
    """The system message and the last message stay; no more turns go than must."""

    class Short:
        tokenizer, context_length = good.tokenizer, 120

    turns = [{"role": role, "content": f"{i}{role[0]}" * 5} for i in range(5) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "be short"}, *turns, {"role": "user", "content": "last"}]
    ids, dropped = fitting_ids(Short, messages, 1, 0, 20)
    assert 0 < dropped < 5
    assert ids == prompt_ids(good, [messages[0], *messages[1 + 2 * dropped :]])
    assert len(ids) + 20 <= 120 < len(prompt_ids(good, [messages[0], *messages[1 + 2 * (dropped - 1) :]])) + 20
    assert fitting_ids(Short, messages, 1, 4, 20)[1] == 4  # what is gone stays gone
    Short.context_length = 10
    assert fitting_ids(Short, messages, 1, 0, 20) == (prompt_ids(good, [messages[0], messages[-1]]), 5)
    Short.context_length = None
    assert fitting_ids(Short, messages, 1, 0, 20)[1] == 0


@pytest.mark.slow
def test_agreement_under_a_grammar_on_a_real_checkpoint():
    """Some hundred steps on the checkpoint that `make demo` leaves: see scripts/grammar_agreement.py."""
    root = Path(__file__).parent.parent
    folder, script = root / "demo" / "SmolLM2-135M-FlashHead", root / "scripts" / "grammar_agreement.py"
    if not folder.is_dir():
        pytest.skip("needs the checkpoint of make demo")
    done = subprocess.run([sys.executable, str(script), str(folder), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["many_steps"] >= 300
    assert found["many_agreement"] >= 0.995
    assert found["few_agreement"] == 1.0
