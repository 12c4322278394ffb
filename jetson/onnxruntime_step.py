"""A head's step for one state in ONNX Runtime, as decoding takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.head import Step
from flashhead_edge.jetson.onnxruntime_sessions import failed, runtime_errors

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class OneState:
    """A head's session with all that it reads and writes bound once, but for the candidates, whose number differs from step to step.

    A step comes after a body that has pushed Python's own code out of the caches, where every call that is not made counts: of a step of
    670 us this saved 20. One caller at a time.
    """

    def __init__(self, session: InferenceSession) -> None:
        width = session.get_inputs()[0].shape[1]
        counts = next(o for o in session.get_outputs() if o.name == "counts").shape[1]
        self.session = session
        self.binding: Any = session.io_binding()
        self.hidden: np.ndarray = np.zeros((1, width), np.float32)
        self.token, self.counts, self.capped = np.zeros(1, np.int64), np.zeros((1, counts), np.int64), np.zeros(1, np.bool_)
        self.binding.bind_input("hidden_states", "cpu", 0, np.float32, self.hidden.shape, self.hidden.ctypes.data)
        for name, array in (("token", self.token), ("counts", self.counts), ("capped", self.capped)):
            self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, hidden: np.ndarray) -> None:
        """A step for a state [1, d] or [d]: its results lie in the bound arrays, and the candidates in the binding."""
        self.hidden[:] = hidden
        self.binding.bind_output("candidate_ids")  # anew: as wide as its candidates
        self.binding.bind_output("candidate_logits")
        try:
            self.session.run_with_iobinding(self.binding)
        except runtime_errors() as error:
            raise failed("head", error) from error

    def step(self, hidden: np.ndarray) -> Step:
        """The same as a `Step` of arrays that are the caller's to keep."""
        self.run(hidden)
        ids, logits = (value.numpy() for value in self.binding.get_outputs()[3:])  # in the order in which they were first bound
        return Step(self.token.copy(), ids, logits, self.counts.copy(), self.capped.copy())
