"""What computes an exported model: the interface between the engine and a runtime."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from flashhead_edge.generation.protocols import BodySession
from flashhead_edge.head import Step
from flashhead_edge.jetson.folder import ExportSettings


class ExportedHead(Protocol):
    """The head of an exported folder: `head.Head` without its index, which is compiled into the model."""

    def step(self, hidden: np.ndarray) -> Step:
        """One step for hidden states [N, d] float32: a `Step` of numpy arrays."""
        ...

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Full-width raw logits [N, V] float32, every one finite."""
        ...

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        """Both from one pass of the stages."""
        ...

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Raw logits of tokens [M] int64 by the model's own rows, [N, M] float32."""
        ...


class Backend(Protocol):
    """A runtime with an exported folder open in it. Hidden states are numpy arrays, float32."""

    @property
    def settings(self) -> ExportSettings:
        """Of the body."""
        ...

    @property
    def head(self) -> ExportedHead: ...

    @property
    def about(self) -> dict[str, Any]:
        """Runtime, version, threads: what a measurement of it says."""
        ...

    @property
    def most_texts(self) -> int | None:
        """That it can be in the middle of at once; None: as many as there is memory for."""
        ...

    def body(self) -> BodySession:
        """The body at the start of a new text."""
        ...
