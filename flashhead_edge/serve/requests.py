"""What a client sends, checked field by field: OpenAI's chat completions and completions.

A field that we do not know is refused where it would change the answer and we cannot do it, and left aside else, as clients send
more fields every year.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import SettingsError
from flashhead_edge.serve.limits import MOST_CHOICES, MOST_DEPTH, MOST_STOPS
from flashhead_edge.serve.refusals import Refusal

ROLES = ("system", "developer", "user", "assistant", "tool")
HEADS = ("fast", "dense")
LEFT_OUT = {  # what OpenAI has and we have not, and when a value asks for nothing
    "functions": (None, []), "function_call": (None, "none"), "audio": (None,), "web_search_options": (None,), "suffix": (None, ""),
    "best_of": (None, 1), "echo": (None, False),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Wanted:
    """A request for texts."""

    chat: bool
    prompts: tuple[Any, ...]  # a chat: its messages, alone; else texts or lists of token ids
    tools: tuple[Mapping[str, Any], ...]
    tools_forced: bool  # the answer must be a call
    tool_names: tuple[str, ...]  # that may be called
    schema: Mapping[str, Any] | None  # of a JSON answer
    sampling: Sampling
    choices: int  # texts a prompt
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # as a stream's last piece
    logprobs: int | None  # alternatives a token; None: no log-probabilities
    dense: bool  # the dense head, to compare with
    again: bool  # a seed was given: the same text is wanted again, whatever other texts came before
    user: str  # whom it is for, as the client says


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body as JSON: an object, of strict numbers, not nested without end."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
        depth(found)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(f"body: it is no JSON ({why}), expected an object of UTF-8 JSON; correct it", code="invalid_json") from error
    if not isinstance(found, dict):
        raise Refusal(f"body: it is {kind(found)}, expected a JSON object; correct it", code="invalid_json")
    return found


def depth(value: Any, level: int = 0) -> None:
    """Raise ValueError where a value is nested deeper than MOST_DEPTH."""
    if level > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            depth(inner, level + 1)


def kind(value: Any) -> str:
    """What a JSON value is, in a word or two."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return f"an object of type {value['type'][:40]!r}"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def wrong(name: str, found: Any, expected: str) -> Refusal:
    shown = found if isinstance(found, (int, float)) and not isinstance(found, bool) else kind(found)
    return Refusal(f"{name}: found {shown}, expected {expected}; call again with another value", param=name)


