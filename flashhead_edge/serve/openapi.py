"""The OpenAPI document of the routes: what clients may rely on. OpenAI's own documents say the rest of the fields."""

from __future__ import annotations

from typing import Any

from flashhead_edge import __version__
from flashhead_edge.serve.limits import MOST_CHOICES, MOST_STOPS

ERRORS = {
    "400": "A field is wrong", "401": "No key, or another one",
    "403": "Another host's name", "404": "No such route or model", "408": "The body came too slowly",
    "413": "The body is too large", "415": "The body is not said to be JSON", "429": "The queue is full", "500": "A text failed", "501": "Not installed here",
    "431": "The first lines are too long", "503": "The server is shutting down", "504": "The deadline is over",
}  # fmt: skip


def nullable(**schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def number(low: float, high: float) -> dict[str, Any]:
    return nullable(type="number", minimum=low, maximum=high)


def whole(low: int, high: int) -> dict[str, Any]:
    return nullable(type="integer", minimum=low, maximum=high)


def form(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": ["type", *more], "properties": {"type": {"const": kind}, **more}}


def too_many(prompts: int) -> dict[str, Any]:
    """So many prompts or more, each with more texts than there may be in all."""
    several = {"type": "array", "minItems": prompts, "items": {"type": ["string", "array"]}}
    return {"required": ["n", "prompt"], "properties": {"prompt": several, "n": {"type": "integer", "minimum": MOST_CHOICES // prompts + 1}}}


def below(n: int) -> str:
    """A pattern of the whole numbers below n, at least 1, without zeros before them."""
    last = str(n - 1)
    ways = ["0", *(f"[1-9][0-9]{{{digits - 1}}}" for digits in range(1, len(last))), last]
    for at, digit in enumerate(last):
        low = 1 if at == 0 else 0
        if int(digit) > low:
            ways.append(f"{last[:at]}[{low}-{int(digit) - 1}][0-9]{{{len(last) - at - 1}}}")
    return f"^({'|'.join(ways)})$"


def api_document(vocab: int, tokens: int, tools: bool) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        vocab: tokens that the model writes: ids of biases are below.
        tokens: those that it reads: ids of prompts are below.
        tools: whether its chat template knows them.
    """
    object_: dict[str, Any] = {"type": "object"}
    some = {"type": "string", "minLength": 1}
    told = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable(type="string"), "code": nullable(type="string")}
    error_form = {"type": "object", "required": [*told], "properties": told}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    schema_form = form("json_schema", json_schema={"type": "object", "required": ["schema"], "properties": {"schema": {"type": "object"}}})
    common = {
        "model": nullable(type="string"),
        "max_tokens": whole(1, 1 << 20),
        "temperature": {"anyOf": [{"const": 0}, {"type": "number", "minimum": 0.001, "maximum": 2}, {"type": "null"}]},
        "top_p": number(0, 1),
        "top_k": whole(-1, 1 << 20),
        "min_p": number(0, 1),
        "repetition_penalty": number(0.01, 10),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "logit_bias": nullable(
            type="object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}, propertyNames={"pattern": below(vocab)}
        ),
        "seed": whole(-(2**63), 2**64 - 1),
        "n": whole(1, MOST_CHOICES),
        "stop": {"anyOf": [some, {"type": "array", "maxItems": MOST_STOPS, "items": some}, {"type": "null"}]},
        "stream": nullable(type="boolean"),
        "stream_options": nullable(type="object", properties={"include_usage": nullable(type="boolean")}),
        "response_format": {"anyOf": [form("text"), form("json_object"), schema_form, {"type": "null"}]},
        "user": nullable(type="string"),
        "safety_identifier": nullable(type="string"),
        "head": {"enum": ["fast", "dense", None], "description": "The head that chooses tokens: ours, or the model's own to compare with"},
    }
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
    message = {
        "type": "object",
        "required": ["role", "content"],
        "description": "An assistant's message may have tool_calls and no content, as in OpenAI's interface",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
        },
    }
    function = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": some, "description": nullable(type="string"), "parameters": nullable(type="object")},
    }
    tool = {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": function}}
    chat = {
        "type": "object",
        "required": ["messages"],
        "properties": {
            **common,
            "messages": {"type": "array", "minItems": 1, "items": message},
            "max_completion_tokens": whole(1, 1 << 20),
            "logprobs": nullable(type="boolean"),
            "top_logprobs": whole(0, 20),
            "tools": nullable(type="array", items=tool) if tools else nullable(type="array", maxItems=0, description="This model's chat template knows none"),
            "tool_choice": {"enum": ["none", "auto", None], "description": "Beside tools also required, or a function that they name"},
        },
        "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
        "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
        "not": {  # a form of the text and calls in it
            "required": ["tools", "response_format"],
            "properties": {
                "tools": {"type": "array", "minItems": 1},
                "tool_choice": {"not": {"const": "none"}},
                "response_format": {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["json_object", "json_schema"]}}},
            },
        },
    }
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": tokens - 1}}
    lists = [*({"type": "array", "minItems": 1, "maxItems": MOST_CHOICES, "items": item} for item in (some, ids)), ids]
    prompt = {"anyOf": [some, *lists], "description": "A text or token ids of the model, or some of either; with n 16 texts in all"}
    plain = {
        "type": "object",
        "required": ["prompt"],
        "properties": {**common, "prompt": prompt, "logprobs": whole(0, 20)},
        "not": {"anyOf": [too_many(prompts) for prompts in range(2, MOST_CHOICES + 1) if MOST_CHOICES // prompts < MOST_CHOICES // (prompts - 1)]},
    }
    errors = {status: {"description": text, "content": error} for status, text in ERRORS.items()}

    def post(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
        done = {"description": "The answer, or its pieces as server-sent events", "content": {"application/json": {"schema": object_}, "text/event-stream": {}}}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {"200": done, **errors}}}

    def get(summary: str, kind: str = "application/json", *others: str, **more: Any) -> dict[str, Any]:
        done = {"200": {"description": "As asked", "content": {kind: {}}}}
        bad = {s: errors[s] for s in ("401", "403", *others)}
        return {"get": {"summary": summary, "responses": {**done, **bad}, **more}}

    name = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "flashhead serve", "version": __version__},
        "paths": {
            "/v1/chat/completions": post("An answer to a chat, in OpenAI's form", chat),
            "/v1/completions": post("A text that goes on, in OpenAI's form", plain),
            "/v1/models": get("The model"),
            "/v1/models/{name}": get("The model, by its name", "application/json", "404", **name),
            "/health": get("Whether the process works", "application/json", "500"),
            "/ready": get("Whether requests are taken", "application/json", "503"),
            "/metrics": get("Counts and times for Prometheus", "text/plain"),
            "/openapi.json": get("This document"),
        },
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": error_form}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
