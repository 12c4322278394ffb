"""All benches that this machine can run, one after the other, each in a process of its own, into one folder of records.

A process each, since a bench may fill the GPU or die with it, and so that an interruption costs one task. What is done is not done again:
a task's file is there, whole, or it is not (`flashhead bench suite OUT` once more goes on where it stopped).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge import __version__
from flashhead_edge.bench.provenance import commit
from flashhead_edge.cases import SHAPES
from flashhead_edge.errors import DeviceError, EngineError, FlashHeadError, SettingsError
from flashhead_edge.progress import Progress, silent
from flashhead_edge.records.folder import KEY, read_records
from flashhead_edge.records.form import VERSION

STATE = ".suite.json"  # hidden, so that it is no file of records
FLASHHEAD = (sys.executable, "-m", "flashhead_edge")  # the command line, with this Python
REPEAT_S = 15.0  # after which the time left is said anew
OWN_PROGRESS = re.compile(r"^\[ *\d+ s\] *(\d+ %)? *")  # what a child's plain lines begin with
QUICK = "Llama-3.2-1B"  # the shape of a quick run
ONNX_SHAPES = ("Gemma-3-270M", "Qwen3-0.6B", "Llama-3.2-1B")  # bench.onnx.MODEL_SHAPES, which a board without torch cannot import; the first is the quickest


@dataclass(frozen=True)
class Inputs:
    """What the user gave beside the folder; None leaves the tasks out that need it."""

    checkpoint: Path | None = None
    text: Path | None = None
    gguf: Path | None = None
    asked: tuple[str, ...] = ()  # tasks of lm-evaluation-harness, as `bench quality --task` takes them
    quick: bool = False


@dataclass(frozen=True)
class Task:
    """One call of `flashhead`, and the seconds that it took where it was tried: what the time left is first judged by."""

    name: str  # of its file, without .json
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[Callable[[], str | None], ...]  # each says in one sentence what is missing, or None


@dataclass(frozen=True)
class Outcome:
    """What became of a task: `done`, `kept` (from before), `skipped` or `failed`, and why."""

    task: str
    what: str
    why: str | None
    records: int
    seconds: float


def run_suite(out: Path, inputs: Inputs, progress: Progress = silent, said: Callable[[str], object] = lambda sentence: None) -> list[Outcome]:
    """Run every task that this machine can, and write `OUT/TASK.json` of each.

    Args:
        said: called with a sentence for each task that is skipped, kept or failed, as it happens.
    Raises:
        SettingsError: `out` holds a suite of another commit or machine, or other inputs. FlashHeadError: it cannot be written.
    """
    if (why := module("jsonschema", "report")()) is not None:
        raise SettingsError(f"bench suite: {why}")
    tasks = plan(inputs)
    _begin(out, inputs)
    reasons = {task.name: reason(task) for task in tasks}
    outcomes = []
    able = [task for task in tasks if reasons[task.name] is None]
    for task in tasks:
        if (why := reasons[task.name]) is not None:
            outcomes.append(Outcome(task.name, "skipped", why, 0, 0.0))
    for why in dict.fromkeys(o.why for o in outcomes):
        said(f"skipped {', '.join(o.task for o in outcomes if o.why == why)}: {why}")
    pace, spent = 1.0, 0.0  # of this machine, beside the one where the tasks were tried
    guessed = 0.0
    for i, task in enumerate(able):
        path = out / f"{task.name}.json"
        if path.is_file():
            count, why = _count(path)
            if why is None:
                said(f"kept {task.name}: {count} records from before")
                outcomes.append(Outcome(task.name, "kept", None, count, 0.0))
                continue
            said(f"{task.name}: its file is damaged ({why}); it is measured again")
        left = [t for t in able[i:] if not (out / f"{t.name}.json").is_file() or t is task]
        begun = time.monotonic()

        def show(message: str, task: Task = task, left: Sequence[Task] = left, begun: float = begun, i: int = i, pace: float = pace) -> None:
            took = time.monotonic() - begun
            ahead = sum(t.seconds for t in left[1:]) * pace + max(task.seconds * pace - took, 0.1 * took)  # a task that is late is not over
            progress(f"{task.name} ({i + 1} of {len(able)}, about {minutes(ahead)} left): {message}", i / len(able))

        why = _run(task, path, show)
        took = time.monotonic() - begun
        spent, guessed = spent + took, guessed + task.seconds
        pace = spent / guessed
        count, unread = (0, why) if why is not None else _count(path)
        why = why or unread
        if why is not None:
            said(f"failed {task.name}: {why}")
        outcomes.append(Outcome(task.name, "done" if why is None else "failed", why, count, took))
    return outcomes


def minutes(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 60 else f"{whole // 60} h {whole % 60} min"


def plan(inputs: Inputs) -> list[Task]:
    """All tasks, whether this machine can run them or not; a task a shape, so that an interruption costs little."""
    from flashhead_edge.bench.cuda import models
    from flashhead_edge.bench.tensorrt import SHAPES as TENSORRT_SHAPES
    from flashhead_edge.bench.vllm import CONFIGS

    quick = inputs.quick
    one = ("--batch", "1") if quick else ()
    rounds = ("--rounds", "2", "--threads", "1") if quick else ()
    tasks = []
    real = inputs.checkpoint is not None and inputs.text is not None
    given = None if real else "it needs a checkpoint and a text: --checkpoint FOLDER --text FILE"
    checkpoint, text = str(inputs.checkpoint), str(inputs.text)
    needs = (lambda: given, module("torch", "torch"))
    positions = ("--positions", "500", "--no-rivals") if quick else ()
    tasks.append(Task("evaluate", ("evaluate", checkpoint, "--text", text, *positions), 60 if quick else 900, needs))
    few = ("--positions", "500", "--prompts", "2") if quick else ()
    tasks.append(Task("quality-text", ("bench", "quality", checkpoint, "--text", text, *few), 60 if quick else 600, needs))
    for name in inputs.asked:
        limit = ("--limit", "8") if quick else ()
        arguments = ("bench", "quality", checkpoint, "--task", name, *limit)
        tasks.append(Task(f"quality-{_file_name(name)}", arguments, 120 if quick else 1800, (*needs, module("lm_eval", "quality"))))
    for name in (QUICK,) if quick else SHAPES:
        tasks.append(Task(f"head-{name}", ("bench", "head", "--shape", name, *one), 40 if quick else 90, (module("torch", "torch"), gpu, torch_gpu)))
    tasks.append(Task("head-checkpoint", ("bench", "head", checkpoint, "--text", text, *one), 60, (lambda: given, module("torch", "torch"), gpu, torch_gpu)))
    for name in (QUICK,) if quick else CONFIGS:
        for runner in ("v2",) if quick else ("v2", "v1"):
            arguments = ("bench", "vllm", "--shape", name, "--runner", runner, *one)
            tasks.append(Task(f"vllm-{name}-{runner}", arguments, 240, (module("vllm", "vllm"), gpu, torch_gpu)))
    for name in (QUICK,) if quick else TENSORRT_SHAPES:
        tasks.append(Task(f"tensorrt-{name}", ("bench", "tensorrt", "--shape", name, *one), 90, (module("tensorrt", "tensorrt"), gpu, plugin)))
    for name in (QUICK,) if quick else models():
        tasks.append(Task(f"decode-{name}", ("bench", "decode", "--shape", name, *one), 40 if quick else 60, (gpu, launchers)))
    tasks.append(Task("decode-checkpoint", ("bench", "decode", checkpoint, *one), 60, (lambda: given, gpu, launchers)))
    onnx = module("onnxruntime", "export"), module("onnx_ir", "export"), module("torch", "torch")
    for name in ONNX_SHAPES[:1] if quick else ONNX_SHAPES:
        for part in ("models",) if quick else ("head", "models"):
            arguments = ("bench", "onnx", "--part", part, "--shape", name, *rounds)
            tasks.append(Task(f"onnx-{part}-{name}", arguments, 120 if quick else 400, (*onnx, module("onnxruntime_genai", "export"))))
    more = ("--gguf", str(inputs.gguf)) if inputs.gguf is not None else ()
    parts = ("--part", "head") if quick else ("--part", "head", "--part", "engines")
    tasks.append(Task("onnx-checkpoint", ("bench", "onnx", checkpoint, "--text", text, *more, *parts, *rounds), 120 if quick else 600, (lambda: given, *onnx)))
    return tasks


def _file_name(asked: str) -> str:
    """A task of the harness as a part of a file's name: without its own file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", asked.partition("=")[0])


