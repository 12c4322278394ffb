"""The native body in the middle of several texts: they stand side by side in one cache, and are fed alone or in one pass.

A pass reads the weights once, however many texts it has, and gives each of them the states that it would get alone, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

from flashhead_edge.errors import EngineError
from flashhead_edge.generation.positions import CutByLength
from flashhead_edge.jetson import onnxruntime_body
from flashhead_edge.jetson.folder import AGAIN, ExportSettings
from flashhead_edge.jetson.onnxruntime_body import PAST, cache_shape, check_numbers, parts, present
from flashhead_edge.jetson.onnxruntime_sessions import runtime_errors, short

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class SharedCache:
    """The keys and values of all texts of a session, [1, KV, capacity, head size] float32 of each layer, and what a pass reads and writes.

    A text has a room of its own: some positions from its start on. Rooms of texts that nobody holds any more are free. One caller at a time.
    """

    def __init__(self, session: InferenceSession, settings: ExportSettings) -> None:
        self.session, self.settings = session, settings
        self.binding: Any = session.io_binding()
        self.shapes = {i.name: cache_shape(i, settings) for i in session.get_inputs() if PAST.fullmatch(i.name)}
        self.texts: WeakSet[TextBody] = WeakSet()
        self.capacity = 0
        self.cache: dict[str, np.ndarray] = {}  # by the name of the input
        # what a pass reads and writes beside the cache, bound as long as it has as many tokens and texts: every call that is not made counts
        self.ids: np.ndarray = np.empty((1, 0), np.int64)
        self.rows: np.ndarray = np.empty((0, 3), np.int64)  # of each text: tokens, positions before them, where it begins
        self.hidden: np.ndarray = np.empty((1, 0, settings.hidden_size), np.float32)
        self._bind(0, 0)

    def run(self, texts: Sequence[TextBody], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Feed each of some texts its tokens: hidden states of all of them one behind the other, [S, d], valid until the next pass.

        What fails leaves every text as it was.

        Raises:
            EngineError: ONNX Runtime failed.
            CheckpointError: the model gives states that are no numbers.
        """
        n = sum(map(len, ids))
        for text, its in zip(texts, ids):
            self._make_room(text, text.length + len(its))
        if self.ids.shape[1] != n or len(self.rows) != len(texts):
            self._bind(n, len(texts))
        at = 0
        for row, text, its in zip(self.rows, texts, ids):
            self.ids[0, at : at + len(its)] = its
            row[:] = len(its), text.length, text.start
            at += len(its)
        try:
            self.session.run_with_iobinding(self.binding)
        except runtime_errors() as error:
            before = " and ".join(str(text.length) for text in texts[:4])
            raise EngineError(f"body: ONNX Runtime failed on {n} tokens after {before} ({short(error)}); give a shorter text, or {AGAIN}") from error
        check_numbers(self.hidden)
        for text, its in zip(texts, ids):
            text.length += len(its)
        return self.hidden[0]

    def _bind(self, tokens: int, texts: int) -> None:
        self.ids, self.rows = np.empty((1, tokens), np.int64), np.empty((texts, 3), np.int64)
        self.hidden = np.empty((1, tokens, self.settings.hidden_size), np.float32)
        self.binding.bind_input("input_ids", "cpu", 0, np.int64, self.ids.shape, self.ids.ctypes.data)
        self.binding.bind_input("texts", "cpu", 0, np.int64, self.rows.shape, self.rows.ctypes.data)
        self.binding.bind_output("hidden_states", "cpu", 0, np.float32, self.hidden.shape, self.hidden.ctypes.data)

    def _make_room(self, text: TextBody, total: int) -> None:
        """See that a text can have `total` positions; what it holds stays, wherever it is afterwards."""
        if total <= text.room:
            return
        room = max(total, 2 * text.room, onnxruntime_body.FIRST_CAPACITY)
        if self.settings.context_length is not None:
            room = max(total, min(room, self.settings.context_length))
        others = sorted((other for other in self.texts if other is not text and other.room), key=lambda other: other.start)
        start = free_start([(other.start, other.start + other.room) for other in others], self.capacity, room, text.start)
        if start is None:
            text.room = room
            self._grow([*others, text])
        elif start != text.start:
            for values in self.cache.values():
                values[:, :, start : start + text.length] = values[:, :, text.start : text.start + text.length].copy()  # the two may overlap
        if start is not None:
            text.start, text.room = start, room

    def _grow(self, texts: Sequence[TextBody]) -> None:
        """Another cache, at least twice as long where it has several texts, with all of them side by side from its beginning on."""
        needed = sum(text.room for text in texts)
        capacity = needed if len(texts) == 1 else max(needed, 2 * self.capacity)
        starts = np.cumsum([0, *(text.room for text in texts)]).tolist()
        for name, (heads, size, dtype) in self.shapes.items():
            longer: np.ndarray = np.zeros((1, heads, capacity, size), dtype)
            for text, start in zip(texts, starts):
                if text.length:
                    longer[:, :, start : start + text.length] = self.cache[name][:, :, text.start : text.start + text.length]
            self.cache[name] = longer
            self.binding.bind_input(name, "cpu", 0, dtype, longer.shape, longer.ctypes.data)
            self.binding.bind_output(present(name), "cpu", 0, dtype, longer.shape, longer.ctypes.data)
        self.capacity = capacity
        for text, start in zip(texts, starts):
            text.start = start


class TextBody(CutByLength):
    """One text in a shared cache: a `generation.BodySession`. A position is forgotten by lowering `length`."""

    def __init__(self, shared: SharedCache) -> None:
        self.shared = shared
        self.start, self.room = 0, 0  # of its positions in the cache
        self.length = 0  # positions that are filled
        shared.texts.add(self)

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d] float32, the caller's to keep.

        Raises:
            EngineError: ONNX Runtime failed, or the text is longer than the model's context.
            CheckpointError: the model gives states that are no numbers.
        """
        self._check(ids)
        for start, end in parts(len(ids)):
            hidden = self.shared.run([self], [ids[start:end]])
        return hidden[-1:].copy()

    def feed_together(self, sessions: Sequence[TextBody], ids: Sequence[Sequence[int]]) -> list[np.ndarray | None]:
        """`feed` of each of some texts of one session in one pass. Errors as in `feed`; none of the texts has changed then."""
        for text, its in zip(sessions, ids):
            text._check(its)
        hidden, ends = self.shared.run(sessions, ids), np.cumsum([len(its) for its in ids])
        return [hidden[end - 1 : end].copy() for end in ends]

    def states(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds, all at once: hidden states of all of them, [n, d] float32, the caller's to keep."""
        return self.shared.run([self], [ids]).copy()

    def _check(self, ids: Sequence[int]) -> None:
        limit = self.shared.settings.context_length
        if limit is not None and self.length + len(ids) > limit:
            raise EngineError(f"body: the text has {self.length + len(ids):,} tokens, expected at most the model's {limit:,} positions; shorten it")
        if not len(ids):
            raise EngineError("body: no token was given, expected at least one; give a text")


def free_start(taken: Sequence[tuple[int, int]], capacity: int, room: int, now: int) -> int | None:
    """Where `room` positions are free among stretches that are taken, in order: from `now` on where they are, else the first such place."""
    ends, starts = [0, *(end for _, end in taken)], [*(start for start, _ in taken), capacity]
    free = [(start, end) for start, end in zip(ends, starts) if end - start >= room]
    if any(start <= now and now + room <= end for start, end in free):
        return now
    return free[0][0] if free else None
