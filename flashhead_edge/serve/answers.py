"""The forms that go back: OpenAI's chat completions and completions, whole or in pieces."""

from __future__ import annotations

import functools
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashhead_edge.generation import Token
from flashhead_edge.serve.mailbox import Piece
from flashhead_edge.serve.requests import Wanted
from flashhead_edge.serve.tools import Call, CallReader

BROKEN = "\ufffd"  # what stands for a part of a character
FINISH = {"max_new_tokens": "length", "context length": "length"}  # all else is a stop


@dataclass(eq=False)
class Saying:
    """One text of an answer so far."""

    index: int
    reader: CallReader | None
    said: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None

    def push(self, piece: Piece) -> str:
        """Take a token's text; what of it is said."""
        assert piece.token is not None
        self.tokens += 1
        text, rest = piece.token.text, ""
        if self.reader is not None:
            text = self.reader.push(text)
            if piece.ended:
                rest, self.calls = self.reader.finish()
        if piece.ended:
            self.finish = "tool_calls" if self.calls else FINISH.get(piece.ended, "stop")
        self.said.append(text + rest)
        return text + rest


class Answer:
    """An answer in the making, in the form that was asked for."""

    def __init__(self, wanted: Wanted, model: str, tokenizer: Any, prompt_tokens: int, form: str | None) -> None:
        self.wanted, self.model, self.tokenizer, self.prompt_tokens = wanted, model, tokenizer, prompt_tokens
        self.id = ("chatcmpl-" if wanted.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        count = wanted.choices * len(wanted.prompts)
        self.texts = [Saying(i, CallReader(form, wanted.tool_names) if form else None) for i in range(count)]
        self.offsets = [0] * count
        kind = ("chat.completion" if wanted.chat else "text_completion") + (".chunk" if wanted.chat and wanted.stream else "")
        self.head = {"id": self.id, "object": kind, "created": self.created, "model": model}
        # made once: a stream sends it with every token
        self.prefix = json.dumps(self.head, ensure_ascii=False)[:-1]

    @property
    def done(self) -> bool:
        return all(text.finish for text in self.texts)

    def usage(self) -> dict[str, int]:
        made = sum(text.tokens for text in self.texts)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": self.prompt_tokens + made}

    def opening(self) -> list[bytes]:
        """What a stream begins with: who speaks."""
        if not self.wanted.chat:
            return []
        return [self._event([{"index": t.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]) for t in self.texts]

    def push(self, piece: Piece) -> list[bytes]:
        """Take a token; the events of a stream that it makes."""
        text = self.texts[piece.index]
        said = text.push(piece)
        logprobs = self._logprobs(text, piece.token) if self.wanted.logprobs is not None and piece.token is not None else None
        if not self.wanted.stream:
            return []
        events = []
        if self.wanted.chat:
            if said or logprobs:
                events.append(self._event([{"index": text.index, "delta": {"content": said}, "logprobs": logprobs, "finish_reason": None}]))
            if text.calls:
                delta = {"tool_calls": [{"index": i, **call_form(call)} for i, call in enumerate(text.calls)]}
                events.append(self._event([{"index": text.index, "delta": delta, "logprobs": None, "finish_reason": None}]))
            if text.finish:
                events.append(self._event([{"index": text.index, "delta": {}, "logprobs": None, "finish_reason": text.finish}]))
        elif said or logprobs or text.finish:
            events.append(self._event([{"index": text.index, "text": said, "logprobs": logprobs, "finish_reason": text.finish}]))
        return events

    def closing(self) -> list[bytes]:
        """What a stream ends with."""
        last = [b"data: [DONE]\n\n"]
        return [self._event([], {"usage": self.usage()}), *last] if self.wanted.usage else last

    def document(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._chat_choice(t) if self.wanted.chat else self._choice(t) for t in self.texts]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _chat_choice(self, text: Saying) -> dict[str, Any]:
        said = "".join(text.said)
        message: dict[str, Any] = {"role": "assistant", "content": said if said or not text.calls else None, "refusal": None}
        if text.calls:
            message["tool_calls"] = [call_form(call) for call in text.calls]
        logprobs = None if self.wanted.logprobs is None else {"content": text.logprobs, "refusal": None}
        return {"index": text.index, "message": message, "logprobs": logprobs, "finish_reason": text.finish}

    def _choice(self, text: Saying) -> dict[str, Any]:
        logprobs = None
        if self.wanted.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [value for entry in text.logprobs for value in entry[name]] for name in names}
        return {"index": text.index, "text": "".join(text.said), "logprobs": logprobs, "finish_reason": text.finish}

    def _event(self, choices: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> bytes:
        tail = json.dumps({"choices": choices, **(more or {})}, ensure_ascii=False)
        return f"data: {self.prefix}, {tail[1:]}\n\n".encode()

    def _logprobs(self, text: Saying, token: Token) -> dict[str, Any] | None:
        """A token's log-probabilities in the request's form, kept for the whole answer."""
        if token.logprobs is None:
            return None
        found, top = token.logprobs.logprob, token.logprobs.top
        if self.wanted.chat:
            entry = self._entry(token.id, found) | {"top_logprobs": [self._entry(*other) for other in top]}
            text.logprobs.append(entry)
            return {"content": [entry], "refusal": None}
        shown = self._shown(token.id)
        best = {self._shown(i): value for i, value in top}
        entry = {"tokens": [shown], "token_logprobs": [found], "top_logprobs": [best], "text_offset": [self.offsets[text.index]]}
        self.offsets[text.index] += len(shown)
        text.logprobs.append(entry)
        return entry

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        shown = self._shown(token)
        own = shown.encode() if BROKEN not in shown else token_bytes(self.tokenizer, token)
        return {"token": shown, "logprob": max(logprob, -9999.0), "bytes": None if own is None else list(own)}


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes that a token stands for, of vocabularies over bytes (GPT-2's letters for them, or <0x0A>); None: the vocabulary is of another kind."""
    backend = getattr(tokenizer, "backend", None) or getattr(tokenizer, "backend_tokenizer", None)
    piece = None if backend is None else backend.id_to_token(token)
    if piece is None:
        return None
    if one := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(one[1], 16)])
    letters = byte_letters()
    return bytes(letters[c] for c in piece) if all(c in letters for c in piece) else None


@functools.cache
def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def call_form(call: Call) -> dict[str, Any]:
    return {"id": "call_" + secrets.token_hex(12), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