def reason(task: Task) -> str | None:
    """The first thing that a task misses here."""
    return next((why for need in task.needs if (why := need()) is not None), None)


def module(name: str, extra: str) -> Callable[[], str | None]:
    """A need for a package."""

    def missing() -> str | None:
        return None if importlib.util.find_spec(name) is not None else f"{name} is not installed; pip install 'flashhead-edge[{extra}]'"

    return missing


@functools.cache
def gpu() -> str | None:
    from flashhead_edge.jetson.driver import device_facts

    try:
        device_facts()
    except DeviceError as error:
        return str(error)
    return None


@functools.cache
def torch_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU; install torch's build for CUDA"


@functools.cache
def plugin() -> str | None:
    import importlib.metadata

    from flashhead_edge.jetson.plugins import find_library

    try:
        find_library(int(importlib.metadata.version("tensorrt").split(".")[0]))
    except (FlashHeadError, importlib.metadata.PackageNotFoundError) as error:
        return " ".join(str(error).split())
    return None


@functools.cache
def launchers() -> str | None:
    """Our kernels' launchers, and what compiles the kernels for this driver. To be asked behind `gpu`."""
    from flashhead_edge.jetson.cuda_library import library
    from flashhead_edge.jetson.driver import device_facts
    from flashhead_edge.jetson.nvrtc import find_nvrtc

    try:
        library()
        find_nvrtc(int(device_facts().cuda_version.split(".")[0]))
    except EngineError as error:
        return " ".join(str(error).split())
    return None


