"""Drafts from the text itself: the greedy text, token for token, in fewer passes of the body."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_heads import few_probes
from small_models import small_model
from test_generation import PROMPT, engine_of, ids_of

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import SettingsError
from flashhead_edge.generation import PromptCache, stream
from flashhead_edge.generation.drafts import LENGTHS, Lookup


@given(text=st.lists(st.integers(0, 3), max_size=60), longest=st.integers(1, 6))
def test_a_draft_is_what_followed_the_longest_match_last(text, longest):
    lookup = Lookup()
    for token in text:
        lookup.push(token)
    want = []
    for n in LENGTHS:
        ends = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if ends and not want:
            want = text[ends[-1] : ends[-1] + longest]
    assert lookup.draft(longest) == want


@pytest.mark.parametrize("longest", [1, 4, 32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_the_text_is_the_greedy_text_in_fewer_passes(family, longest):
    """Counted by the model's own calls. Right guesses and wrong ones: a text that repeats itself, and then goes on otherwise."""
    model, calls = small_model(family), []
    engine = engine_of(model, few_probes(model.get_output_embeddings().weight, 6))
    plain = stream(engine, PROMPT * 2, 150)
    want = ids_of(plain)
    model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"].shape[1]), with_kwargs=True)
    run = stream(engine, PROMPT * 2, 150, speculate=longest)
    assert ids_of(run) == want
    s = run.summary
    assert len(calls) == s.passes < 150
    assert max(calls[1:]) <= longest + 1
    assert 0 < s.accepted < s.drafted == sum(calls[1:]) - (s.passes - 1)
    assert s.tokens == 150 == s.accepted + s.passes
    assert s.accepted_per_pass == s.accepted / s.passes
    assert s.clusters_opened == pytest.approx(plain.summary.clusters_opened)


def test_it_ends_where_the_text_does():
    """At each token of the text as the stop token, at each length, and where the positions do."""
    model = small_model("llama")
    engine = engine_of(model)
    want = ids_of(stream(engine, PROMPT, 40))
    for token in set(want):
        run = stream(engine, PROMPT, 40, stop=[token], speculate=8)
        assert ids_of(run) == want[: want.index(token) + 1]
        assert run.summary.stopped == "stop token"
    for n in (1, 2, 17):
        assert ids_of(stream(engine, PROMPT, n, speculate=8)) == want[:n]
    short = engine_of(small_model("gpt2"))
    run = stream(short, PROMPT * 36, 50, speculate=8)
    assert ids_of(run) == ids_of(stream(short, PROMPT * 36, 50))
    assert run.summary.stopped == "context length"


def test_a_chat_s_cache_holds_what_was_verified():
    engine, cache = engine_of(small_model("llama")), PromptCache()
    first = ids_of(stream(engine, PROMPT, 40, cache=cache, speculate=8))
    longer = [*PROMPT, *first, 3, 4]
    run = stream(engine, longer, 20, cache=cache, speculate=8)
    assert ids_of(run) == ids_of(stream(engine, longer, 20))
    assert run.summary.prompt_read == 3


def test_what_does_not_go_together_is_one_sentence():
    engine = engine_of(small_model("llama"))
    for more in ({"sampling": Sampling(temperature=1.0)}, {"sampling": Sampling(frequency_penalty=0.5)}, {"logprobs": 1}):
        with pytest.raises(SettingsError, match="speculate was asked together with sampling, a grammar or logprobs"):
            stream(engine, PROMPT, 5, speculate=4, **more)
    for wrong in (-1, 33):
        with pytest.raises(SettingsError, match=f"speculate is {wrong}, expected 0 to 32"):
            stream(engine, PROMPT, 5, speculate=wrong)
    with pytest.raises(SettingsError, match="speculate needs a body that gives the states of several tokens and can be cut back"):
        next(stream(engine_of(small_model("qwen3_5")), PROMPT, 5, speculate=4))


def test_states_of_several_tokens_are_those_of_one_at_a_time():
    """Up to the order of sums in float32: 2^-24 of a state's size for each of some hundred additions."""
    engine = engine_of(small_model("llama"))
    one, many = engine.body(), engine.body()
    one.feed(PROMPT[:3]), many.feed(PROMPT[:3])
    want = np.concatenate([one.feed([t]).numpy() for t in PROMPT[3:]])
    got = many.states(PROMPT[3:]).numpy()
    assert got.shape == want.shape == (len(PROMPT) - 3, 32)
    assert np.abs(got - want).max() < 200 * 2.0**-24 * np.abs(want).max()
