"""What stands before the routes: who may come in, how much they may send, and a line in the log for each."""

from __future__ import annotations

import hmac
import logging
import time
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashhead_edge.serve.limits import MOST_DROPPED, Limits
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.refusals import Refusal, error_document

OPEN = ("/", "/health", "/ready", "/openapi.json")  # without a key: they say nothing of texts
LOCAL = ("localhost", "127.0.0.1", "[::1]")
LOG = logging.getLogger("flashhead_edge.serve")


class Guard:
    """ASGI middleware: keys, names of the host, counts and the log."""

    def __init__(self, app: ASGIApp, key: str | None, loopback: bool, metrics: Metrics, limits: Limits) -> None:
        self.app, self.key, self.loopback, self.metrics, self.limits = app, key, loopback, metrics, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        scope.setdefault("state", {})

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, counted)
            else:
                await JSONResponse(error_document(refusal), refusal.status, refusal.headers)(scope, receive, counted)
        except TimeoutError:
            LOG.warning("answer not read in time", extra={"fields": {"path": scope["path"][:80]}})
            raise
        except ClientDisconnect:
            pass
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status or 499)).inc()
            fields = {"route": route, "method": scope["method"][:16], "status": status or 499, "client": (scope.get("client") or ["?"])[0]}
            LOG.info("request", extra={"fields": {**fields, "seconds": round(time.monotonic() - began, 4), **scope["state"].get("model_call", {})}})

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.limits.header_bytes:
            found = f"head: the request's first lines have {size} bytes, expected at most {self.limits.header_bytes}; send less"
            return Refusal(found, 431, "head_too_large", headers={"Connection": "close"})
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]
        if self.loopback and name.lower() not in LOCAL:
            return Refusal("host: the request names another host, expected localhost or 127.0.0.1; use this machine's own name", 403, "wrong_host")
        if self.key is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key.encode()):
                found = "another key" if given else "no key"
                return Refusal(
                    f"key: the request has {found}, expected the server's, as Authorization: Bearer KEY; set the client's api_key",
                    401, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        return None


async def read_body(request: Request, limits: Limits) -> bytes:
    """A request's body of JSON.

    Raises:
        Refusal: it is too large (413), too slow (408), or not said to be JSON (415: what a page of another site can send unasked is
            never JSON).
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("content-type: it is not application/json, expected that; set the header", 415, headers={"Connection": "close"})
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal("content-encoding: the body is coded, expected plain JSON; leave the header out", 415, headers={"Connection": "close"})
    length = request.headers.get("content-length", "0")
    parts: list[bytes] = []
    said, size = int(length) if length.isascii() and length.isdigit() else 0, 0
    try:
        if said <= MOST_DROPPED:
            with anyio.fail_after(limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= limits.body_bytes and said <= limits.body_bytes:
                        parts.append(part)
                    if size > MOST_DROPPED:
                        break
    except TimeoutError as error:
        message = f"body: it was not here after {limits.body_seconds:g} s, expected it sooner; send it at once"
        raise Refusal(message, 408, headers={"Connection": "close"}) from error
    size = max(size, said)
    if size > limits.body_bytes:
        found = f"body: it has {size} bytes or more, expected at most {limits.body_bytes}; send less"
        raise Refusal(found, 413, "body_too_large", headers={"Connection": "close"})
    return b"".join(parts)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    found = getattr(record, "fields", {})
    return found if isinstance(found, dict) else {}
