"""The routes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import anyio
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flashhead_edge.generation.protocols import TextEngine
from flashhead_edge.serve.answers import Answer
from flashhead_edge.serve.board import live_figures, read_gauges
from flashhead_edge.serve.guard import Guard, read_body
from flashhead_edge.serve.limits import LONG, Limits
from flashhead_edge.serve.mailbox import Mailbox, Piece
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.openapi import api_document
from flashhead_edge.serve.orders import Grammars, orders
from flashhead_edge.serve.refusals import Refusal, error_document
from flashhead_edge.serve.requests import Wanted, read_json, wanted
from flashhead_edge.serve.texts import Decoder, Text
from flashhead_edge.serve.tools import forced_schema, form_of, knows_tools

Endpoint = Callable[[Request], Awaitable[Response]]
EVERY = 1.0  # seconds between two looks of the page


@dataclass(eq=False)
class Service:
    """What the routes share."""

    engine: TextEngine
    name: str  # of the model, as clients see it
    about: dict[str, Any]  # what the page shows of the model
    limits: Limits
    key: str | None
    loopback: bool
    metrics: Metrics
    decoder: Decoder
    grammars: Grammars = field(default_factory=Grammars)
    started: int = field(default_factory=lambda: int(time.time()))
    # Threads at work beside the loop: few, since each keeps arenas of its own once it has been busy. Long prompts queue by themselves.
    prompts: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))
    long_prompts: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    gauges: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))


def create_app(service: Service) -> Guard:
    """The application over a service whose decode thread runs, or will before the first request."""
    post: dict[str, Endpoint] = {
        "/v1/chat/completions": partial(complete, service, True),
        "/v1/completions": partial(complete, service, False),
        "/v1/embeddings": refuse_embeddings,
    }
    get: dict[str, Endpoint] = {
        "/": page,
        "/health": partial(health, service),
        "/ready": partial(ready, service),
        "/metrics": partial(metrics, service),
        "/v1/models": partial(models, service),
        "/v1/models/{name:path}": partial(one_model, service),
        "/live": partial(live, service),
        "/openapi.json": partial(openapi, service),
    }
    routes = [Route(path, endpoint, methods=[method]) for method, table in (("POST", post), ("GET", get)) for path, endpoint in table.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: no_route, Refusal: refused})
    return Guard(app, service.key, service.loopback, service.metrics, service.limits)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error_document(error), error.status, error.headers)


async def no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path[:80]}"
    what = "no such route, expected one of /openapi.json; correct the address"
    if error.status_code == 405:
        what = f"this route for another method, expected {(error.headers or {}).get('Allow', 'another')}; use that"
    refusal = Refusal(f"{found}: this server has {what}", error.status_code, "no_route")
    return JSONResponse(error_document(refusal), error.status_code, dict(error.headers or {}))


async def complete(service: Service, chat: bool, request: Request) -> Response:
    """Chat completions and completions."""
    began = time.monotonic()
    content = await read_body(request, service.limits)
    asked = wanted(read_json(content), chat=chat)
    workers = service.long_prompts if len(content) > LONG else service.prompts
    form = None
    if asked.tools:
        form = form_of(service.engine.tokenizer.chat_template if service.engine.tokenizer else "")
        if asked.schema is not None:
            raise Refusal("response_format: found together with tools, expected one of them; leave the other out", param="response_format")
        if asked.tools_forced:
            form = "bare"
    if asked.dense:
        await run_sync(service.decoder.dense.prepare, limiter=service.long_prompts)
    schema = forced_schema(asked.tools, asked.tool_names) if asked.tools_forced else None
    made = await run_sync(orders, service.engine, asked, service.grammars, schema, limiter=workers)
    prompt_tokens = sum(len(order.ids) for order in made[:: asked.choices])
    answer = Answer(asked, service.name, service.engine.tokenizer, prompt_tokens, form)
    mailbox, host = Mailbox(), request.client.host if request.client else ""
    texts = [Text(order, (host, asked.user, f"{answer.id}.{i}"), mailbox, i, began + service.limits.deadline, began) for i, order in enumerate(made)]
    service.decoder.submit(texts)
    request.state.model_call = {"prompt_tokens": prompt_tokens}
    return Delivery(service, asked, answer, mailbox, texts, request)


class Delivery(Response):
    """An answer as its texts are made. Who goes away takes them along; who reads too slowly is left."""

    def __init__(self, service: Service, asked: Wanted, answer: Answer, mailbox: Mailbox, texts: list[Text], request: Request) -> None:
        self.service, self.asked, self.answer, self.mailbox, self.texts, self.request = service, asked, answer, mailbox, texts, request
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rest = self.texts[0].deadline + 5 - time.monotonic()  # the decode thread says first that the deadline is over
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                with anyio.move_on_after(rest) as late:
                    await (self._stream(send) if self.asked.stream else self._whole(scope, receive, send))
                group.cancel_scope.cancel()
            if late.cancelled_caught:
                raise TimeoutError("the answer was not read in time")  # the connection is closed
        finally:
            self.service.decoder.cancel([t for t in self.texts if self.answer.texts[t.index].finish is None])
            self.request.state.model_call["tokens"] = self.answer.usage()["completion_tokens"]

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None = None
        while response is None and not self.answer.done:
            for piece in await self.mailbox.take():
                if piece.error is not None:
                    response = JSONResponse(error_document(piece.error), http_status(piece.error), piece.error.headers)
                    break
                self.answer.push(piece)
        await (response or JSONResponse(self.answer.document()))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """Events; headers go with the first token, so that what fails before it is an error of HTTP."""
        pieces = await self.mailbox.take()
        if pieces[0].error is not None:
            error = pieces[0].error
            body = json.dumps(error_document(error)).encode()
            await self._start(send, http_status(error), b"application/json")
            await send({"type": "http.response.body", "body": body})
            return
        await self._start(send, 200, b"text/event-stream; charset=utf-8")
        opening = self.answer.opening()
        while True:
            events, failed = self._events(pieces)
            await send({"type": "http.response.body", "body": b"".join([*opening, *events]), "more_body": True})
            opening = []
            if failed or self.answer.done:
                break
            pieces = await self.mailbox.take()
        await send({"type": "http.response.body", "body": b"".join([] if failed else self.answer.closing())})

    def _events(self, pieces: list[Piece]) -> tuple[list[bytes], bool]:
        events: list[bytes] = []
        for piece in pieces:
            if piece.error is not None:
                return [*events, f"data: {json.dumps(error_document(piece.error), ensure_ascii=False)}\n\n".encode()], True
            events += self.answer.push(piece)
        return events, False

    async def _start(self, send: Send, status: int, kind: bytes) -> None:
        headers = [(b"content-type", kind), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": status, "headers": headers})


def http_status(refusal: Refusal) -> int:
    """499 is a word for our own log: no client reads it."""
    return 503 if refusal.status == 499 else refusal.status


async def refuse_embeddings(request: Request) -> Response:
    raise Refusal("embeddings: this server makes texts, expected a model of embeddings elsewhere; use chat completions", 400, "no_embeddings")


async def page(request: Request) -> Response:
    return HTMLResponse(
        files("flashhead_edge.serve").joinpath("page.html").read_text(encoding="utf-8"),
        headers={
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
            "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
            "Cache-Control": "no-cache",
        },
    )


async def health(service: Service, request: Request) -> Response:
    alive = service.decoder.alive or service.decoder.closing
    return JSONResponse({"status": "ok" if alive else "the decode thread has ended"}, 200 if alive else 500)


async def ready(service: Service, request: Request) -> Response:
    open_ = service.decoder.alive and not service.decoder.closing
    return JSONResponse({"status": "ready" if open_ else "shutting down"}, 200 if open_ else 503)


async def metrics(service: Service, request: Request) -> Response:
    await run_sync(read_gauges, service.metrics, limiter=service.gauges)
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def model_form(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "flashhead-edge"}


async def models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model_form(service)]})


async def one_model(service: Service, request: Request) -> Response:
    if request.path_params["name"] != service.name:
        raise Refusal(f"model: this server has no model of that name, expected {service.name!r}; correct it", 404, "model_not_found", "model")
    return JSONResponse(model_form(service))


async def openapi(service: Service, request: Request) -> Response:
    engine, tokenizer = service.engine, service.engine.tokenizer
    return JSONResponse(api_document(engine.vocab_size, engine.embedding_rows, tokenizer is not None and knows_tools(tokenizer.chat_template)))


async def live(service: Service, request: Request) -> Response:
    """Figures for the page, once a second, until the client goes or the server goes down."""

    async def events() -> AsyncIterator[str]:
        yield f"event: about\ndata: {json.dumps(service.about)}\n\n"
        while not service.decoder.closing:
            figures = await run_sync(live_figures, service.metrics, limiter=service.gauges)
            yield f"data: {json.dumps(figures)}\n\n"
            await anyio.sleep(EVERY)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
