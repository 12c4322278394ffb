"""Load and figures of `flashhead serve`: what many clients do to it, and what a client waits for.

    python scripts/serve_load.py figures MODEL     # time to first token, between tokens, 1 and 8 clients, beside the bare session
    python scripts/serve_load.py load MODEL --minutes 10   # clients that come and go, slow readers, malformed and oversized bodies
    python scripts/serve_load.py load CHECKPOINT --backend cuda --minutes 1

MODEL is what `flashhead serve` takes. A server is started for it and ended. One JSON document goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT = "Write a long story about a lighthouse keeper and the sea."


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[int, int]]:
    """Port and process id of a server."""
    command = [sys.executable, "-m", "flashhead_edge", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield int(address.rpartition(":")[2]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        if code:
            raise SystemExit(f"the server ended with {code}, expected 0")


def body(tokens: int, prompt: str = PROMPT, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, **more}).encode()


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n".encode()


async def stream(port: int, content: bytes) -> tuple[int, list[float], bool]:
    """Status, when each piece of text came (seconds from the request on), and whether the answer is whole: with its end, or an error."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(len(content)) + content)
        status = int((await reader.readline()).split()[1])
        times: list[float] = []
        whole = False
        while line := await reader.readline():
            if b'"content": "' in line and b'"role"' not in line:
                times.append(time.perf_counter() - began)
            whole |= b"[DONE]" in line or b'"error"' in line or b'"usage"' in line
        return status, times, whole
    finally:
        writer.close()


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def shown(times: list[list[float]], seconds: float) -> dict[str, float]:
    first, between = [t[0] for t in times], [b - a for t in times for a, b in zip(t, t[1:])]
    return {
        "ttft_ms_p50": 1e3 * quantile(first, 0.5), "ttft_ms_p99": 1e3 * quantile(first, 0.99),
        "inter_token_ms_p50": 1e3 * quantile(between, 0.5), "inter_token_ms_p99": 1e3 * quantile(between, 0.99),
        "pieces_per_second": sum(map(len, times)) / seconds,
    }  # fmt: skip


async def clients(port: int, count: int, rounds: int, tokens: int) -> dict[str, float]:
    """So many clients at once, each with so many texts one after the other."""

    async def one(number: int) -> list[list[float]]:
        return [(await stream(port, body(tokens, f"{number} {i}: {PROMPT}", stream=True, seed=1)))[1] for i in range(rounds)]

    began = time.perf_counter()
    found = await asyncio.gather(*(one(i) for i in range(count)))
    return shown([t for texts in found for t in texts], time.perf_counter() - began)


def how(options: argparse.Namespace) -> list[str]:
    """What computes, as options of `flashhead serve`."""
    return ["--backend", options.backend, *(["--threads", str(options.threads)] if options.backend in ("auto", "onnxruntime") else [])]


def bare(model: str, backend: str, threads: int, rounds: int, tokens: int) -> dict[str, float]:
    """The same texts without a server, in this process."""
    from flashhead_edge.generation import prompt_ids
    from flashhead_edge.generation import stream as decode
    from flashhead_edge.jetson import open_engine

    engine = open_engine(model, backend, threads)
    times, spent = [], 0.0
    for i in range(-1, rounds):  # the first is not counted
        spent = time.process_time() if i == 0 else spent
        ids, began, row = prompt_ids(engine, [{"role": "user", "content": f"0 {max(i, 0)}: {PROMPT}"}]), time.perf_counter(), []
        for token in decode(engine, ids, tokens):
            if token.text:
                row.append(time.perf_counter() - began)
        times.append(row)
    spent = time.process_time() - spent
    return {**shown(times[1:], sum(row[-1] for row in times[1:])), "cpu_ms_a_token": 1e3 * spent / (rounds * tokens)}


