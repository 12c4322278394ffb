"""A server's decode thread without a server."""

from __future__ import annotations

import asyncio
import time

from flashhead_edge.serve.limits import Limits
from flashhead_edge.serve.mailbox import Mailbox
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.texts import Decoder, Text


def made_at_once(engine, orders, at_once=8):
    """The tokens of some texts that one decoder makes, and how each ended."""
    decoder = Decoder(engine, Limits(), Metrics("tiny"), at_once)

    async def run():
        box, late = Mailbox(), time.monotonic() + 60
        decoder.thread.start()
        decoder.submit([Text(one, ("a", "", str(i)), box, i, late) for i, one in enumerate(orders)])
        tokens, ended = [[] for _ in orders], [None] * len(orders)
        while not all(ended):
            for piece in await box.take():
                if piece.token is not None:
                    tokens[piece.index].append(piece.token.id)
                ended[piece.index] = (piece.error.code or str(piece.error)) if piece.error else piece.ended or None
        return tokens, ended

    found = asyncio.run(run())
    decoder.close()
    decoder.thread.join(10)
    return found
