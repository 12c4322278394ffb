"""What a server allows, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from flashhead_edge.errors import SettingsError


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    body_bytes: int = 1 << 20  # of a request; more is answered with 413
    header_bytes: int = 1 << 14  # of a request's first lines; more is answered with 400
    header_seconds: float = 10.0  # until they have all come: else the connection is closed
    body_seconds: float = 30.0  # until a request's body is there; later is answered with 408
    connections: int = 512  # open at once; more are answered with 503
    waiting: int = 64  # texts that wait for their turn; more are answered with 429
    at_once: int = 8  # texts in the engine, where it can hold several
    deadline: float = 600.0  # of a request from its arrival to its last byte
    unread_tokens: int = 4096  # that wait for a client's reader before its text is given up
    drain: float = 30.0  # that running texts have to end after SIGTERM

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise SettingsError(f"serve: {name} is {value}, expected more than 0; call again with another value")


LOOK = 1.0  # seconds between two looks at a connection
KEEP_ALIVE = 15  # seconds that a connection may be idle between requests
LINGER = 30.0  # seconds that a closed connection may take to hand over what was written
TOLD = 2.0  # seconds that a client has to read that the time to drain is over
LAST = 5.0  # seconds that the decode thread has for the step it is in
MOST_DROPPED = 16 << 20  # bytes of a body that is too large: read and dropped, for most clients look for an answer when they have sent all
LONG = 1 << 16  # bytes of a request whose prompt takes a tokenizer some time: such prompts queue by themselves
KEPT_GRAMMARS = 32  # compiled schemas
NO_LIMIT = 4096  # tokens of a text where neither the request nor the model says
MOST_CHOICES = 16  # of a request: OpenAI's n, times its prompts
MOST_STOPS = 16
MOST_DEPTH = 64  # of nested values in a request
