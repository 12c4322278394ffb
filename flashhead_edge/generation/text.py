"""Text to token ids and back: prompts through a chat template, text that grows piece by piece, stop strings. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashhead_edge.checkpoint.chat_template import chat_text
from flashhead_edge.errors import TEMPLATE_FAULTS, SettingsError, first_line
from flashhead_edge.generation.protocols import TextEngine, Tokenizer

LOOKED_AT = 1 << 16  # characters of a long text, at least, by which it is seen to be too long
MARGIN = 64  # tokens that a text may lose where it goes on: its beginning is cut within a word


class PromptTooLongError(SettingsError):
    """A prompt has far more tokens than the context."""


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # the window that is decoded: some tokens before it are needed for the spacing
        self.read = 0  # tokens whose text is out

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def push(self, token: int) -> str:
        """The text that `token` completes, "" where it ends inside a character."""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if now.endswith("�") or len(now) <= len(before):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left, broken characters and all."""
        before, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        self.start = self.read = len(self.ids)
        return now[len(before) :]


class StopStrings:
    """Ends a text before the first of some strings; what may become one of them waits until it is decided."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.held = ""  # the start of a stop string, perhaps
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text so far is certain to lie before any stop string, and is not out yet."""
        text = self.held + piece
        at = min((i for i in (text.find(s) for s in self.strings) if i >= 0), default=-1)
        if at >= 0:
            self.found, self.held = True, ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What waited, at the end of the text."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that `string` begins with, fewer than all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raise SettingsError where a stop string is empty."""
    if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
        raise SettingsError(f"generate: the stop strings are {strings!r}, expected a list of texts that are not empty; leave the empty ones out")


def prompt_ids(
    engine: TextEngine, prompt: str | Sequence[Mapping[str, Any]], chat: bool | None = None, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: a text, or the messages of a chat: {"role": ..., "content": ...}.
        chat: whether a text becomes a user's message in the tokenizer's chat template; None: where there is one.
        tools: that a chat may call, in OpenAI's form; the template says them to the model.
    Raises:
        SettingsError: the prompt is empty or not UTF-8, or a chat is asked of a tokenizer without a template. PromptTooLongError: it is far too long.
    """
    ids = _ids(engine, prompt, chat, tools)
    if ids is None:
        limit = engine.context_length
        raise PromptTooLongError(f"generate: the prompt has more than {limit:,} tokens, expected fewer than the model's {limit:,} positions; shorten it")
    return ids


def _ids(engine: TextEngine, prompt: Any, chat: bool | None = None, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int] | None:
    """As `prompt_ids`; None of a text that is far longer than the context."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise SettingsError("generate: the engine has no tokenizer, expected one for a prompt of text; pass token ids to stream()")
    if not prompt:
        raise SettingsError("generate: the prompt is empty, expected a text or messages; give one")
    template = bool(tokenizer.chat_template)
    messages = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    if (messages or chat) and not template:
        raise SettingsError("generate: the tokenizer has no chat template, expected one for a chat; give a plain text")
    if messages or chat or (chat is None and template):
        turns = [dict(m) for m in prompt] if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
        for turn in turns:  # before the template: what is wrong stands in the message, not in the template's text
            if isinstance(turn.get("content"), str) and _far_too_long(tokenizer, _checked(turn["content"]), engine.context_length):
                return None
        from jinja2 import TemplateError

        try:
            text = chat_text(tokenizer, turns, tools)
        except TemplateError as error:
            raise SettingsError(f"generate: the chat template refuses the messages ({first_line(error)}), expected what it is made for; change them") from error
        except TEMPLATE_FAULTS as error:
            raise SettingsError(
                f"generate: the chat template fails on the messages ({first_line(error)}), expected one that writes them; restore the model's template"
            ) from error
        return list(tokenizer(_checked(text), add_special_tokens=False)["input_ids"])
    if _far_too_long(tokenizer, _checked(prompt), engine.context_length):
        return None
    return list(tokenizer(prompt)["input_ids"])


def _far_too_long(tokenizer: Tokenizer, text: str, limit: int | None) -> bool:
    """Whether the beginning of a text alone has far more tokens than `limit`: a text of 10 MB takes half a minute to encode."""
    if limit is None:
        return False
    length = max(16 * limit, LOOKED_AT)
    while length < len(text):
        if len(tokenizer(text[:length], add_special_tokens=False)["input_ids"]) > limit + MARGIN:
            return True
        length *= 4
    return False


def fitting_ids(engine: TextEngine, messages: Sequence[Mapping[str, str]], fixed: int, dropped: int, new_tokens: int) -> tuple[list[int], int]:
    """Token ids of a chat without its oldest turns, so that an answer fits into the context behind it.

    Args:
        messages: `fixed` that always stand first, then turns of a user's message and its answer, last a user's message.
        dropped: turns that are left out already.
        new_tokens: wanted for the answer; room is made for no more than a quarter of the context.
    Returns:
        The ids, and how many turns are left out. The last message is always there: alone it may still be too long.
    Raises:
        SettingsError: as `prompt_ids`; far too long is the last message.
    """
    limit, turns = engine.context_length, (len(messages) - fixed - 1) // 2
    while dropped < turns:
        ids = _ids(engine, [*messages[:fixed], *messages[fixed + 2 * dropped :]])
        if ids is not None and (limit is None or len(ids) + min(new_tokens, limit // 4) <= limit):
            return ids, dropped
        dropped += 1
    return prompt_ids(engine, [*messages[:fixed], *messages[fixed + 2 * dropped :]]), dropped


def _checked(text: Any) -> Any:
    """The text; bytes that were no UTF-8 come from a command line as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(f"generate: character {error.start} of the prompt is no UTF-8, expected UTF-8 text; convert it") from error
    return text