def _begin(out: Path, inputs: Inputs) -> None:
    """Make the folder, or look that what was begun in it is what is asked for now."""
    now = {
        "version": __version__, "commit": commit(), "machine": _machine(), "form": VERSION,
        **{name: None if value is None else str(value) for name, value in vars(inputs).items() if name not in ("quick", "asked")},
        "task": list(inputs.asked), "quick": inputs.quick,
    }  # fmt: skip
    state = out / STATE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state.is_file():
            part = state.with_name(f"{STATE}.{os.getpid()}.part")
            part.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            os.replace(part, state)
            return
        before = json.loads(state.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlashHeadError(f"{out}: the suite cannot be written ({error.strerror}), expected a folder that takes files; choose another path") from error
    except ValueError as error:
        raise SettingsError(f"{state}: it is no JSON, expected what an earlier suite wrote; name a new folder, or remove the file") from error
    for name, value in now.items():
        if (found := before.get(name) if isinstance(before, dict) else None) != value:
            was, asked = (json.dumps(one, ensure_ascii=False) for one in (found, value))
            raise SettingsError(f"{out}: it holds a suite of {name} {was}, expected {asked}, so that its records are of one kind; name a new folder")


def _machine() -> str:
    """As much as tells machines apart that a folder may be carried between."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {_gpu_name() or 'no GPU'}"


def _gpu_name() -> str | None:
    from flashhead_edge.jetson.driver import device_facts

    try:
        return device_facts().name
    except DeviceError:
        return None


def _count(path: Path) -> tuple[int, str | None]:
    """Records in a task's file, and what is wrong with it."""
    found = read_records([path])
    return len(found.entries), found.refused[0] if found.refused else None


def _run(task: Task, path: Path, show: Callable[[str], None]) -> str | None:
    """Run a task and keep its document; what went wrong, in one sentence."""
    command = [*FLASHHEAD, *task.arguments, "--json"]
    show("begins")
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    last, tail = "begins", [""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace") as process:
        assert process.stdout is not None and process.stderr is not None
        answer: list[str] = []
        stdout, stderr = process.stdout, process.stderr

        def follow() -> None:
            for line in stderr:
                lines.put(line)
            lines.put(None)  # the end

        readers = [threading.Thread(target=work, daemon=True) for work in (lambda: answer.append(stdout.read()), follow)]
        try:
            for reader in readers:
                reader.start()
            while True:
                try:
                    line = lines.get(timeout=REPEAT_S)
                except queue.Empty:
                    line = ""
                if line is None:
                    break
                if line.strip():
                    tail.append(line.strip())
                    last = OWN_PROGRESS.sub("", tail[-1])
                show(last)
        except BaseException:  # Ctrl-C: the child has it too; whatever else happens, none is left behind
            process.terminate()
            raise
        for reader in readers:
            reader.join()
    if process.returncode:
        return f"{shlex.join(['flashhead', *task.arguments])} ended with {process.returncode}: {tail[-1].removeprefix('flashhead: ')[:300]}"
    try:
        document: Any = json.loads(answer[0])
    except ValueError:
        return f"{shlex.join(['flashhead', *task.arguments])} printed no JSON document"
    if not isinstance(document, dict) or KEY not in document:
        return f"{shlex.join(['flashhead', *task.arguments])} printed no records"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise EngineError(f"{path}: the records cannot be written ({error.strerror}), expected room for them; free some space and run it again") from error
    return None
