"""Which tokens may come next so that a text becomes JSON of a schema, or matches a pattern. llguidance does the parsing; no torch.

A grammar is compiled once for an engine's tokenizer (`compile_grammar`); each text that follows it is a `Matching` of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.errors import EngineError, SettingsError, first_line
from flashhead_edge.generation.protocols import TextEngine

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SPACE = r" |\n[ \t]{0,20}"  # between the parts of a JSON text: without a bound a small model may never leave it
NO_STOP = "<|no model says this|>"  # stands for the stop token of a model that has none: its id is beyond the vocabulary
NEEDED = "pip install 'flashhead-edge[grammar]'"


@dataclass(frozen=True, eq=False)
class Grammar:
    """A schema or a pattern, compiled for the tokens of one engine."""

    matcher: LLMatcher  # at the start of a text; never advanced
    vocab_size: int
    stop: tuple[int, ...]  # tokens that end a text that may end, and are never part of one


class Matching:
    """A text that follows a grammar, token by token."""

    def __init__(self, grammar: Grammar) -> None:
        self.vocab_size, self.stop = grammar.vocab_size, grammar.stop
        self.matcher = grammar.matcher.deep_copy()
        self.tokens = 0

    def mask(self) -> np.ndarray:
        """Whether each token may come next, [V] bool: a stop token where the text may end here.

        Raises:
            SettingsError: none may, or the grammar costs more than the library allows a step.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(self.vocab_size, bool)
        found = np.unpackbits(bits, bitorder="little")[: self.vocab_size]
        mask[: len(found)] = found
        self._check()
        if not self.may_end:
            mask[list(self.stop)] = False  # bytes of a text, where a tokenizer has them for plain tokens
        if not mask.any():
            raise SettingsError(f"grammar: no token may follow the {self.tokens} so far, expected at least one; change the schema or the pattern")
        return mask

    def accept(self, token: int) -> None:
        """Go on by a token that the mask has."""
        self.matcher.consume_token(token)
        self._check()
        self.tokens += 1

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self.matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text so far follows the whole grammar."""
        return bool(self.matcher.is_accepting())

    def _check(self) -> None:
        if self.matcher.is_error():
            raise SettingsError(
                f"grammar: after {self.tokens} tokens no text can follow ({reason(self.matcher.get_error())}); change the schema or the pattern"
            )


def compile_grammar(engine: TextEngine, *, json_schema: str | Mapping[str, Any] | None = None, regex: str | None = None) -> Grammar:
    """A grammar over an engine's tokens; its stop tokens end a text that may end.

    Args:
        json_schema: as JSON text or as its value; {} is JSON of any form.
        regex: a pattern that the whole text matches, in the syntax of Rust's regex crate: no look-around, no back-references.
    Raises:
        SettingsError: not exactly one of the two is given, it is invalid, or no text satisfies it.
        EngineError: llguidance is not installed, or cannot read the tokenizer.
    """
    if (json_schema is None) == (regex is None):
        raise SettingsError("grammar: a JSON schema and a pattern were given, or neither, expected one of them; leave one out")
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise EngineError(f"grammar: llguidance is not installed, expected it for a JSON schema or a pattern; {NEEDED}") from error
    if regex is None:
        name, source = "JSON schema", LLMatcher.grammar_from_json_schema(schema_text(json_schema), defaults={"whitespace_pattern": SPACE})
    else:
        name, source = "pattern", LLMatcher.grammar_from_regex(regex)
    stop = tuple(sorted(t for t in engine.stop_ids if t < engine.vocab_size))
    tokenizer = library_tokenizer(tokenizer_json(engine), stop)
    matcher = LLMatcher(tokenizer, source, log_level=0)
    trial = matcher.deep_copy()
    if not trial.is_error():
        trial.compute_bitmask()  # that no text satisfies a pattern shows here
    refused = trial.get_error()
    if refused:
        raise SettingsError(f"grammar: the {name} cannot be used ({reason(refused)}), expected one that some text satisfies; correct it")
    return Grammar(matcher, engine.vocab_size, stop)


def schema_text(schema: Any) -> str:
    """A schema as JSON text; SettingsError where a text is no JSON, or its value no schema."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise SettingsError(f"grammar: the JSON schema is no JSON ({first_line(error)}), expected an object such as {{}}; correct it") from error
    if not isinstance(schema, Mapping):
        raise SettingsError(f"grammar: the JSON schema is a {type(schema).__name__}, expected an object such as {{}}; correct it")
    return json.dumps(schema)


def tokenizer_json(engine: TextEngine) -> str:
    """The engine's tokenizer as tokenizer.json has it."""
    tokenizer: Any = engine.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)  # transformers' own, ours
    if backend is None or not hasattr(backend, "to_str"):
        found = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise EngineError(f"grammar: the engine has {found}, expected one of the library tokenizers (tokenizer.json); leave the grammar out")
    return str(backend.to_str())


@lru_cache(maxsize=1)  # a second or two
def library_tokenizer(text: str, stop: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer

    if not stop:  # the library would take some token of the text for one
        from tokenizers import Tokenizer

        extended = Tokenizer.from_str(text)
        extended.add_special_tokens([NO_STOP])
        text, stop = extended.to_str(), (extended.get_vocab_size() - 1,)
    try:
        return LLTokenizer(text, eos_token=list(stop))
    except ValueError as error:
        raise EngineError(f"grammar: llguidance cannot read the tokenizer ({first_line(error)}), expected one of bytes; leave the grammar out") from error


def reason(message: str) -> str:
    """What the library says, in one line: the cause, which it writes last of a parse error, without the pointing."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = next((line[len("error:") :].strip() for line in lines if line.startswith("error:")), None)
    return cause or (lines[0].rstrip(":.") if lines else "no reason given")
