"""Texts that are read token by token, several beside each other, as a server reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashhead_edge.decoding import Sampling
from flashhead_edge.generation import PromptCache, stream
from flashhead_edge.generation.cache import feed_ahead


class Reader:
    """A text in the making."""

    def __init__(self, engine: Any, prompt: list[int], tokens: int, sampling: Sampling) -> None:
        self.cache = PromptCache()
        self.stream = stream(engine, prompt, tokens, sampling, cache=self.cache)
        self.found: list[int] = []
        self.tokens = tokens

    @property
    def done(self) -> bool:
        return len(self.found) == self.tokens

    def take(self) -> None:
        self.found.append(next(self.stream).id)


def together(readers: Sequence[Reader]) -> None:
    """A token of each: who has one already goes along in one pass."""
    along = [r for r in readers if r.found and not r.done and r.cache.feeds_together]
    if len(along) > 1:
        feed_ahead([r.cache for r in along], [r.found[-1] for r in along])
    for r in readers:
        if not r.done:
            r.take()


def come_and_go(engine: Any, texts: Sequence[tuple[list[int], int, Sampling]], rows: int) -> list[list[int]]:
    """Tokens of texts of which so many at most are made at once; each begins when there is room, one a turn."""
    waiting, active, ended = list(range(len(texts))), dict[int, Reader](), dict[int, list[int]]()
    while waiting or active:
        if waiting and len(active) < rows:
            n = waiting.pop(0)
            active[n] = Reader(engine, *texts[n])
        together(list(active.values()))
        for n in [n for n, r in active.items() if r.done]:
            ended[n] = active.pop(n).found  # and its row is free
    return [ended[n] for n in range(len(texts))]


def alone(engine: Any, prompt: list[int], tokens: int, sampling: Sampling) -> list[int]:
    return [t.id for t in stream(engine, prompt, tokens, sampling)]
