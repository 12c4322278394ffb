"""A cache whose positions are forgotten by lowering a number: what bodies that keep one share."""

from __future__ import annotations


class CutByLength:
    """Part of a `BodySession`: what lies behind `length` is written again before anybody reads it."""

    can_cut = True
    length: int  # positions that are filled

    def cut(self, tokens: int) -> None:
        """Forget the last `tokens` positions."""
        self.length -= tokens

    def snapshot(self) -> int:
        """The length says all."""
        return self.length

    def restore(self, kept: int) -> None:
        self.length = kept
