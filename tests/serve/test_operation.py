"""A server among strangers: limits, keys, clients that go away, signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
LONG = {**ASK, "max_tokens": 8000, "logit_bias": {"255": -100}}  # seconds of work: 255 is what would end it


def send(address, body, path="/v1/chat/completions", kind="application/json", **headers):
    """Status, headers and the JSON document of an answer."""
    request = urllib.request.Request(address + path, body, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def raw(address):
    host, _, port = address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), 30)


def post(body, extra=""):
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "body: it is no JSON"),
        (b"{", 400, "body: it is no JSON"),
        (b"[]", 400, "body: it is an empty list, expected a JSON object"),
        (b'{"messages": \xff}', 400, "body: it is no JSON"),
        (b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "nested more than 64 deep"),
        (b"[" * 200_000, 400, "body: it is no JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "a", "tool_calls": 3}]}', 400, "tool_calls: found 3, expected a list"),
        (b'{"messages": "x"}', 400, "messages: found a string, expected a list"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', 400, "role: it is none of"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "temperature: found"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stream_options": 1}', 400, "stream_options: found 1, expected an object"),
        (b" " * ((1 << 20) + 1), 413, "body: it has 1048577 bytes or more, expected at most 1048576"),
    ],
    ids=range(14),
)
def test_bad_bodies_get_a_sentence_and_harm_nobody(server, body, status, sentence):
    found, _, document = send(server.address, body)
    assert (found, set(document), set(document["error"])) == (status, {"error"}, {"message", "type", "param", "code"})
    assert sentence in document["error"]["message"]
    assert send(server.address, json.dumps({**ASK, "max_tokens": 2}).encode())[0] == 200


def test_other_doors_are_closed(server):
    good = json.dumps({**ASK, "max_tokens": 2}).encode()
    assert send(server.address, good, kind="text/plain")[0] == 415  # what a page of another site can send unasked
    assert send(server.address, good, Host="evil.example")[0] == 403
    status, _, document = send(server.address, good, path="/v2/chat")
    assert (status, document["error"]["code"]) == (404, "no_route")
    with urllib.request.urlopen(server.address + "/openapi.json") as answer:
        assert "/v1/chat/completions" in json.load(answer)["paths"]
    for path in ("/health", "/ready"):
        with urllib.request.urlopen(server.address + path) as answer:
            assert answer.status == 200


def test_large_heads_and_endless_bodies_are_cut_off(server):
    with raw(server.address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000)
        assert b" 400 " in connection.recv(1000).split(b"\r\n")[0]
    for sent in (17_000, 60_000):  # the whole head in one piece
        with pytest.raises(urllib.error.HTTPError, match="431") as refused:
            urllib.request.urlopen(urllib.request.Request(f"{server.address}/health", headers={"X": "a" * sent}), timeout=30)
        assert "expected at most 16384" in json.loads(refused.value.read())["error"]["message"]
    with raw(server.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with pytest.raises((ConnectionError, TimeoutError)):  # the server answers and closes, whatever else comes
            connection.sendall(part * 2000)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_many_clients_at_once_do_not_make_many_threads(start_server):
    """Each would keep a stack and an arena of memory."""
    body = json.dumps({**ASK, "max_tokens": 3}).encode()
    with start_server("--waiting", "100") as server:
        before = len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))
        with ThreadPoolExecutor(40) as pool:
            found = list(pool.map(lambda _: send(server.address, body)[0], range(80)))
        assert found == [200] * 80
        assert len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) <= before + 4  # two for prompts, one for long ones, one for figures


def test_who_goes_away_takes_the_text_along(server):
    before = server.metric('flashhead_texts_total{ended="cancelled"}')
    for stream in (b"true", b"false"):
        body = json.dumps(LONG).encode()[:-1] + b', "stream": ' + stream + b"}"
        with raw(server.address) as connection:
            connection.sendall(post(body))
            server.until(lambda: server.metric("flashhead_texts_active") == 1, "the text has not begun")
        server.until(lambda: server.metric("flashhead_texts_active") == 0, "the text goes on without its reader")
    assert server.metric('flashhead_texts_total{ended="cancelled"}') == before + 2


def test_who_does_not_read_is_given_up_and_harms_nobody(server):
    """A stream of 20 MB, more than any buffer on the way: the text ends when 4,096 tokens wait, though the connection stands."""
    before = server.metric('flashhead_texts_total{ended="reader too slow"}')
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
        connection.sendall(post(json.dumps({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()))
        server.until(lambda: server.metric('flashhead_texts_total{ended="reader too slow"}') == before + 1, "the text goes on", 60)
        assert server.metric("flashhead_texts_active") == 0
        assert send(server.address, json.dumps({**ASK, "max_tokens": 2}).encode())[0] == 200


def test_full_queue_is_answered_with_429_and_when_to_come_back(start_server):
    with start_server("--at-once", "1", "--waiting", "1") as server, ExitStack() as open_:
        for state in ("active", "waiting"):
            connection = open_.enter_context(raw(server.address))
            connection.sendall(post(json.dumps(LONG).encode()))
            server.until(lambda name=f"flashhead_texts_{state}": server.metric(name) == 1, "not taken in")
        with pytest.raises(openai.RateLimitError, match=r"queue: 1 texts wait and 1 are being made, expected room for 1 more; send it again in \d+ s") as found:
            server.client().chat.completions.create(**ASK, max_tokens=1)
        assert 1 <= int(found.value.response.headers["Retry-After"]) <= 60


def test_deadline_ends_a_text_with_an_error(start_server):
    with start_server("--deadline", "1") as server:
        with pytest.raises(openai.InternalServerError, match="text: it was not done after 1 s, expected a shorter one") as found:
            server.client().chat.completions.create(**LONG)
        assert found.value.status_code == 504
        with pytest.raises(openai.APIError, match="text: it was not done after 1 s"):
            list(server.client().chat.completions.create(**LONG, stream=True))
        assert server.client().chat.completions.create(**ASK, max_tokens=3).choices[0].finish_reason == "length"


def test_key_is_asked_for(start_server):
    with start_server(key="sesame") as server:
        assert server.client("sesame").chat.completions.create(**ASK, max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.AuthenticationError, match="key: the request has another key, expected the server's"):
            server.client("open").models.list()
        for path, status in (("/metrics", 401), ("/live", 401), ("/health", 200), ("/", 200)):
            try:
                with urllib.request.urlopen(server.address + path) as answer:
                    found = answer.status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, path


def test_sigterm_lets_texts_end_and_exits_0(start_server):
    with start_server() as server:
        pieces = server.client().chat.completions.create(**ASK, max_tokens=3000, stream=True, stream_options={"include_usage": True})
        next(iter(pieces))
        server.process.send_signal(signal.SIGTERM)
        rest = list(pieces)
        assert rest[-1].usage.completion_tokens == 3000
        assert server.process.wait(20) == 0
        log = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    assert [line["event"] for line in log] == ["serving", "request", "stopped"]
    assert log[1] | {"tokens": 3000, "status": 200, "route": "/v1/chat/completions"} == log[1]


def test_texts_that_do_not_end_in_the_drain_are_given_up(start_server):
    with start_server("--drain", "1") as server:
        with raw(server.address) as connection:
            connection.sendall(post(json.dumps({**LONG, "n": 8}).encode()))
            server.until(lambda: server.metric("flashhead_texts_active") == 8, "not taken in")
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            assert time.monotonic() - began < 15  # the texts would take minutes


def test_who_is_left_after_the_drain_is_told(start_server):
    """In a stream by an event, else by an answer: neither ends in the middle."""
    with start_server("--drain", "1") as server, raw(server.address) as streamed, raw(server.address) as whole:
        streamed.sendall(post(json.dumps({**LONG, "stream": True}).encode()))
        whole.sendall(post(json.dumps(LONG).encode()))
        server.until(lambda: server.metric("flashhead_texts_active") == 2, "not taken in")
        assert b" 200 " in streamed.recv(1000).split(b"\r\n")[0]
        server.process.send_signal(signal.SIGTERM)
        answers = [b"".join(iter(lambda connection=connection: connection.recv(1 << 16), b"")) for connection in (streamed, whole)]
        assert server.process.wait(20) == 0
    assert answers[0].endswith(b"\n\n\r\n0\r\n\r\n") and b"the time for texts to end is over" in answers[0].split(b"data: ")[-1]
    head, _, document = answers[1].partition(b"\r\n\r\n")
    assert b" 503 " in head.split(b"\r\n")[0] and json.loads(document)["error"]["code"] == "shutting_down"


def test_second_signal_does_not_wait_and_clients_are_told(start_server):
    with start_server() as server, raw(server.address) as connection:
        connection.sendall(post(json.dumps(LONG).encode()))
        server.until(lambda: server.metric("flashhead_texts_active") == 1, "not taken in")
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: refuses(server.address), "the door is open")
        server.process.send_signal(signal.SIGINT)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert b" 503 " in answer.split(b"\r\n")[0] and b"shutting_down" in answer
        assert server.process.wait(20) == 130
        assert "Traceback" not in server.log and '"stopped"' in server.log


def refuses(address):
    try:
        raw(address).close()
    except OSError:
        return True
    return False


def test_who_has_all_places_but_one_shuts_nobody_out(start_server):
    """Long texts of one user, in and waiting: another user's text is made beside them."""
    with start_server("--at-once", "2") as server, ExitStack() as held:
        for _ in range(4):
            connection = held.enter_context(raw(server.address))
            connection.sendall(post(json.dumps({**LONG, "user": "a"}).encode()))
        server.until(lambda: server.metric("flashhead_texts_active") == 2 and server.metric("flashhead_texts_waiting") == 2, "not taken in")
        status, _, found = send(server.address, json.dumps({**ASK, "max_tokens": 3, "user": "b"}).encode())
        assert status == 200 and found["usage"]["completion_tokens"] == 3
        assert server.metric("flashhead_texts_active") == 2 and server.metric("flashhead_texts_waiting") == 2


