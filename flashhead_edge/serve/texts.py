"""The decode thread: texts in fair turns, a token at a time, and nobody who reads them is waited for.

The engine belongs to this thread alone. Where it can hold several texts, up to `Limits.at_once` of them are made at once: in one pass
of the body for a token of each where it has such passes, else token by token in turns. Where it has one cache, one text is made after
the other, and the turns are those of who comes next. A long prompt is read in parts, so that a text beside it waits for a part and
not for all of it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flashhead_edge.errors import FlashHeadError, SettingsError, first_line
from flashhead_edge.generation import PromptCache, Stream, stream
from flashhead_edge.generation.cache import feed_ahead
from flashhead_edge.generation.protocols import TextEngine
from flashhead_edge.serve.dense import DenseHead
from flashhead_edge.serve.limits import Limits
from flashhead_edge.serve.mailbox import Mailbox, Piece
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.orders import Order
from flashhead_edge.serve.refusals import Refusal
from flashhead_edge.serve.rotation import Path, Rotation

PROMPT_PART = 512  # tokens of a prompt read in one turn: the block of the bodies themselves, so that sums are the same
LOG = logging.getLogger("flashhead_edge.serve")


@dataclass(eq=False)
class Text:
    """A text that waits or is being made. Only the decode thread changes it, but for `gone`."""

    order: Order
    path: Path  # host, user, its own name
    mailbox: Mailbox
    index: int  # in its request
    deadline: float  # by time.monotonic
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False  # nobody wants it any more
    cache: PromptCache | None = None
    read: int = 0  # tokens of the prompt that were fed before the stream begins
    stream: Stream | None = None
    token: int | None = None  # its last one, which its body has not read yet
    last: float = 0.0  # when that came
    steps: tuple[int, int] = (0, 0)  # tokens and capped steps that the metrics know

    def put(self, piece: Piece) -> None:
        self.mailbox.put(piece)


class Decoder:
    """A thread over an engine."""

    def __init__(self, engine: TextEngine, limits: Limits, metrics: Metrics, at_once: int, extra: int = 0) -> None:
        """
        Args:
            at_once: texts that are made at once.
            extra: of these, places for users alone who have no text among them. Where there is none, one of several is kept for them while there have been
                two users within a deadline: who is the only one may have all.
        """
        self.engine, self.limits, self.metrics, self.at_once, self.extra = engine, limits, metrics, at_once, extra
        self.users: dict[Path, float] = {}  # the last two, and when they came
        self.dense = DenseHead(engine)
        self.changed = threading.Condition()
        self.waiting: list[Text] = []
        self.active: list[Text] = []
        self.closing = False
        self.over = False  # the time to end is over, too
        self.broken = False
        self.seconds = 1.0  # that a text takes, smoothed
        self.turns, self.entries = Rotation(), Rotation()
        self.caches = [PromptCache() for _ in range(at_once)]
        self.thread = threading.Thread(target=self._run, name="decode", daemon=True)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.broken

    def submit(self, texts: Sequence[Text]) -> None:
        """Queue the texts of a request, all or none.

        Raises:
            Refusal: the queue is full (429), or the server is going down (503).
        """
        with self.changed:
            if self.closing or not self.alive:
                raise Refusal(
                    "server: it is shutting down, expected requests while it runs; send it again later", 503, "shutting_down", headers={"Retry-After": "5"}
                )
            user, now = texts[0].path[:2], time.monotonic()
            self.users.pop(user, None)
            self.users = dict([*self.users.items(), (user, now)][-2:])
            room = self.limits.waiting + self.at_once - self.extra - len(self.active) - len(self.waiting)
            if len(texts) > room:
                wait = str(min(60, max(1, math.ceil(self.seconds * (len(self.waiting) + 1) / self.at_once))))
                raise Refusal(
                    f"queue: {len(self.waiting)} texts wait and {len(self.active)} are being made, expected room for {len(texts)} more; "
                    f"send it again in {wait} s",
                    429, "queue_full", headers={"Retry-After": wait},
                )  # fmt: skip
            self.waiting.extend(texts)
            self._count()
            self.changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Give texts up; those that have ended stay as they are. From any thread."""
        for text in texts:
            text.gone = True
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """Take no more texts; the thread ends when those that it has are done."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def end_all(self) -> None:
        """Give up what is left after the time to drain; its clients are told."""
        with self.changed:
            self.over = True
            texts = [*self.waiting, *self.active]
        self.cancel(texts)

    def _count(self) -> None:
        self.metrics.queue(len(self.waiting), len(self.active))

    def _run(self) -> None:
        try:
            while self._admit():
                by_path = {text.path: text for text in self.active}
                if by_path:
                    self._step(by_path[self.turns.next(by_path)])
        except BaseException:
            self.broken = True
            LOG.exception("the decode thread failed")
            for text in [*self.active, *self.waiting]:
                text.put(Piece(text.index, None, "", error=internal()))
            raise

    def _admit(self) -> bool:
        """Let go of who is gone or late, take in whose turn it is, wait while there is nothing to do; whether to go on."""
        with self.changed:
            while True:
                now = time.monotonic()
                for texts in (self.active, self.waiting):
                    for text in [t for t in texts if t.gone or now > t.deadline]:
                        self._drop(text)
                while self.waiting and len(self.active) < self.at_once:
                    first: dict[Path, Text] = {}
                    there = {text.path[:2] for text in self.active}
                    others = len(self.users) > 1 and now - min(self.users.values()) < self.limits.deadline
                    kept = self.extra or int(others and self.at_once > 1)
                    for text in self.waiting:
                        if text.path[:2] not in there or len(self.active) < self.at_once - kept:
                            first.setdefault(text.path, text)
                    if not first:
                        break
                    text = first[self.entries.next(first)]
                    self.waiting.remove(text)
                    self._enter(text)
                if self.active:
                    return True
                self._count()
                self.turns.keep(())
                self.entries.keep(())
                if self.closing:
                    return False
                self.changed.wait()

    def _enter(self, text: Text) -> None:
        """Make a text active, with the cache that holds most of its prompt, or an empty one in the place of the least."""

        def shared(cache: PromptCache) -> int:
            return next((i for i, (a, b) in enumerate(zip(cache.ids, text.order.ids)) if a != b), min(len(cache.ids), len(text.order.ids)))

        if text.order.afresh:
            text.cache = min(self.caches, key=lambda cache: len(cache.ids))
            self.caches.remove(text.cache)
            text.cache = PromptCache()
        else:
            text.cache = max(self.caches, key=shared)
            self.caches.remove(text.cache)
            text.read = shared(text.cache)
        self.active.append(text)
        self._count()

    def _leave(self, text: Text) -> None:
        with self.changed:
            if text in self.active:
                self.active.remove(text)
            elif text in self.waiting:
                self.waiting.remove(text)
            if text.stream is not None:
                text.stream.close()  # now and in this thread: an engine may be a step ahead
            if text.cache is not None:
                self.caches.append(text.cache)
                text.cache = None
            if text.stream is not None:
                self.seconds += 0.1 * (time.monotonic() - text.arrived - self.seconds)
            self.turns.keep([t.path for t in self.active])
            self.entries.keep([t.path for t in [*self.active, *self.waiting]])
            self._count()

    def _drop(self, text: Text) -> None:
        """A text that nobody waits for any more, or whose time is over."""
        self._leave(text)
        if text.gone:
            self.metrics.ended("cancelled")
            if self.over:
                message = "server: it is shutting down and the time for texts to end is over, expected a shorter one; send it again later"
                text.put(Piece(text.index, None, "", error=Refusal(message, 503, "shutting_down", headers={"Retry-After": "5"})))
                return
            message = "text: the request was given up, expected it to be read to its end; send it again"
            text.put(Piece(text.index, None, "", error=Refusal(message, 499, "cancelled")))
            return
        self.metrics.ended("deadline")
        message = f"text: it was not done after {self.limits.deadline:g} s, expected a shorter one; ask for fewer tokens"
        text.put(Piece(text.index, None, "", error=Refusal(message, 504, "deadline")))

    def _step(self, text: Text) -> None:
        """A turn of a text, and of all that can go along with it in one pass of the body."""
        along = [t for t in self.active if goes_along(t)] if len(self.active) > 1 and goes_along(text) else [text]
        if len(along) > 1:
            self.turns.along(text.path, [t.path for t in along])
            try:
                feed_ahead([t.cache for t in along if t.cache is not None], [t.token for t in along if t.token is not None])
            except Exception:  # whose fault it is shows when each is fed alone
                LOG.exception("a pass of several texts failed")
        for one in along:
            self._turn(one)

    def _turn(self, text: Text) -> None:
        """One token of a text, or one part of its prompt. What goes wrong is the text's own."""
        try:
            if text.stream is None and self._read_part(text):
                return
            self._token(text)
        except SettingsError as error:
            self._failed(text, Refusal(str(error), 400))
        except FlashHeadError as error:
            LOG.warning("text failed", extra={"fields": {"error": str(error)}})
            self._failed(text, Refusal(f"engine: {first_line(error)}", 500, "engine_failed"))
        except Exception:
            LOG.exception("text failed")
            self._failed(text, internal())

    def _read_part(self, text: Text) -> bool:
        """Read a part of a long prompt; False: what is left is short, and is the stream's own first step."""
        ids = text.order.ids
        assert text.cache is not None
        if len(ids) - text.read <= PROMPT_PART + 1:  # a part of one token alone would have sums in another order
            return False
        text.read += PROMPT_PART
        text.cache.begin(self.engine, ids[: text.read])
        return True

    def _token(self, text: Text) -> None:
        order = text.order
        if text.stream is None:
            assert text.cache is not None
            if order.dense:
                text.stream = self.dense.stream(order, text.cache)
            else:
                text.stream = stream(
                    self.engine, order.ids, order.max_tokens, order.sampling, stop_strings=order.stop, grammar=order.grammar, logprobs=order.logprobs,
                    cache=text.cache,
                )  # fmt: skip
        token = next(text.stream)
        now, summary = time.monotonic(), text.stream.summary
        if summary.tokens == 1:
            self.metrics.first(now - text.arrived, summary.prompt_tokens)
        else:
            self.metrics.between(now - text.last)
        text.last, text.token = now, token.id
        self.metrics.step(summary.capped_steps - text.steps[1])
        text.steps = (summary.tokens, summary.capped_steps)
        if summary.stopped:
            self._leave(text)
            self.metrics.ended("done")
            text.put(Piece(text.index, token, summary.stopped, summary))
            return
        text.put(Piece(text.index, token, ""))
        if len(text.mailbox.pieces) > self.limits.unread_tokens:
            self._leave(text)
            self.metrics.ended("reader too slow")
            text.mailbox.pieces.clear()
            text.put(Piece(text.index, None, "", error=Refusal("text: its reader is too slow, expected it to keep up; read faster", 499, "reader_too_slow")))

    def _failed(self, text: Text, refusal: Refusal) -> None:
        self._leave(text)
        self.metrics.ended("failed")
        text.put(Piece(text.index, None, "", error=refusal))


def goes_along(text: Text) -> bool:
    """Whether the text's next token is one that its body can read in one pass with others."""
    return text.token is not None and text.cache is not None and text.cache.feeds_together


def internal() -> Refusal:
    return Refusal("server: a defect or a broken machine, expected neither; its log shows where it happened", 500, "internal")
