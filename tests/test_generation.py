"""The decode loop: the fast head's text, seeded draws, exact mode against transformers' own dense text, pieces of text."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import NAMED, save_checkpoint, save_model
from small_heads import everything_open, few_probes, fingerprint_of
from small_models import FAMILIES, VOCAB, small_model

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import SettingsError
from flashhead_edge.generation import Engine, exact_stream, generate, load_engine, stream
from flashhead_edge.generation.engine import Body
from flashhead_edge.generation.text import Detokenizer, StopStrings, prompt_ids
from flashhead_edge.reference import dense_logits, dense_tokens, torch_head

PROMPT = [1, 17, 90, 5, 33, 128, 64]


def engine_of(model, index=None, tokenizer=None, **rule):
    module = model.get_output_embeddings()
    index = index or everything_open(module.weight, fingerprint=fingerprint_of(module.weight, module.bias))
    return Engine(model, tokenizer, torch_head(index, module.weight, module.bias), **rule)


def dense_text(model, n, prompt=PROMPT, **options):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, **options)[0, len(prompt) :].tolist()


def ids_of(run):
    return [token.id for token in run]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_own_loop_is_transformers_generate(family):
    """40 tokens: past the windows of 16 that some families have here."""
    model = small_model(family)
    assert ids_of(stream(engine_of(model), PROMPT, 40)) == dense_text(model, 40)
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("probes", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_gives_the_dense_text_with_a_bad_head(family, probes, monkeypatch):
    """Rounds of 5 whatever is measured, so that misses fall everywhere: at the first, in the middle, at the last."""
    monkeypatch.setattr("flashhead_edge.generation.decode.round_length", lambda *a, **k: 5)
    model = small_model(family)
    module = model.get_output_embeddings()
    index = few_probes(module.weight, probes, fingerprint=fingerprint_of(module.weight, module.bias))
    run = exact_stream(engine_of(model, index), PROMPT, 40)
    assert ids_of(run) == dense_text(model, 40)
    s = run.summary
    assert s.exact
    assert s.tokens == 40
    assert s.missed > 0
    assert s.repeated_steps > 0
    assert s.rounds < 40


def test_exact_mode_counts_what_it_did(monkeypatch):
    """Counted by the model's own calls: every call of the body beyond the delivered tokens was a repeated step."""
    monkeypatch.setattr("flashhead_edge.generation.decode.round_length", lambda *a, **k: 4)
    for family in ("llama", "qwen3_5"):  # a cache that can be cut, one that is copied
        model = small_model(family)
        calls = []
        model.register_forward_pre_hook(lambda m, a, k, calls=calls: calls.append(k["input_ids"].shape[1]), with_kwargs=True)
        run = exact_stream(engine_of(model, few_probes(model.lm_head.weight, 4)), PROMPT, 50)
        got = ids_of(run)
        s = run.summary
        assert len(calls) == len(got) + s.repeated_steps
        assert s.repeated_share == s.repeated_steps / 50
        dense = s.dense_bytes_per_step
        assert s.rounds * dense < s.bytes_per_step * 50 < s.rounds * dense + (50 + s.repeated_steps) * dense
        assert s.dense_bytes_saved == pytest.approx(1 - s.bytes_per_step / dense)


def test_exact_mode_adapts_and_carries_on_from_text_to_text():
    """A head that never misses earns long rounds; one that often does falls back to a dense read at every step."""
    model = small_model("llama")
    good = engine_of(model)
    first, second = exact_stream(good, PROMPT, 100), exact_stream(good, [1, 44, 9], 100)
    ids_of(first), ids_of(second)
    assert first.summary.missed == 0
    assert second.summary.rounds < first.summary.rounds
    bad = engine_of(model, few_probes(model.lm_head.weight, 1))
    run = exact_stream(bad, PROMPT, 200)
    assert ids_of(run) == dense_text(model, 200)
    assert run.summary.rounds > 150
    assert run.summary.repeated_share < 0.1


