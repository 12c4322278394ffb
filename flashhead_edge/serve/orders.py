"""From a checked request to texts to be made: token ids, a compiled grammar, settings that this engine takes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.generation import prompt_ids
from flashhead_edge.generation.decode import start
from flashhead_edge.generation.grammar import Grammar, compile_grammar
from flashhead_edge.generation.protocols import TextEngine
from flashhead_edge.generation.text import PromptTooLongError
from flashhead_edge.serve.limits import KEPT_GRAMMARS, NO_LIMIT
from flashhead_edge.serve.refusals import Refusal
from flashhead_edge.serve.requests import Wanted


@dataclass(frozen=True, eq=False)
class Order:
    """One text to be made."""

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    grammar: Grammar | None
    logprobs: int | None
    dense: bool
    afresh: bool  # the prompt is read as if it were the first: what a cache holds was summed in another order


@dataclass(eq=False)
class Grammars:
    """The last compiled schemas: a client sends the same one with every request."""

    kept: OrderedDict[str, Grammar] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, engine: TextEngine, schema: Mapping[str, Any]) -> Grammar:
        key = json.dumps(schema, sort_keys=True)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = compile_grammar(engine, json_schema=schema)
            self.kept.move_to_end(key)
            while len(self.kept) > KEPT_GRAMMARS:
                self.kept.popitem(last=False)
            return self.kept[key]


def orders(engine: TextEngine, wanted: Wanted, grammars: Grammars, schema: Mapping[str, Any] | None = None) -> list[Order]:
    """The texts of a request, prompt by prompt: tokenizers and compilers at work, so not in an event loop.

    Args:
        schema: that the texts follow instead of the request's own.
    Raises:
        Refusal: the engine cannot make them.
    """
    field = "response_format" if schema is None else parameters_field(wanted)
    try:
        schema = schema or wanted.schema
        grammar = None if schema is None else grammars.of(engine, schema)
    except EngineError as error:
        raise Refusal(str(error), 501, param=field) from error
    except SettingsError as error:
        raise Refusal(f"{field}: {error}", param=field) from error
    strange = [token for token in wanted.sampling.logit_bias if token >= engine.vocab_size]
    if strange:
        raise Refusal(f"logit_bias names token {strange[0]}, expected ids below {engine.vocab_size}; correct it", param="logit_bias")
    made = []
    for prompt in wanted.prompts:
        ids = ids_of(engine, wanted, prompt)
        limit = engine.context_length
        if limit is not None and len(ids) >= limit:
            where = "messages" if wanted.chat else "prompt"
            said = f"{where}: the prompt has {len(ids):,} tokens, expected fewer than the model's {limit:,} positions; shorten it"
            raise Refusal(said, code="context_length_exceeded", param=where)
        most = wanted.max_tokens or (NO_LIMIT if limit is None else limit - len(ids))
        for choice in range(wanted.choices):
            sampling = replace(wanted.sampling, seed=(wanted.sampling.seed + choice) % 2**64)
            made.append(Order(tuple(ids), most, sampling, wanted.stop, grammar, wanted.logprobs, wanted.dense, wanted.again))
    first = made[0]
    try:
        for order in made[:: wanted.choices]:
            start(engine, order.ids, order.max_tokens, first.sampling, (), first.stop, None, first.logprobs)
    except SettingsError as error:
        raise Refusal(str(error)) from error
    return made


def parameters_field(wanted: Wanted) -> str:
    """Where a request says what the arguments of its forced calls are."""
    places = [i for i, tool in enumerate(wanted.tools) if tool["function"]["name"] in wanted.tool_names]
    return f"tools[{places[0]}].function.parameters" if len(places) == 1 else "tools"


def ids_of(engine: TextEngine, wanted: Wanted, prompt: Any) -> Sequence[int]:
    if not wanted.chat and not isinstance(prompt, str):
        strange = [token for token in prompt if not 0 <= token < engine.embedding_rows]
        if strange:
            raise Refusal(f"prompt: token {strange[0]} is none of the model's, expected 0 to {engine.embedding_rows - 1}; correct it", param="prompt")
        return tuple(prompt)
    field = "messages" if wanted.chat else "prompt"
    try:
        return prompt_ids(engine, prompt, chat=wanted.chat, tools=wanted.tools or None)
    except PromptTooLongError as error:
        raise Refusal(f"{field}: {str(error).removeprefix('generate: ')}", code="context_length_exceeded", param=field) from error
    except SettingsError as error:
        raise Refusal(str(error), param=field) from error
