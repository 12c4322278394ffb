"""Guesses at what comes next, from the text itself: where its last tokens stood before, what came after them. No torch.

Source: Saxena, Prompt lookup decoding, 2023; the longest match that there is, the latest place of it.
"""

from __future__ import annotations

LENGTHS = (4, 3, 2)  # tokens of a match, longest first


class Lookup:
    """A text with the places where its short runs of tokens last ended."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # where the text went on after a run

    def push(self, token: int) -> None:
        """Go on by a token; what it follows is a place from now on."""
        for n in LENGTHS:
            if len(self.text) >= n:
                self.after[tuple(self.text[-n:])] = len(self.text)
        self.text.append(token)

    def draft(self, longest: int) -> list[int]:
        """Up to `longest` tokens that may come next; none where the last tokens are new."""
        for n in LENGTHS:
            place = self.after.get(tuple(self.text[-n:])) if len(self.text) >= n else None
            if place is not None:
                return self.text[place : place + longest]
        return []
