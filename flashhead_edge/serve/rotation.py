"""Whose turn it is: each host gets as many steps as another, within a host each user, within a user each text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Path = tuple[str, ...]  # host, user, text: the turn is shared out from left to right
K = TypeVar("K", bound=Path)


class Rotation:
    """Counts of turns by the paths' beginnings. Whoever comes starts level with those that are there: no debt, no savings."""

    def __init__(self) -> None:
        self.turns: dict[Path, int] = {}

    def next(self, paths: Iterable[K]) -> K:
        """The path whose turn it is, among some that are ready; the first of those that are level. It is counted, unless it is alone."""
        ready = list(paths)
        if len(ready) == 1:  # alone, turns are nobody's loss
            return ready[0]
        present = {path[:n] for path in ready for n in range(1, len(path) + 1)}
        for key in sorted(present - self.turns.keys(), key=len):
            beside = [self.turns[other] for other in present & self.turns.keys() if other[:-1] == key[:-1] and len(other) == len(key)]
            self.turns[key] = min(beside, default=0)
        best = min(ready, key=lambda path: [self.turns[path[:n]] for n in range(1, len(path) + 1)])
        self._count({best[:n] for n in range(1, len(best) + 1)})
        return best

    def along(self, path: Path, others: Iterable[Path]) -> None:
        """Count a turn of others that went along with `path`, which was counted: their beginnings that are not its own, once each."""
        own = {path[:n] for n in range(1, len(path) + 1)}
        self._count({other[:n] for other in others for n in range(1, len(other) + 1)} - own)

    def _count(self, beginnings: Iterable[Path]) -> None:
        for key in beginnings:
            self.turns[key] = self.turns.get(key, 0) + 1

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget all but the beginnings of these."""
        present = {path[:n] for path in paths for n in range(1, len(path) + 1)}
        self.turns = {key: turns for key, turns in self.turns.items() if key in present}
