"""OpenAI's own client against a server: the answers are those of the engine without one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")

from flashhead_edge.decoding import Sampling  # noqa: E402
from flashhead_edge.generation import generate, prompt_ids, stream  # noqa: E402

ASK = [{"role": "user", "content": "Hello there"}]
GREEDY = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 40}


def bare(engine, prompt=ASK, tokens=40, chat=None, **settings):
    return generate(engine, prompt, tokens, Sampling(**settings), chat=chat)


def test_models_are_listed(server):
    assert [m.id for m in server.client().models.list().data] == ["tiny"]
    assert server.client().models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model of that name, expected 'tiny'"):
        server.client().models.retrieve("other")


def test_chat_is_the_engine_s_text(server, engine):
    want, summary = bare(engine)
    found = server.client().chat.completions.create(**GREEDY)
    assert found.choices[0].message.content == want
    assert found.choices[0].finish_reason == ("stop" if summary.stopped == "stop token" else "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (summary.prompt_tokens, summary.tokens)
    assert found.model == "tiny"


def test_stream_is_the_same_text_in_pieces_and_ends_with_usage(server, engine):
    chunks = list(server.client().chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == bare(engine)[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 10  # in pieces, not at once
    assert len({c.id for c in chunks}) == 1


def test_choices_are_draws_of_seeds_one_after_the_other(server, engine):
    settings = {"temperature": 1.2, "top_p": 0.9, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    found = server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=20, n=3, seed=11, **settings)
    assert [c.message.content for c in found.choices] == [bare(engine, tokens=20, seed=11 + i, **settings)[0] for i in range(3)]
    assert [c.index for c in found.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=20, n=3, seed=11, stream=True, **settings):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [c.message.content for c in found.choices]


def test_completions_take_texts_lists_and_token_ids(server, engine):
    client, prompts = server.client(), ["one two", "three"]
    want = [bare(engine, p, 16, chat=False)[0] for p in prompts]
    found = client.completions.create(model="tiny", prompt=prompts, temperature=0)  # 16 tokens by default
    assert [c.text for c in found.choices] == want
    assert client.completions.create(model="tiny", prompt=prompt_ids(engine, prompts[0], chat=False), temperature=0).choices[0].text == want[0]
    pieces = client.completions.create(model="tiny", prompt=prompts[1], temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in pieces if c.choices) == want[1]


def test_stop_strings_end_a_text_before_them(server, engine):
    whole = bare(engine)[0]
    at = next(i for i in range(8, len(whole)) if whole[i] not in whole[:i])  # stands nowhere before
    found = server.client().chat.completions.create(**GREEDY, stop=["never said", whole[at]])
    assert found.choices[0].message.content == whole[:at]
    assert found.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_engine_s(server, engine):
    tokens = list(stream(engine, prompt_ids(engine, ASK), 12, logprobs=3))
    found = server.client().chat.completions.create(**{**GREEDY, "max_tokens": 12}, logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    # a prompt that begins like the one before is read from where it differs, so float32 sums come in another order: 1e-6 of logits of size 20
    assert [e.logprob for e in content] == pytest.approx([t.logprobs.logprob for t in tokens], abs=1e-4)
    assert [a.logprob for e in content for a in e.top_logprobs] == pytest.approx([v for t in tokens for _, v in t.logprobs.top], abs=1e-4)
    assert all(e.top_logprobs[0].token == e.token for e in content)  # greedy, and the head leaves nothing out
    plain = server.client().completions.create(model="tiny", prompt="one", temperature=0, max_tokens=5, logprobs=2).choices[0].logprobs
    assert [len(v) for v in (plain.tokens, plain.token_logprobs, plain.top_logprobs, plain.text_offset)] == [5] * 4


def test_dense_head_says_the_same_where_ours_leaves_nothing_out(server, engine):
    found = server.client().chat.completions.create(**GREEDY, extra_body={"head": "dense"})
    assert found.choices[0].message.content == bare(engine)[0]


def test_answers_follow_a_schema(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    found = server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=200, seed=1, response_format=form)
    assert 0 <= json.loads(found.choices[0].message.content)["n"] <= 99
    assert found.choices[0].finish_reason == "stop"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"], "additionalProperties": False},
    },
}


def test_a_tool_that_must_be_called_is_called(server):
    pytest.importorskip("llguidance")
    wanted = {"model": "tiny", "messages": ASK, "max_tokens": 300, "seed": 3, "tools": [WEATHER], "tool_choice": "required"}
    found = server.client().chat.completions.create(**wanted).choices[0]
    assert found.finish_reason == "tool_calls"
    call = found.message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Ulm", "Bonn")
    chunks = list(server.client().chat.completions.create(**wanted, stream=True))
    (delta,) = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert (delta.function.name, delta.function.arguments) == (call.function.name, call.function.arguments)
    after = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert server.client().chat.completions.create(model="tiny", messages=after, max_tokens=5, tools=[WEATHER]).choices[0].message.content is not None


def test_clients_at_once_get_their_own_texts(server, engine):
    """Texts take turns token by token in one engine: each is what it is alone."""
    asks = [[{"role": "user", "content": f"Number {i}: " + "x" * (60 * i)}] for i in range(12)]

    def ask(messages):
        chunks = server.client().chat.completions.create(**{**GREEDY, "messages": messages, "max_tokens": 60}, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, asks))
    assert found == [bare(engine, messages, 60)[0] for messages in asks]


def test_long_prompts_are_read_in_parts_to_the_same_text(server, engine):
    messages = [{"role": "user", "content": "ab " * 700}]  # 2,100 tokens: four parts and a rest
    assert server.client().chat.completions.create(**{**GREEDY, "messages": messages}).choices[0].message.content == bare(engine, messages)[0]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"temperature": 3}, openai.BadRequestError, r"temperature: found 3, expected a number from 0 to 2; call again with another value"),
        ({"max_tokens": 0}, openai.BadRequestError, r"max_tokens: found 0, expected a whole number from 1"),
        ({"messages": []}, openai.BadRequestError, r"messages: found an empty list, expected a list of messages, at least one"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, r"messages\[0\].role: it is none of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, r"content\[0\]: it is no part of type text"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, openai.BadRequestError, r"prompt has 9,0\d\d tokens, expected fewer than the model's 8,192"),
        ({"n": 99}, openai.BadRequestError, r"n: found 99, expected a whole number from 1 to 16"),
        ({"stop": [""]}, openai.BadRequestError, r"stop: found a list of 1, expected a string, or a list of at most 16"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, r"logit_bias: a name is no token id"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, r"logit_bias names token 99999, expected ids below 256"),
        ({"top_logprobs": 2}, openai.BadRequestError, r"top_logprobs: found without logprobs: true"),
        ({"functions": [{}]}, openai.BadRequestError, r"functions: this server does not have it"),
        ({"extra_body": {"head": "fat"}}, openai.BadRequestError, r"head: found another value than 'fast' and 'dense'"),
        ({"response_format": {"type": "x"}}, openai.BadRequestError, r"response_format: found an object of type 'x', expected an object whose type is text"),
        ({"tool_choice": "required"}, openai.BadRequestError, r"tool_choice: found a string, expected none, auto"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_a_sentence(server, change, error, sentence):
    with pytest.raises(error, match=sentence) as found:
        server.client().chat.completions.create(**{**GREEDY, **change})
    assert found.value.body["type"] == "invalid_request_error"


def test_the_field_that_is_wrong_is_named(server):
    client = server.client()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
    asked = {
        "tools[1].function.parameters": {"tools": [{**tool, "function": {"name": "g"}}, tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tools[1].function.name": {"tools": [tool, tool]},
        "logit_bias": {"logit_bias": {"99999": 1}},
    }
    for field, more in asked.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**GREEDY, **more})
        assert refused.value.param == field, refused.value
    for prompt, sentence in (
        ("x" * 9000, "prompt: the prompt has 9,0"),
        ("x" * 300_000, "prompt: the prompt has more than 8,192 tokens, expected fewer"),
        ([1, 99999], "prompt: token 99999 is none"),
        (["x"] * 17, "prompt: found 1 texts for each"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence) as refused:
            client.completions.create(model="tiny", prompt=prompt)
        assert refused.value.param == "prompt"
        assert (refused.value.code == "context_length_exceeded") == ("the prompt has" in sentence)
    assert client.chat.completions.create(**{**GREEDY, "max_tokens": 2}, extra_body={"head": None}).usage.completion_tokens == 2


def test_embeddings_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="embeddings: this server makes texts"):
        server.client().embeddings.create(model="tiny", input="x")


def test_seed_gives_the_same_text_whatever_came_before(server):
    """Read afresh: log-probabilities to the last bit, though the cache holds the prompt."""
    wanted = {"model": "tiny", "messages": ASK, "max_tokens": 8, "seed": 5, "temperature": 1.1, "logprobs": True}
    found = []
    for _ in range(3):
        found.append([(e.token, e.logprob) for e in server.client().chat.completions.create(**wanted).choices[0].logprobs.content])
        server.client().chat.completions.create(**GREEDY)
    assert found[0] == found[1] == found[2]
