"""A model's body in ONNX Runtime, in the middle of one text: keys and values stay where they are, or grow step by step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.errors import CheckpointError, EngineError
from flashhead_edge.jetson.folder import AGAIN, ExportSettings
from flashhead_edge.jetson.onnxruntime_sessions import runtime_errors, short

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FIRST_CAPACITY = 256  # positions that a cache begins with; it doubles
PROMPT_BLOCK = 512  # tokens fed at once: a longer prompt goes in parts, for the memory's sake
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


class OnnxBody:
    """The state of one text.

    Where the cache is in place, past and present are one buffer [1, KV, capacity, head size]: attention writes a step's keys and
    values into it and reads no further than the attention mask is long. So a position is forgotten by lowering `length`.
    Else every step returns a present that is one longer, which is the next step's past.
    """

    can_cut = True

    def __init__(self, session: InferenceSession, settings: ExportSettings) -> None:
        self.session = session
        self.settings = settings
        self.binding: Any = session.io_binding()
        self.in_place = settings.cache == "in_place"
        self.length = 0  # positions that are filled
        self.shapes = {i.name: cache_shape(i, settings) for i in session.get_inputs() if PAST.fullmatch(i.name)}
        self.cache: dict[str, Any] = {}  # by the name of the input, an OrtValue each
        self.bound = 0  # tokens of the step whose arrays are bound: they must live as long as the binding
        self.ids: np.ndarray = np.empty((1, 0), np.int64)
        self.hidden: np.ndarray = np.empty((1, 0, settings.hidden_size), np.float32)
        self.positions = np.empty((1, 0), np.int64) if any(i.name == "position_ids" for i in session.get_inputs()) else None
        self._bind_step(0)
        self._grow(FIRST_CAPACITY)
        if not self.in_place:
            for name in self.shapes:
                self.binding.bind_output(present(name))
            self._bind_past({name: np.empty((1, heads, 0, size), dtype) for name, (heads, size, dtype) in self.shapes.items()})

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d] float32, the caller's to keep.

        Raises:
            EngineError: ONNX Runtime failed, or the text is longer than the model's context.
            CheckpointError: the model gives states that are no numbers.
        """
        limit = self.settings.context_length
        if limit is not None and self.length + len(ids) > limit:
            raise EngineError(f"body: the text has {self.length + len(ids):,} tokens, expected at most the model's {limit:,} positions; shorten it")
        if not len(ids):
            raise EngineError("body: no token was given, expected at least one; give a text")
        for start, end in parts(len(ids)):
            hidden = self._run(ids[start:end])
        check_numbers(hidden)
        return hidden

    def states(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds, all at once: hidden states of all of them, [n, d] float32, the caller's to keep."""
        self._run(ids)
        check_numbers(self.hidden)
        return self.hidden[0].copy()

    def cut(self, tokens: int) -> None:
        """Forget the last `tokens` positions."""
        self.restore(self.length - tokens)

    def snapshot(self) -> int:
        """The length says all: what lies behind it is written again."""
        return self.length

    def restore(self, kept: int) -> None:
        if not self.in_place and kept < self.length:
            self._bind_past({name: np.ascontiguousarray(value.numpy()[:, :, :kept]) for name, value in self.cache.items()})
        self.length = kept

    def _run(self, ids: Sequence[int]) -> np.ndarray:
        """Feed some tokens: hidden state of the last one, [1, d].

        A step of one token reads all weights of the model, so that Python finds its own code and data out of the caches: every call
        that is not made counts. What such a step reads and writes is bound once, and only the attention mask anew.
        """
        n, total, bind = len(ids), self.length + len(ids), self.binding
        self._make_room(total)
        if n != self.bound:
            self._bind_step(n)
        self.ids[0, :] = ids
        if self.positions is not None:
            self.positions[0, :] = range(self.length, total)
        bind.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self.mask_pointer)
        try:
            self.session.run_with_iobinding(bind)
        except runtime_errors() as error:
            raise EngineError(f"body: ONNX Runtime failed on {n} tokens after {self.length} ({short(error)}); give a shorter text, or {AGAIN}") from error
        if not self.in_place:
            self.cache = dict(zip(self.shapes, bind.get_outputs()[1:]))  # in the order in which they were first bound, behind the hidden states
            for name, value in self.cache.items():
                bind.bind_ortvalue_input(name, value)
                bind.bind_output(present(name))  # made anew by the next run
        self.length = total
        return self.hidden[0, -1:].copy()

    def _bind_step(self, n: int) -> None:
        """Make and bind what a step of `n` tokens reads and writes beside the cache."""
        bind, self.bound = self.binding, n
        self.ids, self.hidden = np.empty((1, n), np.int64), np.empty((1, n, self.settings.hidden_size), np.float32)
        bind.bind_input("input_ids", "cpu", 0, np.int64, self.ids.shape, self.ids.ctypes.data)
        bind.bind_output("hidden_states", "cpu", 0, np.float32, self.hidden.shape, self.hidden.ctypes.data)
        if self.positions is not None:
            self.positions = np.empty((1, n), np.int64)
            bind.bind_input("position_ids", "cpu", 0, np.int64, self.positions.shape, self.positions.ctypes.data)

    def _make_room(self, total: int) -> None:
        if total > len(self.ones):
            room = max(total, 2 * len(self.ones))
            if self.settings.context_length is not None:
                room = max(total, min(room, self.settings.context_length))
            self._grow(room)

    def _grow(self, capacity: int) -> None:
        """Make the cache `capacity` positions long; what it holds stays."""
        self.ones: np.ndarray = np.ones(capacity, np.int64)  # the attention mask
        self.mask_pointer = self.ones.ctypes.data
        if not self.in_place:
            return
        from onnxruntime import OrtValue

        for name, (heads, size, dtype) in self.shapes.items():
            longer: np.ndarray = np.zeros((1, heads, capacity, size), dtype)
            if self.length:
                longer[:, :, : self.length] = self.cache[name].numpy()[:, :, : self.length]
            self.cache[name] = OrtValue.ortvalue_from_numpy(longer)
            self.binding.bind_ortvalue_input(name, self.cache[name])
            self.binding.bind_ortvalue_output(present(name), self.cache[name])

    def _bind_past(self, arrays: dict[str, np.ndarray]) -> None:
        from onnxruntime import OrtValue

        self.cache = {name: OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()}
        for name, value in self.cache.items():
            self.binding.bind_ortvalue_input(name, value)


