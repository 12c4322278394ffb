"""The figures of the CUDA backend on this machine's GPU, part by part; numpy alone. Each part writes what it has as it goes.

python scripts/cuda_figures.py OUT PART [SHAPE ...]

OUT is a folder; PART one of: steps, prefill, idle, drafts, cold, memory, soak, all. A part is a file OUT/PART.json. `all` runs each as a process of its own,
the soak beside nothing, so that one that fails leaves the others. Shapes are made models (flashhead_edge.bench.cuda.models); none is all.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import CACHED, made_program, models, rewind, step_times
from flashhead_edge.jetson.cuda_memory import device_bytes
from flashhead_edge.jetson.cuda_session import decode, open_model, run_draft, step_graph
from flashhead_edge.jetson.driver import Device, Timer, device_facts
from flashhead_edge.program import head
from flashhead_edge.program.file import read_program

PARTS = ("steps", "prefill", "idle", "drafts", "memory", "cold", "soak")
BATCHES = (1, 4, 8)
SOAK_TOKENS = 200_000
PROMPTS = (512, 2048)
WIDE, LONG = (max(BATCHES), 1024), (1, max(PROMPTS) + 64)  # batch and context of programs
SMALL = "SmolLM2-135M"


class Record:
    """A part's records, in its file after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, list[dict[str, Any]]()

    def add(self, **record: Any) -> None:
        self.records.append(record)
        self.path.write_text(json.dumps({"device": device_facts().name, "records": self.records}, indent=1) + "\n", encoding="utf-8")
        print(" ".join(f"{k}={v}" for k, v in record.items()), flush=True)


@contextmanager
def opened(name: str, batch: int = 1, context: int = 1024) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A made model that is open, and what opening it took of the device beyond a context."""
    program = read_program(made(name, batch, context))
    with Device() as device:
        before, began = device.memory()[0], time.perf_counter()
        m = open_model(program)
        try:
            for drawn in (False, True):
                step_graph(m, 1, drawn)
            m.stream.wait()
            took = {"opening_seconds": round(time.perf_counter() - began, 2), "planned": device_bytes(m.plan.size), "real": before - device.memory()[0]}
            yield m, took | {"weights": m.plan.weight_bytes, "candidates": m.head.candidates}
        finally:
            m.close()


def made(name: str, batch: int = 1, context: int = 1024) -> Path:
    """The folder of a made program, which later parts find again."""
    facts, (model, vocab, group) = device_facts(), models()[name]
    folder = Path(tempfile.gettempdir()) / "flashhead-figures" / f"{name}-{batch}-{context}-{facts.multiprocessors}"
    if not folder.exists():
        device = head.Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
        made_program(folder, model, vocab, device, group=group, context=context, batch=batch)
    return folder


def middle(times: np.ndarray) -> float:
    return round(float(np.median(times)), 2)


def spread(times: np.ndarray) -> list[float]:
    return [round(float(times.min()), 2), round(float(times.max()), 2)]


def steps(names: list[str], record: Record) -> None:
    """`flashhead bench decode` over the shapes: ours, the same step with dense heads and without a head, in turns; its document, records included."""
    from flashhead_edge.bench.as_records import with_records
    from flashhead_edge.bench.decode import measured

    command = shlex.join(["flashhead", "bench", "decode", *(word for name in names for word in ("--shape", name)), "--json"])
    begun = datetime.datetime.now(datetime.timezone.utc)
    for name in names:
        free = device_facts().free_bytes
        with opened(name, *WIDE) as (m, _):
            found = measured(m, name, False, BATCHES, command, lambda message, share: print(message, flush=True), free)
        record.records += [r | {"group": models()[name][2]} for r in found]
        record.path.write_text(json.dumps(with_records("decode", {"records": record.records}, command, begun), indent=1) + "\n", encoding="utf-8")


def prefill(names: list[str], record: Record) -> None:
    """A prompt to its first token: milliseconds on the host's clock, and on the device's."""
    for name in names:
        with opened(name, *LONG) as (m, _), Timer() as timer:
            for tokens in PROMPTS:
                prompt, found, device = [1 + at % 1000 for at in range(tokens)], [], []
                for _ in range(6):
                    timer.mark(m.stream, 0)
                    began = time.perf_counter()
                    next(decode(m, [prompt], 1))
                    found.append(1e3 * (time.perf_counter() - began))
                    timer.mark(m.stream, 1)
                    device.append(timer.microseconds() / 1e3)
                record.add(
                    model=name, prompt=tokens, ms=middle(np.array(found[1:])), spread=spread(np.array(found[1:])), stream_ms=middle(np.array(device[1:]))
                )


def idle(names: list[str], record: Record) -> None:
    """Wall clock of texts through `stream`, which reads a token while the next step runs, beside the same steps replayed one behind the other."""
    from flashhead_edge.generation import stream
    from flashhead_edge.jetson import ExportedEngine
    from flashhead_edge.jetson.cuda_backend import Cuda, export_settings

    tokens = 384
    for name in names:
        with opened(name) as (m, _), Timer() as timer:
            engine = ExportedEngine(Cuda(m, export_settings(m.program, dict(m.program.settings), "made")), None, frozenset())
            prompt = [1 + at % 1000 for at in range(CACHED)]
            walls = []
            for _ in range(4):
                run = stream(engine, prompt, tokens)
                assert sum(1 for _ in run) == tokens
                walls.append(1e6 / run.summary.tokens_per_second)
            graph, busy = step_graph(m, 1, False), []
            for _ in range(4):
                rewind(m, CACHED + 1)
                timer.mark(m.stream, 0)
                for _ in range(tokens - 1):
                    graph.launch(m.stream)
                timer.mark(m.stream, 1)
                busy.append(timer.microseconds() / (tokens - 1))
            gpu, wall = middle(np.array(busy[1:])), middle(np.array(walls[1:]))
            record.add(
                model=name, cached=CACHED, tokens=tokens, gpu_us=gpu, wall_us=wall, idle=round(1 - gpu / wall, 4), tokens_per_second=round(1e6 / wall, 1)
            )


def drafts(names: list[str], record: Record) -> None:
    """A pass over some tokens of a text and the head behind each, as speculation has it, beside a step."""
    for name in names:
        with opened(name, *WIDE) as (m, _), Timer() as timer:
            one = middle(step_times(m, 1))
            passes = {}
            for tokens in range(2, m.head.rows + 1):
                m.prompts.array.view(np.int32)[:tokens] = np.arange(1, tokens + 1)
                m.prompts.array.view(np.int32)[m.program.context] = CACHED
                m.stream.to_device(m.block("prompt"), m.prompts.pointer, 4 * tokens)
                m.stream.to_device(m.block("prompt_lengths"), m.prompts.pointer + 4 * m.program.context, 4)
                run_draft(m, tokens)
                m.stream.wait()
                found = []
                for _ in range(5):
                    timer.mark(m.stream, 0)
                    for _ in range(50):
                        m.drafts[tokens].launch(m.stream)
                    timer.mark(m.stream, 1)
                    found.append(timer.microseconds() / 50)
                passes[tokens] = middle(np.array(found))
            record.add(model=name, step_us=one, passes_us=passes, of_a_step={n: round(us / one, 2) for n, us in passes.items()})


def memory(names: list[str], record: Record) -> None:
    """What opening takes beyond a context beside the plan, for some contexts and batches; a closed session gives all back."""
    with Device() as device:
        for name in names:
            for batch, context in (WIDE, LONG):
                free = device.memory()[0]
                with opened(name, batch, context) as (m, took):
                    list(decode(m, [[1, 2, 3]], 8))
                    real = free - device.memory()[0]
                left = free - device.memory()[0]
                found = {"planned": took["planned"], "real": real, "ratio": round(took["planned"] / max(1, real), 4)}
                record.add(model=name, batch=batch, context=context, **found, left_after_close=left)


def cold(names: list[str], record: Record) -> None:
    """From a process's start to the first token of a kept program, and the same with an empty cache of kernels before it."""
    for name in names:
        folder = made(name, *WIDE)
        with tempfile.TemporaryDirectory(prefix="flashhead-figures-") as work:
            environment = os.environ | {"XDG_CACHE_HOME": f"{work}/cache"}
            for run in ("empty cache of kernels", "kept", "kept", "kept"):
                began = time.perf_counter()
                done = subprocess.run([sys.executable, __file__, str(folder), "first"], env=environment, capture_output=True, text=True, check=False)
                seconds = round(time.perf_counter() - began, 3)
                said = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-500:]}
                record.add(model=name, cache=run, process_seconds=seconds, **said)


