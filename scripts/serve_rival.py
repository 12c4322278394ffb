"""Our server and another of OpenAI's API over the same model, in turns: what 1 client and 8 clients get of each.

    python scripts/serve_rival.py OUT -- python -m llama_cpp.server --model MODEL.gguf --n_threads 1 --n_ctx 4096 --interrupt_requests false --port {port}
    python scripts/serve_rival.py OUT -- llama-server -m MODEL.gguf -t 1 -np 8 -c 8192 --port {port}

OUT is what `flashhead serve` takes; what stands behind -- starts the other one, which listens on {port}. Both stay up while rounds go to
one and the other, so that a machine that slows down slows both; what is said of a round is the ratio of its tokens a second, with a
bootstrap interval over rounds. The prompts differ from round to round, so that nobody has them in a cache. One JSON document goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from serve_load import cpu_seconds, head, quantile, server, shown
from serve_overhead import interval

from flashhead_edge.serve.run import open_port

SUBJECTS = ("a lighthouse keeper", "two bakers", "a ship of glass", "the last train", "a garden in winter", "seven clocks", "an old map", "a lost violin")


async def text(port: int, prompt: str, tokens: int) -> list[float]:
    """When each piece of a streamed text came, in seconds from the request on."""
    content = json.dumps({
        "model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "stream": True,
    }).encode()  # fmt: skip
    began, times = time.perf_counter(), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(len(content)) + content)
    while line := await reader.readline():
        if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]) and choices[0]["delta"].get("content"):
            times.append(time.perf_counter() - began)
    writer.close()
    return times


async def round_of(port: int, count: int, tokens: int, number: int) -> dict[str, float]:
    """So many clients at once, a text each."""
    began = time.perf_counter()
    prompts = [f"Story {number}.{i}: write a long story about {SUBJECTS[i % len(SUBJECTS)]}." for i in range(count)]
    found = await asyncio.gather(*(text(port, prompt, tokens) for prompt in prompts))
    return shown(found, time.perf_counter() - began)


def wait_until_ready(port: int, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the other server did not start") from None
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rival", nargs="+", help="command of the other server, behind --")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with open_port("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    rows: dict[str, dict[str, list[Any]]] = {name: {"1": [], "8": []} for name in ("ours", "other")}
    with subprocess.Popen([part.replace("{port}", str(port)) for part in options.rival], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        try:
            wait_until_ready(port, other)
            with server(str(options.model), "--threads", str(options.threads)) as (ours, pid):
                at, pids = {"ours": ours, "other": port}, {"ours": pid, "other": other.pid}
                for number in range(-1, options.rounds):  # the first is not counted
                    for count in ("1", "8"):
                        for name in ("ours", "other") if number % 2 else ("other", "ours"):
                            before = cpu_seconds(pids[name])
                            row = asyncio.run(round_of(at[name], int(count), options.tokens, number))
                            row["cpu_ms_a_piece"] = 1e3 * (cpu_seconds(pids[name]) - before) / (int(count) * options.tokens)
                            if number >= 0:
                                rows[name][count].append(row)
        finally:
            other.terminate()
    found: dict[str, Any] = {}
    for count in ("1", "8"):
        mine, theirs = (rows[name][count] for name in ("ours", "other"))
        found[f"clients_{count}"] = {
            "tokens_a_second_ratio": interval([a["pieces_per_second"] / b["pieces_per_second"] for a, b in zip(mine, theirs)]),
            "cpu_ratio": interval([a["cpu_ms_a_piece"] / b["cpu_ms_a_piece"] for a, b in zip(mine, theirs)]),
            **{name: {key: quantile([row[key] for row in rows[name][count]], 0.5) for key in mine[0]} for name in ("ours", "other")},
        }
    print(json.dumps({**found, "rounds": options.rounds, "tokens": options.tokens, "threads": options.threads, "other": options.rival}, indent=2))


if __name__ == "__main__":
    main()
