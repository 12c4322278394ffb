"""From the decode thread to a request's handler: what is put never waits for who reads."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from flashhead_edge.generation import Summary, Token
from flashhead_edge.serve.refusals import Refusal


@dataclass(frozen=True, eq=False)
class Piece:
    """One token of a text, or how it failed."""

    index: int  # of the text in its request
    token: Token | None
    ended: str  # why the text ends with it, as `generation.Summary.stopped` says; empty while it goes on
    summary: Summary | None = None  # with the last one
    error: Refusal | None = None


class Mailbox:
    """Of one request, however many texts it has. Made in the event loop that reads it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.event = asyncio.Event()
        self.pieces: deque[Piece] = deque()
        self.woken = False

    def put(self, piece: Piece) -> None:
        """From any thread. The loop is woken once for all that it has not taken: a wake-up costs as much as a small step of a model."""
        self.pieces.append(piece)
        if not self.woken:
            self.woken = True
            try:
                self.loop.call_soon_threadsafe(self.event.set)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self.pieces.clear()

    async def take(self) -> list[Piece]:
        """All that has come, at least one."""
        while not self.pieces:
            await self.event.wait()
            self.event.clear()
            self.woken = False
        found = []
        while self.pieces:
            found.append(self.pieces.popleft())
        return found