def first(folder: Path) -> None:
    """In a process of its own: the first token of a kept program."""
    began = time.perf_counter()
    from flashhead_edge.jetson.cuda_folder import open_folder

    imported = time.perf_counter()
    with open_folder(folder) as backend:
        ready = time.perf_counter()
        token = int(next(backend.decode([[1, 2, 3, 4, 5, 6, 7, 8]], 1))[0])
        end = time.perf_counter()
        anonymous = anonymous_bytes()
    seconds = {"imports": imported - began, "open": ready - imported, "token": end - ready}
    print(json.dumps({"token": token, "anonymous_bytes": anonymous, "parts": {k: round(v, 3) for k, v in seconds.items()}}))


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) << 10


def soak(names: list[str], record: Record) -> None:
    """200,000 tokens of a small model through `decode`, with the memory of host and device as it goes."""
    name = names[0] if len(names) == 1 else SMALL
    with opened(name, *WIDE) as (m, _), Device() as device:
        made, began = 0, time.perf_counter()
        prompt = [1, 2, 3, 4, 5, 6, 7, 8]
        each = m.program.context - len(prompt)
        at = 0
        while made < SOAK_TOKENS:
            made += sum(1 for _ in decode(m, [prompt], each))
            if made >= at:
                record.add(model=name, tokens=made, seconds=round(time.perf_counter() - began, 1), anonymous=anonymous_bytes(), device_free=device.memory()[0])
                at += 20_000
        record.add(model=name, tokens=made, seconds=round(time.perf_counter() - began, 1), anonymous=anonymous_bytes(), device_free=device.memory()[0])


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, part, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(models())
    if part == "first":
        first(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    if part == "all":
        for each in PARTS:
            began = time.perf_counter()
            code = subprocess.run([sys.executable, __file__, str(out), each, *sys.argv[3:]], check=False).returncode
            print(f"{each}: exit {code}, {time.perf_counter() - began:.0f} s", flush=True)
        return
    run: Callable[[list[str], Record], None] = globals()[part] if part in PARTS else sys.exit(__doc__)
    run(names, Record(out / f"{part}.json"))


if __name__ == "__main__":
    main()
