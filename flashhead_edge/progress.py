"""How long-running functions say where they are: one callable, so that libraries never write to a terminal."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]  # what is being done; share done, 0 to 1, or None where it is not known


def silent(message: str, share: float | None = None) -> None:
    """The progress of a caller that does not listen."""
