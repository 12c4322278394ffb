"""The process: a port, uvicorn, signals, and the log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.generation import prompt_ids, stream
from flashhead_edge.generation.protocols import TextEngine
from flashhead_edge.serve.app import Service, create_app
from flashhead_edge.serve.guard import fields_of
from flashhead_edge.serve.limits import KEEP_ALIVE, LAST, LINGER, LOOK, TOLD, Limits
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.texts import Decoder

SWITCH = 0.00005  # seconds after which a thread gives way: who is woken by a token takes the lock from who makes the next, for up to that time
LOG = logging.getLogger("flashhead_edge.serve")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_port(host: str, port: int) -> socket.socket:
    """Bind before a model is loaded: a port that is taken is said at once.

    Raises:
        SettingsError: the address is not this machine's, or not an address.
        EngineError: the port is in use, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"serve: host {host!r} is no address, expected one of this machine such as 127.0.0.1; give another --host") from error
    found = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        where = f"serve: port {port} of {host}"
        if error.errno == errno.EADDRINUSE:
            raise EngineError(f"{where} is in use, expected a free one; stop the other program or give another --port") from error
        if error.errno == errno.EACCES:
            raise EngineError(f"{where} is not allowed, expected one from 1024 on; give another --port") from error
        raise SettingsError(f"{where} cannot be opened ({error.strerror}), expected an address of this machine; give another --host") from error
    return found


class JsonLines(logging.Formatter):
    """One JSON document a line."""

    def format(self, record: logging.LogRecord) -> str:
        found = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage(), **fields_of(record)}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


@contextlib.contextmanager
def logs() -> Iterator[None]:
    """Our log and uvicorn's, as JSON lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name in ("flashhead_edge.serve", "uvicorn")]
    kept = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    LOG.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, kept):
            logger.removeHandler(handler)
            logger.level, logger.propagate = level, propagate


def watched(limits: Limits) -> type[H11Protocol]:
    """uvicorn's connections, looked at once a second: who sends a request's head too slowly, or takes too long over what is left, goes."""

    class Watched(H11Protocol):
        idle = closing = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.look = self.loop.call_later(LOOK, self.watch)

        def connection_lost(self, exc: Exception | None) -> None:
            self.look.cancel()
            super().connection_lost(exc)

        def watch(self) -> None:
            between = self.cycle is None or self.cycle.response_complete
            self.idle = self.idle + LOOK if between else 0.0
            self.closing = self.closing + LOOK if self.transport.is_closing() else 0.0
            if self.closing > LINGER:
                self.transport.abort()
            elif self.idle > max(limits.header_seconds, KEEP_ALIVE if self.cycle is not None else 0):
                self.transport.close()
            self.look = self.loop.call_later(LOOK, self.watch)

    return Watched


class Server(uvicorn.Server):
    """uvicorn, which ends by itself after SIGTERM, and tells the decode thread at once."""

    def __init__(self, config: uvicorn.Config, decoder: Decoder) -> None:
        super().__init__(config)
        self.decoder = decoder
        self.signals: list[int] = []
        self.hurried = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        kept = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals.append(sig)
        self.hurried = self.should_exit  # the second signal does not wait for texts
        self.should_exit = True
        self.decoder.closing = True  # no lock here: a handler may interrupt who holds it


def serve(engine: TextEngine, name: str, port: socket.socket, *, key: str | None, limits: Limits, about: dict[str, Any], ready: Callable[[], None]) -> int:
    """Serve until a signal: which one it was.

    Args:
        ready: called once requests are taken.
    """
    metrics = Metrics(name)
    decoder = Decoder(engine, limits, metrics, *texts_at_once(engine, limits.at_once))
    service = Service(engine, name, about, limits, key, is_loopback(port.getsockname()[0]), metrics, decoder)
    config = uvicorn.Config(
        create_app(service), http=watched(limits), ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
        limit_concurrency=limits.connections, h11_max_incomplete_event_size=limits.header_bytes, timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(limits.drain + 2 * TOLD),
    )  # fmt: skip
    server = Server(config, decoder)
    sys.setswitchinterval(SWITCH)
    for _ in stream(engine, prompt_ids(engine, "Hello", chat=False), 2, Sampling(temperature=1.0)):
        pass  # what an engine opens and makes at its first text, no client waits for
    decoder.thread.start()

    async def main() -> None:
        task = asyncio.ensure_future(server.serve([port]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        ready()
        while not (server.should_exit or task.done()):
            await asyncio.sleep(0.1)
        late = time.monotonic() + limits.drain
        while not (task.done() or server.hurried or time.monotonic() > late):
            await asyncio.wait([task], timeout=0.1)
        if not task.done():
            decoder.end_all()
            await asyncio.wait([task], timeout=TOLD)
            server.force_exit = True
        await task

    with logs():
        LOG.info("serving", extra={"fields": {"model": name, "address": port.getsockname()[:2]}})
        began = time.monotonic()
        asyncio.run(main())
        decoder.close()
        decoder.end_all()
        decoder.thread.join(LAST)
        LOG.info("stopped", extra={"fields": {"seconds": round(time.monotonic() - began, 1), "signals": [signal.Signals(s).name for s in server.signals]}})
    return server.signals[0] if server.signals else 0


def texts_at_once(engine: TextEngine, wanted: int) -> tuple[int, int]:
    """How many texts an engine can be in the middle of, and how many of them are beside the wanted ones, for newcomers: one, where it has no limit."""
    most = getattr(getattr(engine, "backend", None), "most_texts", None)
    if most is None:
        return (wanted + 1, 1) if wanted > 1 else (1, 0)
    return min(wanted, most), 0


def model_facts(engine: TextEngine, name: str, folder: Path) -> dict[str, Any]:
    """What the page says of a model: its size, what computes, and what its head promises where the folder says so."""
    backend: Any = getattr(engine, "backend", None)
    found = dict(backend.about) if backend is not None and hasattr(backend, "about") else {}
    sizes = {"vocab_size": engine.vocab_size, "hidden_size": engine.hidden_size, "context_length": engine.context_length}
    return {"model": name, **sizes, **found, "contract": contract(folder)}


def contract(folder: Path) -> dict[str, Any] | None:
    """The agreement that calibration found on text held out, None where none is written down."""
    path = folder / "config.json"
    head = read_json(path).get("flash_head") if path.is_file() else None
    summary = head.get("summary") if isinstance(head, dict) else None
    names = {
        "agreement": "top1_agreement", "interval": "top1_agreement_interval", "target": "target_agreement", "positions": "positions", "bytes": "bytes_per_step",
        "dense_bytes": "dense_bytes_per_step",
    }  # fmt: skip
    if not isinstance(summary, dict) or any(summary.get(key) is None for key in names.values()):
        return None
    return {name: summary[key] for name, key in names.items()}