@pytest.mark.parametrize("probes", [1, 6])
def test_exact_mode_stops_at_verified_stop_tokens_only(probes):
    """Each token of the dense text as the stop token in turn: the fast head may say it too early, or miss it."""
    model = small_model("llama")
    engine = engine_of(model, few_probes(model.lm_head.weight, probes))
    text = dense_text(model, 24)
    for token in sorted(set(text)) + [3]:
        want = dense_text(model, 24, eos_token_id=token)
        run = exact_stream(engine, PROMPT, 24, stop=[token])
        assert ids_of(run) == want
        assert run.summary.stopped == ("stop token" if want[-1] == token else "max_new_tokens")


def test_exact_mode_runs_nothing_after_a_stop_token(monkeypatch):
    """A stop token is verified at once: with a head that never misses, the body runs once for each delivered token."""
    monkeypatch.setattr("flashhead_edge.generation.decode.round_length", lambda *a, **k: 16)
    model, calls = small_model("llama"), []
    text = dense_text(model, 24)
    model.register_forward_pre_hook(lambda m, a, k: calls.append(1), with_kwargs=True)
    got = ids_of(exact_stream(engine_of(model), PROMPT, 24, stop=[text[10]]))
    assert got == text[: text.index(text[10]) + 1]
    assert len(calls) == len(got)


def test_exact_mode_streams_only_verified_tokens(monkeypatch):
    """Nothing is delivered before its dense pass."""
    from flashhead_edge.generation import engine

    verified = []
    monkeypatch.setattr(engine, "dense_tokens", lambda *a: verified.append(1) or dense_tokens(*a))
    model = small_model("llama")
    run = exact_stream(engine_of(model), PROMPT, 20)
    assert verified == []
    next(run)
    assert len(verified) == 1
    assert run.summary.tokens == 1


def test_the_model_stops_where_its_config_says():
    model = small_model("llama")
    text = dense_text(model, 30)
    model.generation_config.eos_token_id = [text[9], 3]
    for way in (stream, exact_stream):
        run = way(engine_of(model), PROMPT, 30)
        assert ids_of(run) == dense_text(model, 30)
        assert run.summary.stopped == "stop token"


RULES = {
    "plain": Sampling(temperature=1.2, seed=4),
    "truncated": Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02, seed=5),
    "penalties": Sampling(temperature=0.8, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, seed=6),
    "greedy penalties": Sampling(repetition_penalty=1.5, frequency_penalty=0.5),
    "bias": Sampling(logit_bias={7: 6.0, 8: 5.0, 90: -50.0}),
    "few allowed": Sampling(temperature=1.0, allowed=(4, 9, 77, 130), seed=7),
    "one allowed": Sampling(allowed=(4,)),
}


def dense_draws(model, sampling, n, scale=1.0, softcap=None):
    """The dense path under the same keys: every token a candidate, one forward over the whole text a step."""
    text, module, states = list(PROMPT), model.get_output_embeddings(), []
    hook = module.register_forward_hook(lambda m, args, out: states.append(args[0][:, -1]))
    prompt = np.bincount(PROMPT, minlength=VOCAB)[None]
    for i in range(n):
        with torch.no_grad():
            model(torch.tensor([text]))
            raw = dense_logits(module.weight, module.bias, states[-1], VOCAB).numpy()
        output = np.bincount(np.array(text[len(PROMPT) :], np.int64), minlength=VOCAB)[None]
        text.append(int(choose(np.arange(VOCAB)[None], raw, sampling, [i], prompt, output, scale, softcap)[0]))
    hook.remove()
    return text[len(PROMPT) :]


@pytest.mark.parametrize("rule", RULES)
def test_seeded_draws_are_those_of_the_dense_path(rule):
    model = small_model("llama")
    want = dense_draws(model, RULES[rule], 25)
    assert ids_of(stream(engine_of(model), PROMPT, 25, RULES[rule])) == want
    if not RULES[rule].greedy:
        assert ids_of(stream(engine_of(model), PROMPT, 25, dataclasses.replace(RULES[rule], seed=99))) != want


