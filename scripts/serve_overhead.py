"""What a server costs beside the bare session, in pairs: the same text bare and served, turn by turn over one engine in one process.

    python scripts/serve_overhead.py MODEL                              # ONNX Runtime: 40 pairs, one thread
    python scripts/serve_overhead.py CHECKPOINT --backend cuda --pairs 20 --tokens 128
    python scripts/serve_overhead.py Llama-3.2-1B --backend cuda --made       # random weights in the shape of a real model

MODEL is what `flashhead serve` takes; with --made a name of flashhead_edge.bench.cuda.models, whose texts are numbers.
The client is a process of its own, which waits while the bare session runs. A machine that slows
down slows both halves of a pair, so what is said is the median of the pairs' ratios, with a bootstrap interval. Then 1 and 8 clients.
Where others use the cores too, processor time says more than a clock: of the decode thread, which is what a client waits for, and of the
whole process, whose other part runs beside it.
One JSON document goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import PROMPT, body, clients, quantile, stream

from flashhead_edge.generation import prompt_ids
from flashhead_edge.generation import stream as decode
from flashhead_edge.jetson import open_engine
from flashhead_edge.serve.limits import Limits
from flashhead_edge.serve.run import model_facts, open_port, serve

DRAWS = 10_000  # of the bootstrap
CONTEXT = 1024  # positions of a made model


class Numbers:
    """A tokenizer for made models: a token's text is its number, and a text has a token for each character."""

    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 1000 for c in text]}

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, *, clean_up_tokenization_spaces: bool | None = None) -> str:
        return "".join(f"{int(t)} " for t in token_ids)

    def apply_chat_template(self, conversation: Any, *, tools: Any = None, tokenize: bool = True, add_generation_prompt: bool = True) -> Any:
        text = "".join(message["content"] for message in conversation)
        return self(text)["input_ids"] if tokenize else text


def made_engine(name: str, texts: int) -> Any:
    """An engine over a made model on this machine's GPU."""
    from flashhead_edge.bench.cuda import made_program, models
    from flashhead_edge.jetson import ExportedEngine
    from flashhead_edge.jetson.cuda_backend import open_program
    from flashhead_edge.jetson.driver import device_facts
    from flashhead_edge.program.head import Device

    facts, (model, vocab, group) = device_facts(), models()[name]
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    program = made_program(Path(tempfile.mkdtemp()) / name, model, vocab, device, group=group, context=CONTEXT, batch=texts)
    return ExportedEngine(open_program(program, dict(program.settings), "made"), Numbers(), frozenset())


def client() -> None:
    """A line is a job; its answer is a line: arrival times of pieces of one text, or the figures of some clients."""
    for line in sys.stdin:
        job = json.loads(line)
        if job["clients"]:
            found: Any = asyncio.run(clients(job["port"], job["clients"], job["rounds"], job["tokens"]))
        else:
            found = asyncio.run(stream(job["port"], body(job["tokens"], stream=True, seed=1)))[1]
        print(json.dumps(found), flush=True)


def interval(ratios: list[float]) -> dict[str, float]:
    """The median, and the middle 95 % of medians of samples drawn from them."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios))), 1)
    return {"median": float(np.median(ratios)), "low": float(np.quantile(draws, 0.025)), "high": float(np.quantile(draws, 0.975))}


def bare(engine: Any, ids: list[int], tokens: int) -> list[float]:
    """When each piece of text came, in seconds from the call on."""
    began, times = time.perf_counter(), []
    for token in decode(engine, ids, tokens):
        if token.text:
            times.append(time.perf_counter() - began)
    return times


def row(times: list[float], spent: float, decoding: float, tokens: int) -> dict[str, float]:
    return {"first": times[0], "between": (times[-1] - times[0]) / (len(times) - 1), "cpu": spent / tokens, "decoding": decoding / tokens}


def thread_seconds(thread: threading.Thread) -> float:
    """Processor time that a thread has taken."""
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def measured(engine: Any, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs, then clients; in a thread beside the server's loop and its decode thread, which has nothing to do while a bare text is made."""
    ids, tokens = prompt_ids(engine, [{"role": "user", "content": PROMPT}]), options.tokens
    decoder = next(thread for thread in threading.enumerate() if thread.name == "decode")
    command = [sys.executable, __file__, "client", "--client"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(count: int = 0) -> Any:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"port": port, "tokens": tokens, "clients": count, "rounds": options.rounds}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        def both(number: int) -> dict[str, dict[str, float]]:
            found = {}
            for name in ("bare", "served") if number % 2 else ("served", "bare"):
                thread = threading.current_thread() if name == "bare" else decoder
                before, decoding = time.process_time(), thread_seconds(thread)
                times = bare(engine, ids, tokens) if name == "bare" else ask()
                found[name] = row(times, time.process_time() - before, thread_seconds(thread) - decoding, tokens)
            return found

        both(0), both(1)  # what is made at the first text is not counted
        pairs = [both(i) for i in range(options.pairs)]
        several = {f"clients_{count}": ask(count) for count in (1, 8)}
        process.stdin.close()
    median = {name: {key: quantile([pair[name][key] for pair in pairs], 0.5) for key in ("first", "between", "cpu", "decoding")} for name in ("bare", "served")}
    return {
        "overhead_between_tokens": interval([pair["served"]["between"] / pair["bare"]["between"] - 1 for pair in pairs]),
        "overhead_first_token": interval([pair["served"]["first"] / pair["bare"]["first"] - 1 for pair in pairs]),
        "overhead_decode_thread": interval([pair["served"]["decoding"] / pair["bare"]["decoding"] - 1 for pair in pairs]),
        "overhead_processor_time": interval([pair["served"]["cpu"] / pair["bare"]["cpu"] - 1 for pair in pairs]),
        "host_us_a_streamed_token": interval([1e6 * (pair["served"]["cpu"] - pair["bare"]["cpu"]) for pair in pairs]),
        "ms": {name: {key: 1e3 * value for key, value in values.items()} for name, values in median.items()},
        "bare_tokens_per_second": 1 / median["bare"]["between"],
        **several,
        "pairs": len(pairs), "tokens": tokens,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--made", action="store_true", help="MODEL is the name of a made model, for the cuda backend")
    parser.add_argument("--backend", default="auto", choices=("auto", "onnxruntime", "tensorrt", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="texts of each of the 1 and 8 clients")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client()
        return
    limits = Limits()
    if options.made:
        engine = made_engine(str(options.model), limits.at_once)
    else:
        engine = open_engine(options.model, options.backend, options.threads, texts=limits.at_once)
    about, found = model_facts(engine, "m", options.model), {}
    listening = open_port("127.0.0.1", 0)

    def measure() -> None:
        try:
            found.update(measured(engine, listening.getsockname()[1], options))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=measure)
    serve(engine, "m", listening, key=None, limits=limits, about=about, ready=thread.start)
    thread.join()
    print(json.dumps({**found, "about": about}, indent=2))


if __name__ == "__main__":
    main()
