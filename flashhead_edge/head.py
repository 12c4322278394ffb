"""The `Head` protocol: what every backend (torch, CUDA, ONNX Runtime, TensorRT) implements, and nothing else knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flashhead_edge.index import HeadIndex

Array = Any  # numpy.ndarray or torch.Tensor: a backend returns its own kind, callers that need numpy convert


@dataclass(frozen=True, eq=False)
class Step:
    """What one decode step of N rows found. Logits are raw: before the model's own scale and soft-cap."""

    token: Array  # [N] int64, the greedy token: largest exact logit, the smaller id on ties
    ids: Array  # [N, C] int64, tokens scored exactly, ascending, then -1
    logits: Array  # [N, C] float32, their exact logits, -inf where ids is -1
    counts: Array  # [N, 2 + stages] int64: clusters opened, slots scored by each code, rows scored exactly
    capped: Array  # [N] bool, a cap cut off at least one item that lay within its margin


@runtime_checkable
class Head(Protocol):
    """One head on one device."""

    @property
    def index(self) -> HeadIndex: ...

    def step(self, hidden: Array) -> Step:
        """One step for hidden states [N, d], any float dtype, after the final norm."""
        ...

    def logits(self, hidden: Array) -> Array:
        """Full-width raw logits [N, V] float32, every one finite: exact for the rows that the step scored exactly."""
        ...

    def step_with_logits(self, hidden: Array) -> tuple[Step, Array]:
        """Both from one pass of the stages."""
        ...