@pytest.mark.parametrize(("family", "rule"), [("gemma2", {"softcap": 3.0}), ("granite", {"scale": 0.25}), ("cohere", {"scale": 0.25})])
def test_scale_and_softcap_reach_the_draw(family, rule):
    model, sampling = small_model(family), Sampling(temperature=1.0, seed=2)
    want = dense_draws(model, sampling, 25, **rule)
    assert ids_of(stream(engine_of(model, **rule), PROMPT, 25, sampling)) == want
    assert ids_of(stream(engine_of(model), PROMPT, 25, sampling)) != want


def test_what_is_allowed_is_all_that_comes_whatever_opens(monkeypatch):
    """Few allowed tokens are scored exactly; of many, those whose cluster did not open are scored when none is left."""
    from flashhead_edge.generation import decode

    model = small_model("llama")
    engine = engine_of(model, few_probes(model.lm_head.weight, 1))
    allowed = (4, 9, 77, 130)
    want = dense_draws(model, Sampling(temperature=1.0, allowed=allowed, seed=7), 25)
    few = stream(engine, PROMPT, 25, Sampling(temperature=1.0, allowed=allowed, seed=7))
    assert ids_of(few) == want
    assert few.summary.allowed_steps == 25
    monkeypatch.setattr(decode, "FEW_ALLOWED", 2)
    many = stream(engine, PROMPT, 25, Sampling(temperature=1.0, allowed=allowed, seed=7))
    assert set(ids_of(many)) <= set(allowed)
    assert 0 < many.summary.allowed_steps < 25


def test_noise_brings_its_own_candidates(monkeypatch):
    """One cluster of 8 tokens opens, but a hot draw often falls elsewhere: the tokens that noise lifts are scored too.

    With them the draw is the dense one for most states; with the step's candidates alone it seldom is.
    """
    from flashhead_edge.generation import decode

    torch.manual_seed(1)
    model = small_model("llama")
    weight = model.lm_head.weight.detach()
    index = few_probes(weight, 1)
    norm = float(weight.view(-1).square().mean().sqrt()) * 2
    engine = engine_of(model, dataclasses.replace(index, tail_scale=norm, tail_offset=0.0))
    states, every = torch.randn(200, 32), np.arange(VOCAB)[None]
    raw = dense_logits(weight, None, states, VOCAB).numpy()

    def agreement(extra):
        monkeypatch.setattr(decode, "EXTRA", extra)
        equal = 0
        for i, state in enumerate(states):
            run, *_ = decode.start(engine, PROMPT, 10, Sampling(temperature=1.5, seed=i), ())
            equal += decode.next_token(run, state[None]) == choose(every, raw[[i]], Sampling(temperature=1.5, seed=i), [0])[0]
        return equal / len(states)

    alone, with_noise = agreement(0), agreement(16)
    assert alone < 0.6
    assert with_noise > 0.9


def test_penalised_candidates_give_way_to_tokens_that_did_not_open():
    """All 8 tokens of the open cluster banned: what comes is the best of the others, as the dense head has it."""
    from flashhead_edge.generation import decode

    model = small_model("llama")
    engine = engine_of(model, few_probes(model.lm_head.weight, 1))
    for state in torch.randn(20, 32).split(1):
        opened = [t for t in engine.head.step(state).ids[0].tolist() if t >= 0]
        run, *_ = decode.start(engine, PROMPT, 10, Sampling(logit_bias=dict.fromkeys(opened, -1000.0)), ())
        assert decode.next_token(run, state) not in opened


def test_a_lifted_token_is_a_candidate_and_a_banned_one_never_comes(monkeypatch):
    model = small_model("llama")
    engine = engine_of(model, few_probes(model.lm_head.weight, 1))
    with monkeypatch.context() as none:
        none.setattr("flashhead_edge.generation.decode.EXTRA", 0)
        assert ids_of(stream(engine, PROMPT, 10, Sampling(logit_bias={77: 1000.0}))) == [77] * 10
    plain = ids_of(stream(engine, PROMPT, 40))
    banned = dict.fromkeys(set(plain), -1000.0)
    assert not set(ids_of(stream(engine, PROMPT, 40, Sampling(logit_bias=banned)))) & set(plain)