def bare_elsewhere(options: argparse.Namespace) -> dict[str, float]:
    """`bare` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "bare",
        options.model,
        "--backend",
        options.backend,
        "--threads",
        str(options.threads),
        "--tokens",
        str(options.tokens),
    ]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """Bare and served turn by turn, so that a machine that slows down slows both."""
    found: dict[str, list[Any]] = {"bare": [], "clients_1": [], "clients_8": []}
    with server(options.model, *how(options)) as (port, pid):
        asyncio.run(clients(port, 1, 1, 16))
        for _ in range(options.repeats):
            found["bare"].append(bare_elsewhere(options))
            before = cpu_seconds(pid)
            row = asyncio.run(clients(port, 1, 4, options.tokens))
            row["cpu_ms_a_token"] = 1e3 * (cpu_seconds(pid) - before) / (4 * options.tokens)
            found["clients_1"].append(row)
        found["clients_8"].append(asyncio.run(clients(port, 8, 2, options.tokens)))
    median = {name: {key: quantile([row[key] for row in rows], 0.5) for key in rows[0]} for name, rows in found.items()}
    overhead = median["clients_1"]["inter_token_ms_p50"] / median["bare"]["inter_token_ms_p50"] - 1
    host = median["clients_1"]["cpu_ms_a_token"] - median["bare"]["cpu_ms_a_token"]
    found_all = {"median": median, "overhead_inter_token": overhead, "host_cpu_ms_a_streamed_token": host}
    return {**found_all, "samples": found, "tokens": options.tokens, "threads": options.threads}


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def stranger(port: int, rng: random.Random, until: float, seen: Counter[str]) -> None:
    """One client of many kinds, one after the other."""
    while time.monotonic() < until:
        what = rng.choice(("text", "stream", "cancel", "cancel", "slow", "malformed", "oversized", "long head", "stopped body"))
        try:
            if what in ("text", "stream"):
                status, _, whole = await asyncio.wait_for(stream(port, body(rng.randint(1, 40), stream=what == "stream", user=rng.choice("abc"))), 120)
                seen[f"{what} {status}"] += 1
                seen["not whole"] += not whole
                if status == 429:
                    await asyncio.sleep(rng.random())
                continue
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if what == "cancel":
                    content = body(2000, stream=rng.random() < 0.5, user=rng.choice("abc"))
                    writer.write(head(len(content)) + content)
                    await asyncio.sleep(rng.random())
                elif what == "slow":
                    content = body(60, stream=True)
                    writer.write(head(len(content)) + content)
                    for _ in range(20):
                        await asyncio.wait_for(reader.read(1), 120)
                        await asyncio.sleep(0.1)
                elif what == "malformed":
                    content = bytes(rng.choices(b'{}[]":,\\0aeu\xff ', k=rng.randint(0, 300)))
                    writer.write(head(len(content)) + content)
                    status = int((await asyncio.wait_for(reader.readline(), 60)).split()[1])
                    seen["malformed not refused"] += status != 400
                elif what == "oversized":
                    writer.write(head(5 << 20) + b" " * (5 << 20))
                    status = int((await asyncio.wait_for(reader.readline(), 60)).split()[1])
                    seen["oversized not refused"] += status != 413
                elif what == "long head":
                    writer.write(head(2)[:-2] + b"X: " + b"a" * rng.choice((17_000, 60_000)) + b"\r\n\r\n{}")
                    status = int((await asyncio.wait_for(reader.readline(), 60)).split()[1])
                    seen["long head not refused"] += status not in (400, 431)
                else:
                    writer.write(head(1000) + b"{")
                    await asyncio.sleep(rng.random())
                seen[what] += 1
            finally:
                writer.close()
        except (ConnectionError, asyncio.IncompleteReadError, IndexError):
            seen[f"{what}: connection lost"] += 1
        except TimeoutError:
            seen[f"{what}: stuck"] += 1


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return text


async def cancelled(port: int, count: int) -> None:
    """So many requests that are given up, 16 at a time."""
    content = body(2000, stream=True)

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(len(content)) + content)
        await asyncio.sleep(0.05)
        writer.close()

    for _ in range(0, count, 16):
        await asyncio.gather(*(one() for _ in range(16)))


async def idle(port: int) -> bool:
    """Whether nothing is left to do, within half a minute."""
    for _ in range(300):
        text = await get(port, "/metrics")
        if "flashhead_texts_active 0.0" in text and "flashhead_texts_waiting 0.0" in text:
            return True
        await asyncio.sleep(0.1)
    return False


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Strangers for some minutes, then 1,000 requests that are given up: what came back, and memory."""
    seen: Counter[str] = Counter()

    async def run(port: int, pid: int) -> dict[str, Any]:
        async def strangers(seconds: float) -> None:
            until = time.monotonic() + seconds
            await asyncio.gather(*(stranger(port, random.Random(n), until, seen) for n in range(options.clients)))

        await strangers(min(15.0, 30 * options.minutes))  # caches and arenas grow to their size
        quiet = [await idle(port)]
        sizes = [memory(pid)]
        await strangers(60 * options.minutes)
        quiet.append(await idle(port))
        sizes.append(memory(pid))
        await cancelled(port, 1000)
        quiet.append(await idle(port))
        sizes.append(memory(pid))
        whole = (await stream(port, body(5, stream=True)))[2]
        return {"memory_mib": [round(s / 2**20, 1) for s in sizes], "idle_after": quiet, "serves_after": whole}

    with server(options.model, *how(options)) as (port, pid):
        found = asyncio.run(run(port, pid))
    return {**found, "seen": dict(sorted(seen.items())), "minutes": options.minutes, "clients": options.clients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figures", "load", "bare"))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--backend", default="auto", choices=("auto", "onnxruntime", "tensorrt", "cuda"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    if options.what == "bare":
        found: Any = bare(options.model, options.backend, options.threads, 4, options.tokens)
    else:
        found = {"figures": figures, "load": load}[options.what](options)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