def parts(n: int) -> list[tuple[int, int]]:
    """Parts of a prompt of n tokens. The last is not one token alone: its sums would be made in another order than a prompt's."""
    ends = [*range(PROMPT_BLOCK, n, PROMPT_BLOCK), n]
    if len(ends) > 1 and n - ends[-2] == 1:
        del ends[-2]
    return list(zip([0, *ends], ends))


def check_numbers(hidden: np.ndarray) -> None:
    """Raise CheckpointError where a state is not finite: one call, since a number that is none makes the sum none."""
    if not math.isfinite(hidden.sum()):
        raise CheckpointError("hidden states: NaN or infinity found, expected finite values; the model's weights are damaged: export the model again")


def present(past: str) -> str:
    """The output that belongs to an input of the cache."""
    return past.replace("past_key_values.", "present.")


def cache_shape(value: Any, settings: ExportSettings) -> tuple[int, int, type]:
    """Heads, size of a head and dtype of an input [batch, KV, past, head size] of the cache."""
    heads, size = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else settings.head_size
    if not isinstance(heads, int) or not isinstance(size, int) or value.type not in DTYPES:
        raise CheckpointError(
            f"body.onnx: the input {value.name} is {value.type} {value.shape}, expected float or float16 [batch, KV, past, head size], "
            f"KV and head size fixed; {AGAIN}"
        )
    return heads, size, DTYPES[value.type]