def test_summary_counts_clusters_bytes_and_time():
    model = small_model("llama")
    engine = engine_of(model, few_probes(model.lm_head.weight, 3))
    run = stream(engine, PROMPT, 12)
    ids_of(run)
    s = run.summary
    d, k, size = 32, 17, 8
    assert (s.prompt_tokens, s.tokens, s.stopped, s.clusters_opened) == (7, 12, "max_new_tokens", 3.0)
    least, most = (k * (2 * d + 1) + (2 * size + 3) * (2 * d + 4), k * (2 * d + 1) + 3 * size * (2 * d + 4))
    assert least <= s.bytes_per_step <= most  # the last cluster has 3 tokens
    assert s.dense_bytes_per_step == 2 * VOCAB * d
    assert s.seconds > 0
    assert s.tokens_per_second > 0
    assert run.summary.notes == []
    cut = stream(engine, PROMPT, 2, Sampling(temperature=1.0, top_p=0.5))
    assert "top-p" in cut.summary.notes[0]


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [([], {}, "the prompt is empty"), ([1, 131], {}, "the prompt holds ids 1 to 131, expected 0 to 130"), ([-1], {}, "the prompt holds ids -1 to -1"),
     ([1], {"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"), ([1] * 256, {}, "the prompt has 256 tokens, expected fewer than the model's 256"),
     ([1], {"sampling": Sampling(allowed=(131,))}, "allowed names token 131")],
)  # fmt: skip
def test_requests_out_of_range_are_refused_before_anything_runs(prompt, options, text):
    with pytest.raises(SettingsError, match=text):
        stream(engine_of(small_model("llama")), prompt, **options)


@pytest.mark.parametrize("way", [stream, exact_stream])
def test_the_text_ends_where_the_positions_do(way):
    run = way(engine_of(small_model("gpt2")), PROMPT * 36, 50)
    assert len(ids_of(run)) == 256 - 7 * 36
    assert run.summary.stopped == "context length"


def test_a_failing_forward_leaves_the_head_as_it_was():
    model = small_model("llama")
    body = Body(model)
    with pytest.raises(IndexError):
        body.feed([500])
    assert "forward" not in model.lm_head.__dict__


class Bytes:
    """A tokenizer of bytes: every character beyond ASCII takes several tokens; 256 is special."""

    eos_token_id = 256
    chat_template = None

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def __call__(self, text):
        return {"input_ids": list(text.encode())}


@settings(deadline=None, max_examples=100)
@given(text=st.text(), special=st.lists(st.integers(0, 60), max_size=4))
def test_pieces_join_to_the_text_and_no_character_is_broken(text, special):
    ids = list(text.encode())
    for at in special:
        if at <= len(ids):
            ids.insert(at, 256)
    pieces = Detokenizer(Bytes())
    parts = [pieces.push(i) for i in ids] + [pieces.finish()]
    assert "".join(parts) == bytes(i for i in ids if i < 256).decode()
    assert "\ufffd" in text or all("\ufffd" not in p for p in parts)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_broken_bytes_come_out_at_the_end_at_the_latest(ids):
    pieces = Detokenizer(Bytes())
    text = "".join([pieces.push(i) for i in ids] + [pieces.finish()])
    assert text.replace("\ufffd", "") == Bytes().decode(ids, True, False).replace("\ufffd", "")


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(st.text("ab\n", max_size=4), max_size=12), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(pieces, stops):
    """Nothing of a stop string comes out, nothing that is none is kept back; which of two wins is where it begins."""
    text, ends, out = "".join(pieces), StopStrings(stops), []
    for piece in pieces:
        out.append(ends.push(piece))
        if ends.found:
            break
    said = "".join(out) + ends.finish()
    read = "".join(pieces[: len(out)])  # a piece that completes one stop string may hold the start of an earlier, longer one
    assert ends.found == any(s in text for s in stops)
    assert said == (read[: min(read.find(s) for s in stops if s in read)] if ends.found else text)


