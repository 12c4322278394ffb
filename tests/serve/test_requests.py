"""Whatever a stranger sends is a request that can be served, or a refusal in a sentence: never another error."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("starlette")
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead_edge.serve.openapi import below
from flashhead_edge.serve.refusals import Refusal
from flashhead_edge.serve.requests import LEFT_OUT, Wanted, read_json, wanted

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.sampled_from(["user", "function", "auto", "required"])
)
KEYS = st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "schema", "json_schema", "parameters", "0", "-1"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
ROLE = st.sampled_from(["user", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": st.text(max_size=4)}, optional={"tool_calls": JSON, "name": JSON})
FIELDS = [
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "max_tokens", "logit_bias",
    "response_format", "tools", "tool_choice", "user", "head", "prompt", "messages", "modalities", "presence_penalty", *LEFT_OUT,
]  # fmt: skip
BODY = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).flatmap(
    lambda body: st.just(body) | st.lists(MESSAGE, min_size=1, max_size=2).map(lambda messages: {"prompt": "a", "messages": messages, **body})
)


def refusal_of(function, *arguments, **more):
    """How a call refuses, or what it gives."""
    try:
        return None, function(*arguments, **more)
    except Refusal as refusal:
        return refusal, None


@settings(max_examples=400, deadline=None)
@given(body=BODY, chat=st.booleans())
def test_any_object_is_taken_or_refused(body, chat):
    refusal, found = refusal_of(wanted, body, chat=chat)
    if refusal is None:
        assert isinstance(found, Wanted)
        json.dumps(found.prompts)
    else:
        assert refusal.status == 400
        assert "expected" in str(refusal) and "\n" not in str(refusal) and len(str(refusal)) < 400


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,01eE-. nulltrfas\\u', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_refused(body):
    refusal, found = refusal_of(read_json, body)
    assert isinstance(found, dict) if refusal is None else str(refusal).startswith("body: it is ")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"user": {}}, "user: found an object, expected a string"),
        ({"model": 3}, "model: found 3, expected a string"),
        ({"logit_bias": {"7": None}}, "logit_bias[7]: found null, expected a number from -100 to 100"),
        ({"logit_bias": {"07": 1}}, "logit_bias: a name is no token id"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name: found a string, expected a string that is not empty"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": {}}}]}, "tools[0].function.description: found an object, expected a string"),
    ],
    ids=range(6),
)
def test_fields_of_another_type_are_refused(fields, sentence):
    """What the OpenAPI document forbids, schemathesis finds in a server that takes it."""
    refusal, _ = refusal_of(wanted, {"messages": [{"role": "user", "content": "a"}], **fields}, chat=True)
    assert str(refusal).startswith(sentence)


def test_token_ids_may_have_a_point():
    for given_, found in (([1.0, 2], ((1, 2),)), ([[1.0], [2, 3.0]], ((1,), (2, 3)))):
        assert wanted({"prompt": given_}, chat=False).prompts == found
    assert refusal_of(wanted, {"prompt": [1.5]}, chat=False)[0] is not None


@pytest.mark.parametrize("n", [1, 2, 10, 11, 101, 256, 1000, 1001])
def test_the_document_s_pattern_of_token_ids(n):
    pattern = re.compile(below(n))
    assert [i for i in range(n + 1200) if pattern.match(str(i))] == list(range(n))
    assert not any(pattern.match(text) for text in ("", "-1", "00", "01", "1.0"))