def number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or not math.isfinite(value):
        raise wrong(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def named(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return "" if value is None else text(value, name)


def whole(body: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    value = without_point(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(name, value, f"a whole number from {low} to {high}")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return bool(value)


def text(value: Any, name: str) -> str:
    """A string that is UTF-8: JSON may hold halves of a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"{name}: character {error.start} is half of a surrogate pair, expected UTF-8 text; correct it", param=name) from error
    return value


def wanted(body: Mapping[str, Any], *, chat: bool) -> Wanted:
    """Check a request.

    Raises:
        Refusal: the first field that cannot be served, in a sentence.
    """
    for name, nothing in LEFT_OUT.items():
        if not any(body.get(name) == value and type(body.get(name)) is type(value) for value in nothing):
            raise Refusal(f"{name}: this server does not have it, expected the field to be left out; leave it out", param=name)
    modalities = body.get("modalities")
    if modalities not in (None, ["text"]):
        raise Refusal("modalities: found others than text, expected ['text']; leave the field out", param="modalities")
    named(body, "model")  # one is served, whatever is asked for
    prompts = (messages(body),) if chat else completion_prompts(body)
    tools, forced, names = chat_tools(body) if chat else ((), False, ())
    count = whole(body, "n", 1, MOST_CHOICES, 1) or 1
    if count * len(prompts) > MOST_CHOICES:
        field = "n" if len(prompts) <= MOST_CHOICES else "prompt"
        found = f"{count} texts for each of {len(prompts)} prompts"
        raise Refusal(f"{field}: found {found}, expected {MOST_CHOICES} texts in all; ask for fewer", param=field)
    stream, options = flag(body, "stream"), body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong("stream_options", options, "an object")
    head = "fast" if body.get("head") is None else body["head"]
    if head not in HEADS:
        raise Refusal("head: found another value than 'fast' and 'dense', expected one of them; leave the field out", param="head")
    return Wanted(
        chat=chat,
        prompts=prompts,
        tools=tools,
        tools_forced=forced,
        tool_names=names,
        schema=answer_schema(body),
        sampling=sampling(body),
        choices=count,
        max_tokens=max_tokens(body, chat),
        stop=stops(body),
        stream=stream,
        usage=flag(options or {}, "include_usage"),
        logprobs=chat_logprobs(body) if chat else whole(body, "logprobs", 0, 20),
        dense=head == "dense",
        again=body.get("seed") is not None,
        user=(named(body, "user") or named(body, "safety_identifier"))[:64],
    )


def max_tokens(body: Mapping[str, Any], chat: bool) -> int | None:
    """Most tokens of a text; None: what the context has room for."""
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    found = [whole(body, name, 1, 1 << 20) for name in names]
    given = [value for value in found if value is not None]
    return min(given) if given else (None if chat else 16)  # OpenAI's default


def sampling(body: Mapping[str, Any]) -> Sampling:
    """OpenAI's settings, and as vLLM's clients send them top_k, min_p and repetition_penalty; a seed is drawn where none is given."""
    seed = whole(body, "seed", -(2**63), 2**64 - 1)
    biases = {} if body.get("logit_bias") is None else body["logit_bias"]
    if not isinstance(biases, dict):
        raise wrong("logit_bias", biases, "an object of numbers by token id")
    bias = {}
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and str(int(token)) == token):
            raise Refusal("logit_bias: a name is no token id, expected whole numbers; correct it", param="logit_bias")
        if biases[token] is None:
            raise wrong(f"logit_bias[{token}]", None, "a number from -100 to 100")
        bias[int(token)] = number(biases, token, -100, 100, 0.0)
    try:
        return Sampling(
            temperature=number(body, "temperature", 0, 2, 1.0),
            top_p=max(number(body, "top_p", 0, 1, 1.0), 1e-9),  # OpenAI allows 0: the likeliest token
            top_k=max(whole(body, "top_k", -1, 1 << 20, 0) or 0, 0),
            min_p=number(body, "min_p", 0, 1, 0.0),
            repetition_penalty=number(body, "repetition_penalty", 0.01, 10, 1.0),
            presence_penalty=number(body, "presence_penalty", -2, 2, 0.0),
            frequency_penalty=number(body, "frequency_penalty", -2, 2, 0.0),
            logit_bias=bias,
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
        )
    except SettingsError as error:
        raise Refusal(str(error)) from error


def stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    found = body.get("stop")
    if found is None:
        return ()
    listed = [found] if isinstance(found, str) else found
    if not isinstance(listed, list) or len(listed) > MOST_STOPS or not all(isinstance(s, str) and s for s in listed):
        raise wrong("stop", found, f"a string, or a list of at most {MOST_STOPS} strings that are not empty")
    return tuple(text(s, "stop") for s in listed)


def chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = whole(body, "top_logprobs", 0, 20)
    if not flag(body, "logprobs"):
        if top:
            raise Refusal("top_logprobs: found without logprobs: true, expected both; add it", param="top_logprobs")
        return None
    return top or 0


def answer_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that response_format asks for; {} is any JSON object."""
    found = body.get("response_format")
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("type") not in ("text", "json_object", "json_schema"):
        raise wrong("response_format", found, "an object whose type is text, json_object or json_schema")
    if found["type"] == "text":
        return None
    if found["type"] == "json_object":
        return {"type": "object"}
    schema = (found.get("json_schema") or {}).get("schema") if isinstance(found.get("json_schema"), (dict, type(None))) else None
    if not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", schema, "a JSON schema, an object")
    return schema


def messages(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """A chat's messages as a template takes them: parts of a content joined, arguments of calls as values."""
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise wrong("messages", found, "a list of messages, at least one")
    return tuple(message(m, f"messages[{i}]") for i, m in enumerate(found))


def message(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise wrong(name, found, "an object with role and content")
    role = found.get("role")
    if role not in ROLES:
        raise Refusal(f"{name}.role: it is none of {', '.join(ROLES)}, expected one of them; correct it", param=f"{name}.role")
    calls = found.get("tool_calls")
    content = found.get("content")
    taken: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if isinstance(content, list):
        taken["content"] = "".join(part(p, f"{name}.content[{i}]") for i, p in enumerate(content))
    elif content is None and role == "assistant" and calls:
        taken["content"] = ""
    else:
        taken["content"] = text(content, f"{name}.content")
    if calls:
        taken["tool_calls"] = [call(c, f"{name}.tool_calls[{i}]") for i, c in enumerate(listed(calls, f"{name}.tool_calls"))]
    for key in ("name", "tool_call_id"):
        if found.get(key) is not None:
            taken[key] = text(found[key], f"{name}.{key}")
    return taken


def listed(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list")
    return value


def part(found: Any, name: str) -> str:
    if not isinstance(found, dict) or found.get("type") != "text":
        raise Refusal(f"{name}: it is no part of type text, expected text alone: the model reads nothing else; leave it out", param=name)
    return text(found.get("text"), f"{name}.text")


def call(found: Any, name: str) -> dict[str, Any]:
    """A call that the assistant made before, its arguments as values."""
    function = found.get("function") if isinstance(found, dict) else None
    if not isinstance(function, dict):
        raise wrong(name, found, "an object with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise wrong(f"{name}.function.arguments", arguments, "JSON") from error
    if not isinstance(arguments, dict):
        raise wrong(f"{name}.function.arguments", arguments, "an object as JSON")
    taken = {"type": "function", "function": {"name": text(function.get("name"), f"{name}.function.name"), "arguments": arguments}}
    return taken if not isinstance(found.get("id"), str) else {"id": found["id"], **taken}


def chat_tools(body: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], bool, tuple[str, ...]]:
    """The tools, whether one must be called, and which may be."""
    given = body.get("tools")
    tools = listed([] if given is None else given, "tools")
    names = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("parameters", {}), (dict, type(None))):
            raise wrong(f"tools[{i}]", tool, "an object of type function, with a function")
        if not isinstance(function.get("description"), (str, type(None))):
            raise wrong(f"tools[{i}].function.description", function["description"], "a string")
        if not function.get("name"):
            raise wrong(f"tools[{i}].function.name", function.get("name"), "a string that is not empty")
        if function["name"] in names:
            raise Refusal(f"tools[{i}].function.name: it is an earlier tool's, expected another; rename one of them", param=f"tools[{i}].function.name")
        names.append(text(function["name"], f"tools[{i}].function.name"))
    choice = body.get("tool_choice")
    if choice in (None, "auto"):
        return tuple(tools), False, tuple(names)
    if choice == "none":
        return (), False, ()
    if choice == "required" and tools:
        return tuple(tools), True, tuple(names)
    function = choice.get("function") if isinstance(choice, dict) else None
    if isinstance(function, dict) and function.get("name") in names:
        return tuple(tools), True, (str(function["name"]),)
    raise wrong("tool_choice", choice, "none, auto, required, or a function that tools names")


def without_point(value: Any) -> Any:
    """5.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def completion_prompts(body: Mapping[str, Any]) -> tuple[Any, ...]:
    """Texts, or lists of token ids."""
    found = body.get("prompt")
    if isinstance(found, str):
        return (text(found, "prompt"),)
    if isinstance(found, list) and found:
        if all(isinstance(p, str) for p in found):
            return tuple(text(p, "prompt") for p in found)
        lists = found if all(isinstance(p, list) and p for p in found) else [found]
        ids = [[without_point(token) for token in some] for some in lists]
        if all(isinstance(token, int) and not isinstance(token, bool) for some in ids for token in some):
            return tuple(map(tuple, ids))
    raise wrong("prompt", found, "a string, token ids, or a list of them")