def word_tokenizer():
    """A real fast tokenizer, words with a leading space as sentencepiece has them, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>"] + [f"▁w{i}" for i in range(VOCAB - 3)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %} w7{% endif %}"
    return fast


def test_generate_goes_from_text_to_text():
    model, tokenizer = small_model("llama"), word_tokenizer()
    model.generation_config.eos_token_id = None
    engine = engine_of(model, tokenizer=tokenizer)
    for exact in (False, True):
        text, summary = generate(engine, "w1 w2 w3", 20, exact=exact, chat=False, stop=[tokenizer.eos_token_id])
        want = dense_text(model, 20, tokenizer("w1 w2 w3")["input_ids"], eos_token_id=2)
        assert text == tokenizer.decode(want, skip_special_tokens=True)
        assert summary.exact == exact
    parts = [t.text for t in stream(engine, tokenizer("w1 w2 w3")["input_ids"], 20)]
    assert "".join(parts) == text
    assert len([p for p in parts if p]) > 15


@pytest.mark.parametrize("exact", [False, True])
def test_stop_strings_end_the_text_and_the_work(exact):
    """In the middle of a piece, over two pieces; what would have come later is not run."""
    model, tokenizer = small_model("llama"), word_tokenizer()
    engine, calls = engine_of(model, tokenizer=tokenizer), []
    ids = tokenizer("w1 w2 w3")["input_ids"]
    whole = [t.text for t in stream(engine, ids, 20)]
    text = "".join(whole)
    model.register_forward_pre_hook(lambda m, a, k: calls.append(1), with_kwargs=True)
    for stop in (whole[8][1:], (whole[7] + whole[8])[2:-1]):
        calls.clear()
        said, summary = generate(engine, "w1 w2 w3", 20, exact=exact, chat=False, stop_strings=["never", stop])
        assert said == text[: text.index(stop)]
        assert summary.stopped == "stop string"
        assert summary.tokens == next(n for n in range(1, 21) if stop in "".join(whole[:n]))
        assert exact or len(calls) == summary.tokens
    said, summary = generate(engine, "w1 w2 w3", 20, exact=exact, chat=False, stop_strings=["never", text[-1] + "and more"])
    assert (said, summary.stopped) == (text, "max_new_tokens")  # what might have become one comes out at the end
    for wrong in ("w1", [""], [3]):
        with pytest.raises(SettingsError, match="expected a list of texts that are not empty"):
            generate(engine, "w1", 20, chat=False, stop_strings=wrong)
    with pytest.raises(SettingsError, match="expected one for stop strings"):
        stream(engine_of(model), ids, 20, stop_strings=["a"])


def test_a_template_that_refuses_is_one_sentence():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(SettingsError, match=r"the chat template refuses the messages \(only users speak\)"):
        generate(engine_of(small_model("llama"), tokenizer=tokenizer), "w4", 8)


def test_a_text_far_longer_than_the_context_is_refused_by_its_beginning():
    """Half a minute of encoding for 10 MB is saved; what may fit is encoded whole, however long it is."""
    looked: list[int] = []

    class Counted:
        tokenizer, context_length = None, 256

    class Looking:
        chat_template = None

        def __call__(self, text, **more):
            looked.append(len(text))
            return {"input_ids": [1] * len(text.split())}

    Counted.tokenizer = Looking()
    with pytest.raises(SettingsError, match=r"the prompt has more than 256 tokens, expected fewer than the model's 256 positions; shorten it"):
        prompt_ids(Counted, "w1 " * 3_500_000)
    assert looked == [1 << 16]
    looked.clear()
    assert prompt_ids(Counted, "w1 " * 10 + " " * 10_000_000) == [1] * 10  # a few tokens, and blanks that are none
    assert looked == [1 << 16, 1 << 18, 1 << 20, 1 << 22, 10_000_030]
    looked.clear()
    Counted.context_length = None
    assert len(prompt_ids(Counted, "w1 " * 100_000)) == 100_000 and looked == [300_000]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**13 }}", "it takes more than 1,024 MB of memory"),
        ("{% for i in range(10**8) %}x{% endfor %}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE .100000."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded.*"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | length + 'one' }}", "unsupported operand type.*"),
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, said):
    """A model's template is foreign code: whatever it raises, nobody is told of a defect of ours."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SettingsError, match=rf"the chat template fails on the messages \({said}\), expected one that writes them; restore"):
        generate(engine_of(small_model("llama"), tokenizer=tokenizer), "w4", 8)


