"""A server's figures in the monitor: from the metrics that `flashhead serve` gives, and what is said where none come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flashhead_edge.errors import SettingsError
from flashhead_edge.jetson.board_monitor import looks
from flashhead_edge.jetson.board_server import Counts, check_address, read_counts, since
from flashhead_edge.report.board import look_table

pytest.importorskip("prometheus_client")
from flashhead_edge.serve.metrics import Metrics

BOARDS = Path(__file__).parent / "boards"


class Served:
    """An address at which /metrics is what a server's `Metrics` say, or `body`."""

    def __init__(self) -> None:
        self.metrics, self.body, self.status = Metrics("model"), None, 200
        self.seen: list[str | None] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.seen.append(self.headers["Authorization"])
                self.send_response(served.status if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(served.metrics.exposition() if served.body is None else served.body)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    thread = threading.Thread(target=found.http.serve_forever, daemon=True)
    thread.start()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_counts_are_those_of_the_server(served: Served) -> None:
    m = served.metrics
    m.queue(3, 2)
    for seconds in (0.25, 0.5):
        m.first(seconds, 10)
    for _ in range(7):
        m.step(0)
    unread: dict[str, str] = {}
    found = read_counts(served.address, "secret", unread)
    assert found is not None and unread == {} and served.seen == ["Bearer secret"]
    assert (found.tokens, found.firsts, found.first_seconds, found.active, found.waiting) == (7, 2, 0.75, 2, 3)
    read_counts(served.address, None, unread)
    assert served.seen[1] is None


def test_figures_are_of_what_lies_between_two_looks() -> None:
    before, now = Counts(10.0, 100, 4, 2.0, 1, 0), Counts(12.0, 300, 6, 2.5, 2, 5)
    assert since(before, now, 40.0) == {
        "texts_active": 2, "texts_waiting": 5, "tokens": 300, "tokens_per_second": 100.0, "seconds_to_first_token": 0.25, "joules_per_token": 0.2,
    }  # fmt: skip
    idle = since(now, now, 40.0)
    assert idle["tokens_per_second"] is None is idle["seconds_to_first_token"] and idle["joules_per_token"] is None
    for other in (None, now):  # the first look; a server that was started again and counts from nothing
        began = since(other, before, 40.0)
        assert (began["tokens"], began["tokens_per_second"], began["joules_per_token"]) == (100, None, None)
    assert since(before, now, None)["joules_per_token"] is None


def test_monitor_shows_it_beside_the_board(served: Served) -> None:
    stream = looks(BOARDS / "orin-nano", interval=0.05, server=served.address)
    first = next(stream)
    assert first["server"]["tokens_per_second"] is None
    for _ in range(5):
        served.metrics.step(0)
    served.metrics.first(0.125, 3)
    second = next(stream)
    assert second["server"]["tokens"] == 5 and second["server"]["tokens_per_second"] > 0 and second["server"]["seconds_to_first_token"] == 0.125
    drawn = second["joules"] - first["joules"]
    assert second["server"]["joules_per_token"] == pytest.approx(drawn / 5)  # the board's rails over those tokens
    table = look_table(second)
    cells = dict(zip(*(map(str, column.cells) for column in table.columns)))
    assert "tokens a second, the first after 0.125 s, " in cells["server"] and "J a token" in cells["server"]
    assert next(looks(BOARDS / "orin-nano", interval=0.05, once=True, server=served.address))["server"]["tokens_per_second"] == 0
    assert next(looks(BOARDS / "orin-nano", once=True))["server"] is None


@pytest.mark.parametrize(("status", "body", "said"), [(401, b"", "Unauthorized"), (200, b"hello", "not flashhead serve's"), (200, b"\xff\0", "not flashhead")])
def test_answer_that_is_none_is_said(served: Served, status: int, body: bytes, said: str) -> None:
    served.status, served.body = status, body
    document = next(looks(BOARDS / "orin-nano", interval=0.01, server=served.address))
    assert document["server"] is None and said in document["unread"][served.address]
    served.status, served.body = 200, None
    assert read_counts(served.address, None, {}) is not None


def test_server_that_is_not_there_is_said_and_the_board_is_shown(served: Served) -> None:
    served.http.shutdown()  # a socket closed while its thread still waits at it takes the connection and resets it
    served.http.server_close()
    document = next(looks(BOARDS / "orin-nano", interval=0.01, server=served.address))
    assert document["power"] is not None and "refused" in document["unread"][served.address]


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://a", "http://a:none", "", "http://a:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="is no address, expected one such as http://127.0.0.1:8000"):
        check_address(url)
    assert check_address("http://[::1]:8000/v1") == "http://[::1]:8000"
