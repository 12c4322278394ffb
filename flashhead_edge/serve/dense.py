"""The dense head's text, token by token: what a person compares the fast head with, so it must be as quick as a dense head can be."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from flashhead_edge.decoding import choose
from flashhead_edge.generation.cache import PromptCache
from flashhead_edge.generation.decode import Run, Stream, one_by_one, start, to_numpy
from flashhead_edge.generation.protocols import Array, TextEngine
from flashhead_edge.jetson.onnxruntime_backend import OnnxRuntime
from flashhead_edge.jetson.plan import free_here
from flashhead_edge.serve.orders import Order
from flashhead_edge.serve.refusals import Refusal


@dataclass(eq=False)
class DenseHead:
    """Exact logits of all tokens.

    ONNX Runtime's exports read a dense head's rows by their ids, which takes several times as long as a product with a matrix. For them
    the rows are kept as one, in float32: what a runtime without a fast head reads.
    """

    engine: TextEngine
    rows: np.ndarray | None = None  # [d, V] float32
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self) -> None:
        """Make the matrix where one is needed; it takes seconds, so not in the decode thread.

        Raises:
            Refusal: there is too little memory for it.
        """
        if not isinstance(getattr(self.engine, "backend", None), OnnxRuntime):
            return
        with self.lock:
            if self.rows is not None:
                return
            size, free = 4 * self.engine.hidden_size * self.engine.vocab_size, free_here().size
            if free is not None and 3 * size > free:
                message = f"head: the dense head needs {3 * size >> 20} MiB to be made, expected them free and found {free >> 20}; use the fast head"
                raise Refusal(message, 503, param="head")
            one_hot = np.eye(self.engine.hidden_size, dtype=np.float32)
            self.rows = np.ascontiguousarray(to_numpy(self.engine.exact_logits(one_hot, np.arange(self.engine.vocab_size))))

    def logits(self, hidden: Array) -> np.ndarray:
        """Raw logits [1, V] of a state [1, d]."""
        if self.rows is not None:
            return np.asarray(hidden @ self.rows)
        return to_numpy(self.engine.exact_logits(hidden, np.arange(self.engine.vocab_size)))

    def stream(self, order: Order, cache: PromptCache) -> Stream:
        """As `generation.stream`, by the model's own rows, all of them at every step."""
        run, prompt, most, reason = start(self.engine, order.ids, order.max_tokens, order.sampling, (), order.stop, order.grammar, order.logprobs)
        return Stream(run, one_by_one(run, prompt, most, reason, cache, self._token))

    def _token(self, run: Run, hidden: Array) -> int:
        """The token after hidden state [1, d], chosen among all that may come."""
        mask, s = run.mask(), run.sampling
        run.head_bytes += run.summary.dense_bytes_per_step
        raw = self.logits(hidden)
        if run.alternatives is not None:
            run.full = raw
        if mask is None and s.greedy and not s.changes_logits:
            return int(raw[0].argmax())  # the first of the largest: the smaller id
        kept = np.arange(self.engine.vocab_size) if mask is None else np.flatnonzero(mask)
        return int(choose(kept[None], raw[:, kept], s, [run.chosen], run.prompt, run.output, self.engine.scale, self.engine.softcap)[0])