def serve_fails(*arguments, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-m", "flashhead_edge", "serve", *map(str, arguments)], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )
    return result.returncode, result.stderr.strip().splitlines()[-1]


def test_starts_that_cannot_be_are_said_in_a_sentence(model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = serve_fails(model, "--port", port)
    assert (code, line) == (1, f"flashhead: serve: port {port} of 127.0.0.1 is in use, expected a free one; stop the other program or give another --port")
    code, line = serve_fails(model, "--host", "0.0.0.0", "--port", "0")
    assert code == 2 and "lets other machines in, and there is no API key: set FLASHHEAD_API_KEY" in line
    code, line = serve_fails(model, "--host", "no such host", FLASHHEAD_API_KEY="k")
    assert code == 2 and "is no address" in line
    (tmp_path / "key").write_bytes(bytes(range(128, 228)))
    code, line = serve_fails(model, "--api-key-file", tmp_path / "key")
    assert code == 2 and "the API key is empty or not of plain letters" in line
    code, line = serve_fails(model, "--name", " ")
    assert code == 2 and "--name is empty" in line
    code, line = serve_fails(tmp_path / "key")
    assert code == 2 and "key is a file, expected a folder" in line
    code, line = serve_fails(tmp_path, "--backend", "onnxruntime")
    assert code == 2 and str(tmp_path) in line
