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


PAUSE = 0.001  # seconds that a reader rests before it asks to be woken


class Mailbox:
    """Of one request, however many texts it has. Made in the event loop that reads it.

    To wake a loop takes a system call and a change of threads, 70 us and more, which is a share of a GPU's step. So who takes pieces that
    come quickly rests before the next: what is faster than that is found without being called. Where they come slowly, as from a CPU, the
    rest would be one more turn of the loop for each.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.event = asyncio.Event()
        self.pieces: deque[Piece] = deque()
        self.awake = True  # the reader looks by itself
        self.quick, self.taken = True, self.loop.time()  # whether the last pieces came within two rests, and when they were taken

    def put(self, piece: Piece) -> None:
        """From any thread."""
        self.pieces.append(piece)
        if not self.awake:
            self.awake = True
            try:
                self.loop.call_soon_threadsafe(self.event.set)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self.pieces.clear()

    async def take(self) -> list[Piece]:
        """All that has come, at least one."""
        if not self.pieces and self.quick:
            await asyncio.sleep(PAUSE)
        while not self.pieces:
            self.awake = False
            if self.pieces:  # came between the two looks, when nobody was to be woken
                self.awake = True
                break
            await self.event.wait()
            self.event.clear()
        now = self.loop.time()
        self.quick, self.taken = now - self.taken < 2 * PAUSE, now
        found = []
        while self.pieces:
            found.append(self.pieces.popleft())
        return found
