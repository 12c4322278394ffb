"""A body that remembers its text: the next prompt is read from where it differs, as a chat's is from turn to turn. No torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from flashhead_edge.decoding import Sampling
from flashhead_edge.generation.protocols import Array, BodySession, Chosen, Continues, FeedsTogether, ReadsStates, TextEngine, Verified, Verifies


class PromptCache:
    """A session of a body beside the tokens that it holds; a `BodySession` itself once a text has begun."""

    def __init__(self) -> None:
        self.body: BodySession | None = None
        self.going: Any = None  # the body while it continues a text by itself
        self.ids: list[int] = []  # what the body holds
        self.ahead: tuple[int, Array] | None = None  # the last of them and its state, where `feed_ahead` read it and nobody has taken it yet
        self.texts = 0  # how many have begun

    def begin(self, engine: TextEngine, prompt: Sequence[int]) -> tuple[int, Array]:
        """Bring the body behind `prompt`, of at least one token: how many of its tokens were read, hidden state of the last one [1, d].

        A body that cannot be cut keeps its text only where the prompt goes on from all of it.
        """
        self.texts += 1
        self.going = None
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, prompt)) if a != b), min(len(self.ids), len(prompt)))
        shared = min(shared, len(prompt) - 1)  # the last state comes from a token that is fed
        self.ahead = None
        if self.body is None or not shared or (shared < len(self.ids) and not self.body.can_cut):
            self.body, self.ids, shared = None, [], 0  # the old one first: an engine may have room for so many
            self.body = engine.body()
        if shared < len(self.ids):
            self.cut(len(self.ids) - shared)
        return len(prompt) - shared, self.feed(prompt[shared:])

    def feed(self, ids: Sequence[int]) -> Array:
        if self.ahead is not None and list(ids) == [self.ahead[0]]:
            hidden, self.ahead = self.ahead[1], None
            return hidden
        return self._run(ids, lambda body: body.feed(ids))

    @property
    def feeds_together(self) -> bool:
        """Whether `feed_ahead` can take it."""
        return isinstance(self.going or self.body, FeedsTogether)

    @property
    def reads_states(self) -> bool:
        """Whether drafts can be verified here: `states` works, and what was wrong can be cut off."""
        body = self._open()
        return body.can_cut and isinstance(body, ReadsStates)

    def states(self, ids: Sequence[int]) -> Array:
        """As `ReadsStates` has it."""
        return self._run(ids, lambda body: body.states(ids))

    def continues(self, sampling: Sampling) -> bool:
        """Whether the body goes on by itself with these settings."""
        body = self._open()
        return isinstance(body, Continues) and body.continues(sampling)

    def continued(self, most: int, sampling: Sampling) -> Generator[Chosen, None, None]:
        """As `Continues` has it. Until it is closed or at its end the body is given up, as for every other call."""
        body: Any = self._open()
        text, self.body, self.going = self.texts, None, body
        with closing(body.continued(most, sampling)) as steps:
            try:
                last: list[int] = []
                for found in steps:
                    self.ids.extend(last)
                    last = [found.token]
                    yield found
            except GeneratorExit:  # the caller has enough
                if self.texts == text:
                    self.body = body
                raise
            finally:
                if self.texts == text:
                    self.going = None
        self.body = body

    @property
    def verifies(self) -> bool:
        """Whether `tokens_after` works, which is less work than a step over `states`."""
        return isinstance(self._open(), Verifies)

    def tokens_after(self, ids: Sequence[int]) -> Verified:
        """As `Verifies` has it."""
        return self._run(ids, lambda body: body.tokens_after(ids))

    def _run(self, ids: Sequence[int], reading: Callable[[Any], Any]) -> Any:
        with self._taken() as body:
            hidden = reading(body)
            self.ids.extend(ids)
        return hidden

    @contextmanager
    def _taken(self) -> Iterator[Any]:
        """The body, given up until all is done: what fails or is interrupted leaves nobody knows what."""
        body, self.body, self.ahead = self._open(), None, None
        yield body
        self.body = body

    @property
    def can_cut(self) -> bool:
        return self._open().can_cut

    def cut(self, tokens: int) -> None:
        with self._taken() as body:
            body.cut(tokens)
            del self.ids[len(self.ids) - tokens :]

    def snapshot(self) -> Any:
        return self._open().snapshot(), len(self.ids)

    def restore(self, kept: Any) -> None:
        state, length = kept
        with self._taken() as body:
            body.restore(state)
            del self.ids[length:]

    def _open(self) -> BodySession:
        assert self.body is not None, "no text has begun"
        return self.body


def feed_ahead(caches: Sequence[PromptCache], tokens: Sequence[int]) -> None:
    """Feed a token to each of some caches of one engine in one pass: what each would `feed` next, or its body by itself, which then runs nothing.

    What fails has changed none of them.
    """
    bodies = [cache.going or cache._open() for cache in caches]
    assert isinstance(bodies[0], FeedsTogether)
    states = bodies[0].feed_together(bodies, [[token] for token in tokens])
    for cache, token, hidden in zip(caches, tokens, states):
        if cache.going is None:
            cache.ids.append(token)
            cache.ahead = token, hidden