def test_the_loop_loads_no_torch():
    """In a fresh process: what a machine without torch imports."""
    code = "import sys, flashhead_edge.generation, flashhead_edge.jetson.engine, flashhead_edge.jetson.onnxruntime_backend\n"
    code += "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_chats_go_through_the_template():
    model, tokenizer = small_model("llama"), word_tokenizer()
    engine = engine_of(model, tokenizer=tokenizer)
    ids = tokenizer("<s> w4 w5 </s> w7", add_special_tokens=False)["input_ids"]
    want = tokenizer.decode(dense_text(model, 8, ids, eos_token_id=2), skip_special_tokens=True)
    model.generation_config.eos_token_id = 2
    assert generate(engine, "w4 w5", 8)[0] == want
    assert generate(engine, [{"role": "user", "content": "w4 w5"}], 8)[0] == want
    assert generate(engine, "w4 w5", 8, chat=False)[0] != want
    with pytest.raises(SettingsError, match="character 3 of the prompt is no UTF-8"):  # of the message, whatever the template puts before it
        generate(engine, [{"role": "user", "content": "w4 \udcff"}], 8)
    tokenizer.chat_template = None
    with pytest.raises(SettingsError, match="the tokenizer has no chat template"):
        generate(engine, [{"role": "user", "content": "w4"}], 8)
    for empty in ("", []):
        with pytest.raises(SettingsError, match="the prompt is empty"):
            generate(engine, empty, 8)
    with pytest.raises(SettingsError, match="character 1 of the prompt is no UTF-8"):
        generate(engine, "w\udcff", 8)
    with pytest.raises(SettingsError, match="exact mode was asked together with sampling settings"):
        generate(engine, "w4", 8, Sampling(temperature=1.0), exact=True)
    with pytest.raises(SettingsError, match="the engine has no tokenizer"):
        generate(engine_of(model), "w4", 8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_a_checkpoint_on_disk_generates_the_dense_text(tmp_path, family):
    """Written, read back, decoded: padding rows masked in the baseline too, since a dense head may return them."""
    out = save_checkpoint(save_model(tmp_path / "model", family), tmp_path / "out")
    engine = load_engine(out, threads=1)
    assert engine.vocab_size == NAMED
    assert engine.head.weight.data_ptr() == engine.model.get_output_embeddings().weight.data_ptr()
    assert (engine.scale, engine.softcap) == {"gemma2": (1.0, 3.0), "granite": (0.25, None)}.get(family, (1.0, None))
    engine.model.generation_config.eos_token_id = None
    want = dense_text(engine.model, 20, suppress_tokens=list(range(NAMED, VOCAB)))
    assert ids_of(stream(engine, PROMPT[:5], 20)) == ids_of(exact_stream(engine, PROMPT[:5], 20))
    assert ids_of(stream(engine, PROMPT, 20, stop=())) == (want if 126 not in want else want[: want.index(126) + 1])
    assert generate(out, "t5 t9", 3)[1].tokens > 0


@pytest.mark.parametrize(("options", "text"), [({"threads": 0}, "threads is 0, expected 1 or more"), ({"dtype": "int8"}, "dtype is int8, expected float32")])
def test_engine_settings_out_of_range_are_refused(tmp_path, options, text):
    with pytest.raises(SettingsError, match=text):
        load_engine(tmp_path, **options)


@pytest.mark.slow
def test_exact_mode_on_a_real_checkpoint():
    """2,000 tokens from 20 prompts on the checkpoint that `make demo` leaves: see scripts/exact_mode.py."""
    root = Path(__file__).parent.parent
    folder, script = root / "demo" / "SmolLM2-135M-FlashHead", root / "scripts" / "exact_mode.py"
    if not folder.is_dir():
        pytest.skip("needs the checkpoint of make demo")
    done = subprocess.run([sys.executable, str(script), str(folder), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["equal_tokens"] == found["tokens"] == 2000
    assert found["bytes_share"] <= 0.2
    assert found["repeated_share"] <= 0.03
