"""Time the exported head, whole models and whole engines on a CPU, beside what ONNX Runtime, its GenAI and llama.cpp do.

    flashhead bench onnx OUT --text FILE --gguf FILE
    flashhead bench onnx --part head --shape Llama-3.2-1B --threads 1 --json

Three parts, each with 1 and 2 threads, batch 1:

* head: `head.onnx` beside ONNX Runtime's dense heads (float32, int8, int4), all in one process, each state by all of them
  before the next, so that each reads from memory what the others have pushed out of the caches. A dense head's argmax is not
  counted. The time of a round is the mean over its states, since that is what decoding speed follows.
* models: the decode loop over an int4 body with our head, with a dense int4 head, and with none, and ONNX Runtime's own body with the dense head.
* engines: SmolLM2 or whatever OUT is, through our own session, ONNX Runtime GenAI with its own exports and with ours, and
  llama.cpp; a process an engine, rounds in turn. Token ids alone: no engine makes text of them.

Ratios are of a round's times to the same round's of another; shown are their median, lowest and highest. Not timed: exporting,
which is done once and kept in the user's cache folder. Checked first: tokens and counts of the exported head against
the reference in float64. Made models (`bench.onnx_made`) have random weights and draw what opens from a real head's distribution.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashhead_edge.bench.energy import step_energy
from flashhead_edge.bench.onnx_made import CONFIGS, DENSE_FORMS, cache_folder, dense_name, export_rows, key_of, made_model, write_dense_heads
from flashhead_edge.bench.onnx_worker import in_turn
from flashhead_edge.bench.provenance import commit, processor
from flashhead_edge.bench.steps import drawn
from flashhead_edge.cases import SHAPES, SHARES_SOURCE
from flashhead_edge.checkpoint.atomic import replacing
from flashhead_edge.costs import dense_bytes
from flashhead_edge.errors import CheckpointError, EngineError, ExportError, SettingsError
from flashhead_edge.intervals import wilson
from flashhead_edge.jetson.onnxruntime_sessions import NATIVE_HEAD, native_library
from flashhead_edge.progress import Progress, silent

PARTS = ("head", "models", "engines")
THREADS = (1, 2)
HEAD_SHAPES, MODEL_SHAPES = ("Llama-3.2-1B", "Gemma-3-270M"), ("Gemma-3-270M", "Qwen3-0.6B", "Llama-3.2-1B")
ROUNDS, TOKENS, PROMPT = 5, 48, 32  # of models: tokens of a timed run after a prompt
COUNTS_WITHIN = 0.02  # of a count, beside two clusters: items within rounding of a margin
PREFILL = 256  # positions of a text that are read at once
ENGINE_TOKENS, ENGINE_PROMPT, STARTS = 128, 200, 3  # of engines: also how often each is started anew
TIMED_STATES, COMPARED_STATES = 64, 2000  # of a text: timed, and those on which heads' tokens are compared
STANDARD = "FlashHead, standard operators"
FLASH, NO_HEAD, FP32, INT8, INT4 = "FlashHead", "no head", dense_name(32, 0), "dense int8", dense_name(4, 32)
PLAIN = f"{INT4}, ONNX Runtime's body"
WANTED_HEAD = {FP32: 25.0, INT8: 8.0, INT4: 4.5}  # times as fast; issue 16
WANTED_REAL_HEAD = {FP32: 10.0, INT8: 5.0, INT4: 3.0}  # operators' overhead weighs more on a small model
WANTED_MODELS = {"Gemma-3-270M": 1.8, "Qwen3-0.6B": 1.25, "Llama-3.2-1B": 1.2}
PUBLISHED_MODELS = {"Gemma-3-270M": 1.69, "Qwen3-0.6B": 1.17, "Llama-3.2-1B": 1.21}  # the best that was published, at 94 to 97 % agreement
GENAI_INT8, GENAI_INT4, GENAI_OURS, LLAMA = "GenAI, int8 head", "GenAI, int4 head", "GenAI, FlashHead's model.onnx", "llama.cpp"
WANTED_ENGINES = {GENAI_INT8: 1.25, LLAMA: 1.1}
BUILDS = {GENAI_INT8: {"algo_config": "k_quant_last"}, GENAI_INT4: {}}  # the builder's options beside a block of 32 and activations in 8 bits


def bench_onnx(
    out: Path | None, text: str | None, gguf: Path | None, shapes: Sequence[str], threads: Sequence[int], parts: Sequence[str], command: str,
    progress: Progress = silent, *, rounds: int = ROUNDS,
) -> dict[str, Any]:  # fmt: skip
    """Measure.

    Args:
        out: a FlashHead checkpoint; None leaves real heads and engines out.
        text: whose hidden states its head is timed on, and whose beginning is the engines' prompt.
        gguf: what llama.cpp runs.
        shapes: names in `CONFIGS`, none is all of a part's; threads: none is 1 and 2; parts: of `PARTS`, none is all.
        command: the command line, for the records.
    Returns:
        One JSON document: `device`, `records`, `counts` (what opens), `skipped` (sentences: what was not measured, and why).
    Raises:
        SettingsError: a name is not known, or a part needs what was not given.
        EngineError: a process failed, or the exported head is not the reference's.
        CheckpointError, ExportError: `out` cannot be exported.
    """
    for found, known in ((shapes, tuple(CONFIGS)), (parts, PARTS)):
        for name in found:
            if name not in known:
                raise SettingsError(f"bench onnx: {name} is not known, expected one of {', '.join(known)}; name one of them")
    if out is None and "engines" in parts:
        raise SettingsError("bench onnx: engines are compared on a real model, and no checkpoint was given; name the folder that flashhead convert wrote")
    if (out is None) != (text is None):
        raise SettingsError("bench onnx: a checkpoint and a text belong together, found one without the other; give OUT and --text FILE, or neither")
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx_ir") is None:
        raise EngineError("bench onnx: onnxruntime and onnx-ir are not both installed, expected both; pip install 'flashhead-edge[export]'")
    parts, threads = parts or PARTS, threads or THREADS
    document: dict[str, Any] = {"device": processor(), "records": [], "counts": [], "skipped": []}
    run = Run(document, command, tuple(threads), rounds, progress)
    with tempfile.TemporaryDirectory(prefix="flashhead-bench-") as work:
        real = None if out is None else exported(out, progress)
        ids = [] if real is None or text is None else text_ids(real, text)
        if "head" in parts and real is not None and out is not None:
            bench_real_head(run, real, ids, out, Path(work))
        for name in shapes or dict.fromkeys((*HEAD_SHAPES, *MODEL_SHAPES)):
            with_head, with_model = ("head" in parts and (bool(shapes) or name in HEAD_SHAPES)), ("models" in parts and (bool(shapes) or name in MODEL_SHAPES))
            if with_head or with_model:
                bench_shape(run, name, Path(work), with_head, with_model)
        if "engines" in parts and real is not None and out is not None:
            bench_engines(run, out, real, gguf, ids[:ENGINE_PROMPT])
    document["records"].sort(key=lambda r: PARTS.index(r["part"]))
    return document


@dataclass(frozen=True)
class Run:
    """What all parts share."""

    document: dict[str, Any]
    command: str
    threads: tuple[int, ...]
    rounds: int
    progress: Progress
    agreement: dict[str, tuple[float, tuple[float, float]]] = field(default_factory=dict)  # of heads on the real model's states


@dataclass(frozen=True)
class Subject:
    """A head beside its dense rivals."""

    name: str
    vocab_size: int
    hidden_size: int
    real: bool
    export: Path
    dense: dict[str, Path]
    states: Path
    wanted: dict[str, float]
    about: dict[str, Any]  # settings of the export, from its metadata
    counts: list[float]  # mean of a step


def record(run: Run, part: str, model: str, shape: Sequence[int], head: str, threads: int, seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """A record of `seconds` a step, one a round."""
    us = 1e6 * np.array(seconds)
    median = float(np.median(us))
    found: dict[str, Any] = {
        **{"part": part, "model": model, "shape": list(shape), "real_weights": False, "batch": 1, "context": None, "head": head, "settings": {}},
        **{"backend": "onnxruntime", "backend_version": version("onnxruntime"), "device": run.document["device"], "threads": threads},
        **{"microseconds": median, "microseconds_rounds": us.tolist(), "tokens_per_second": 1e6 / median},
        **{"bytes_per_step": None, "bytes_per_step_p99": None, "dense_bytes_per_step": dense_bytes(*shape)},
        **{"top1_agreement": None, "top1_agreement_interval": None, "speedup_over_dense": None, "spread": float(np.median(np.abs(us - median)))},
        **{"times_as_fast": {}, "wanted": {}, "commit": commit(), "command": run.command},
    }
    found |= more
    run.document["records"].append(found)
    return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, from times round by round: median, lowest, highest."""
    each = np.array(theirs) / np.array(ours)
    return {"median": float(np.median(each)), "low": float(each.min()), "high": float(each.max())}


def agreement_of(run: Run, head: str) -> dict[str, Any]:
    found = run.agreement.get(head)
    return {} if found is None else {"top1_agreement": found[0], "top1_agreement_interval": list(found[1])}


def power_of(ask: Callable[[dict[str, Any]], dict[str, Any]], name: str) -> dict[str, Any]:
    """What a token draws of a board's rails, where it has any: of a head or a model its step, of an engine a text with its prompt."""
    return drawn(step_energy(lambda steps: int(ask({"do": "repeat", "name": name, "steps": steps})["steps"]), gpu=False), 1)


# heads


def bench_real_head(run: Run, export: Path, ids: Sequence[int], checkpoint: Path, work: Path) -> None:
    """The head of a checkpoint on hidden states of a text: agreement of all heads, then their times."""
    from flashhead_edge.checkpoint import open_source, read_head, read_index
    from flashhead_edge.reference import torch_head

    run.progress("reading the text", None)
    states = body_states(export, ids[:COMPARED_STATES])
    if len(states) < TIMED_STATES:
        raise SettingsError(f"bench onnx: the text has {len(states)} tokens, expected at least {TIMED_STATES}; give a longer one")
    timed = states[np.linspace(0, len(states) - 1, TIMED_STATES).astype(int)]
    folder = work / "real"
    folder.mkdir()
    np.save(folder / "all.npy", states)
    np.save(folder / "timed.npy", timed)
    source = open_source(checkpoint)
    weights = read_head(source)
    head = torch_head(read_index(checkpoint, weights), weights.weight, weights.bias)
    with torch.no_grad():
        want = head.step(torch.from_numpy(timed))
    rows, bias = export_rows(export)
    run.progress(f"{source.name}: dense heads", None)
    dense = write_dense_heads(rows[: weights.vocab_size], bias, folder)
    about = export_settings(export)
    subject = Subject(
        source.name,
        weights.vocab_size,
        rows.shape[1],
        True,
        export,
        dense,
        folder / "timed.npy",
        WANTED_REAL_HEAD,
        about,
        want.counts.double().mean(0).tolist(),
    )
    check_steps(run, subject, want.token.tolist(), want.counts.numpy())
    task = head_task(subject, run.threads[-1]) | {"kind": "agreement", "states": str(folder / "all.npy")}
    run.progress(f"{source.name}: tokens of all heads on {len(states):,} states", None)
    with started(task) as ask:
        found = ask({})
    for name, tokens in found["tokens"].items():
        same = sum(a == b for a, b in zip(tokens, found["tokens"][FP32]))
        run.agreement[name] = same / len(tokens), wilson(same, len(tokens))
    counts = np.array(found["counts"])
    rows_of = {"mean": counts.mean(0).tolist()} | {f"p{p}": np.percentile(counts, p, axis=0).tolist() for p in (50, 90, 99)}
    where = f"this head on {len(states):,} states of the text, {found['capped']} capped; {TIMED_STATES} of them are timed"
    run.document["counts"].append({"model": source.name, "source": where, "clusters": about["n_clusters"], "counts": rows_of | {"timed, mean": subject.counts}})
    time_heads(run, subject)


def bench_shape(run: Run, name: str, work: Path, with_head: bool, with_model: bool) -> None:
    """A made model of a known shape: its head, its whole decode loop, or both."""
    made = made_model(name, "int4" if with_model else None, progress=run.progress)
    folder = work / name
    folder.mkdir()
    v, d = SHAPES[name]
    run.progress(f"{name}: dense heads", None)
    dense = write_dense_heads(*export_rows(made.export), folder, DENSE_FORMS if with_head else ((4, 32),), fp32=with_head)
    about = export_settings(made.export)
    want = json.loads(made.reference.read_text())
    counts = np.array(want["counts"])
    subject = Subject(name, v, d, False, made.export, dense, made.states, WANTED_HEAD, about, counts.mean(0).tolist())
    stats = {"mean": counts.mean(0).tolist()} | {f"p{p}": np.percentile(counts, p, axis=0).tolist() for p in (50, 90, 99)}
    run.document["counts"].append({"model": name, "source": f"drawn after {SHARES_SOURCE}", "clusters": about["n_clusters"], "counts": stats})
    check_steps(run, subject, want["tokens"], counts)
    if with_head:
        time_heads(run, subject)
    if with_model:
        time_models(run, subject)
    shutil.rmtree(folder)


def head_task(subject: Subject, threads: int) -> dict[str, Any]:
    """The head that a session takes, and beside it the one of standard operators where that is another."""
    standard = subject.export / "head.onnx"
    taken = subject.export / f"{NATIVE_HEAD}.onnx" if native_library() is not None else standard
    return {
        "kind": "heads", "name": FLASH, "head": str(taken), "others": {} if taken == standard else {STANDARD: str(standard)},
        "dense": {name: str(path) for name, path in subject.dense.items()},
        "states": str(subject.states), "threads": threads, "vocab_size": subject.vocab_size,
    }  # fmt: skip


def check_steps(run: Run, subject: Subject, tokens: Sequence[int], counts: np.ndarray) -> None:
    """Compare steps of the exported head with the reference's, on the states that are timed.

    Raises:
        EngineError: tokens or counts differ by more than what stands within rounding of a margin may explain.
    """
    with started(head_task(subject, 1) | {"dense": {}, "others": {}}) as ask:
        found = ask({"do": "steps"})
    wrong = sum(a != b for a, b in zip(found["tokens"], tokens))
    if wrong > len(tokens) // 32:  # an item within rounding of a margin may stay or go, and be the best of what stays
        raise EngineError(
            f"{subject.export}: {wrong} of {len(tokens)} tokens are not the reference's, expected rounding at margins alone; do not use this export"
        )
    allowed = COUNTS_WITHIN * counts + 2 * np.array([1, *[subject.about["cluster_size"]] * (counts.shape[1] - 1)])
    off = (np.abs(np.array(found["counts"]) - counts) / allowed).max()
    if off > 1:
        raise EngineError(f"{subject.export}: counts are off by {off:.1f} times what is allowed, expected rounding at margins alone; do not use this export")


def time_heads(run: Run, subject: Subject) -> None:
    """Records of a head and its dense rivals."""
    s = subject
    for threads in run.threads:
        run.progress(f"{s.name}: heads, {threads} threads", None)
        task = head_task(s, threads)
        seconds: dict[str, list[float]] = {name: [] for name in (*s.dense, *task["others"], FLASH)}
        p99: dict[str, float] = {}
        with started(task) as ask:
            ask({"do": "round", "round": 0})  # the first round's times are those of first calls
            for number in range(1, run.rounds + 1):
                for name, times in ask({"do": "round", "round": number})["seconds"].items():
                    seconds[name].append(float(np.mean(times)))
                    p99[name] = max(p99.get(name, 0.0), 1e6 * float(np.percentile(times, 99)))
            power = {name: power_of(ask, name) for name in seconds}
        best_int8 = min((n for n in s.dense if n.startswith(INT8)), key=lambda n: statistics.median(seconds[n]))
        times_as_fast = {name: ratio(seconds[name], seconds[FLASH]) for name in seconds if name != FLASH}
        for name in seconds:
            flash, ours = name == FLASH, name in (FLASH, STANDARD)
            record(
                run, "head", s.name, (s.vocab_size, s.hidden_size), name, threads, seconds[name],
                real_weights=s.real, microseconds_p99=p99[name], speedup_over_dense=ratio(seconds[FP32], seconds[name])["median"],
                bytes_per_step=bytes_of_step(s.about, s.counts) if ours else dense_read(name, s.vocab_size, s.hidden_size),
                counts=s.counts if flash else None, settings={"agreement": s.about["agreement"]} if flash and s.real else {},
                times_as_fast=times_as_fast if flash else {}, **power[name],
                wanted={(best_int8 if n == INT8 else n): x for n, x in s.wanted.items()} if flash else {},
                **(agreement_of(run, FLASH if ours else name) if s.real else {}),
            )  # fmt: skip


def bytes_of_step(about: dict[str, Any], counts: Sequence[float]) -> float:
    """Bytes that a step reads at these counts, as the checkpoint codes them (in ONNX a code takes a byte a column)."""
    return float(about["fixed_bytes"] + sum(n * size for n, size in zip(counts[1:], about["item_bytes"])))


def dense_read(name: str, v: int, d: int) -> float:
    """Bytes of a dense head: weights, and a float32 scale a block."""
    for bits, block in DENSE_FORMS:
        if name == dense_name(bits, block):
            return v * d * bits / 8 + 4 * v * -(-d // block)
    return 4.0 * v * d


# whole models


def time_models(run: Run, subject: Subject) -> None:
    """Records of a body's decode loop with our head, the dense int4 head, and none, and of ONNX Runtime's body with the dense one."""
    s = subject
    for threads in run.threads:
        run.progress(f"{s.name}: whole model, {threads} threads", None)
        task = {
            "kind": "models", "export": str(s.export), "dense": str(s.dense[INT4]), "dense_name": INT4, "plain_name": PLAIN, "states": str(s.states),
            "threads": threads, "vocab_size": s.vocab_size, "prompt": PROMPT, "tokens": TOKENS,
        }  # fmt: skip
        seconds: dict[str, list[float]] = {}
        with started(task) as ask:
            for number in range(run.rounds + 1):
                for name, total in ask({"round": number})["seconds"].items():
                    if number:
                        seconds.setdefault(name, []).append(total / TOKENS)
            power = {name: power_of(ask, name) for name in seconds}
        for name in (PLAIN, INT4, "flash", "none"):
            flash = name == "flash"
            published = {"published": PUBLISHED_MODELS.get(s.name)} if flash else {}
            record(
                run, "models", s.name, (s.vocab_size, s.hidden_size), {"flash": FLASH, "none": NO_HEAD}.get(name, name), threads, seconds[name],
                context=PROMPT + TOKENS, settings={"body": "int4", "group": 32, "tokens": TOKENS, **published},
                **power[name], speedup_over_dense=ratio(seconds[INT4], seconds[name])["median"],
                times_as_fast={dense: ratio(seconds[dense], seconds[name]) for dense in (INT4, PLAIN)},
                wanted={INT4: WANTED_MODELS[s.name]} if flash and s.name in WANTED_MODELS else {},
            )  # fmt: skip


# engines


def bench_engines(run: Run, out: Path, export: Path, gguf: Path | None, prompt: Sequence[int]) -> None:
    """Records of whole engines over one model: starts, then rounds in turn."""
    engines: dict[str, tuple[str, Path]] = {FLASH: ("flashhead", export)}
    if importlib.util.find_spec("onnxruntime_genai") is None:
        run.document["skipped"].append("ONNX Runtime GenAI is not installed: pip install onnxruntime-genai")
    else:
        engines |= {name: ("genai", genai_export(out, name, run.progress)) for name in BUILDS} | {GENAI_OURS: ("genai", export)}
    if importlib.util.find_spec("llama_cpp") is None:
        run.document["skipped"].append("llama.cpp is not installed: pip install llama-cpp-python")
    elif gguf is None:
        run.document["skipped"].append("llama.cpp was given no model: --gguf FILE")
    else:
        engines[LLAMA] = ("llama.cpp", gguf)
    about = export_settings(export)
    for threads in run.threads:
        tasks = {
            name: {"kind": "engine", "engine": kind, "model": str(path), "threads": threads, "prompt": list(prompt), "tokens": ENGINE_TOKENS}
            for name, (kind, path) in engines.items()
        }
        starts: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
        for _ in range(STARTS):
            for name, task in tasks.items():
                run.progress(f"{name}: start, {threads} threads", None)
                with started(task) as ask:
                    starts[name].append(ask({"do": "start"}))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
        with contextlib.ExitStack() as stack:
            asks = {name: stack.enter_context(started(task)) for name, task in tasks.items()}
            for number in range(run.rounds + 1):
                for name in in_turn(list(tasks), number):
                    run.progress(f"{name}: round {number + 1} of {run.rounds + 1}, {threads} threads", None)
                    reply = asks[name]({"do": "run"})
                    if number:
                        found[name].append(reply)
            power = {name: power_of(ask, name) for name, ask in asks.items()}
        for name, replies in found.items():
            if len(replies[0]["tokens"]) != ENGINE_TOKENS:
                raise EngineError(f"bench onnx: {name} gave {len(replies[0]['tokens'])} tokens, expected {ENGINE_TOKENS}; report this")
            engine_record(run, out.name, about, name, engines[name], threads, starts[name], found, power[name])


def engine_record(
    run: Run, model: str, about: dict[str, Any], name: str, engine: tuple[str, Path], threads: int, starts: Sequence[dict[str, Any]],
    found: Mapping[str, list[dict[str, Any]]], power: Mapping[str, Any],
) -> None:  # fmt: skip
    def column(of: str, what: str) -> list[float]:
        return [float(r[what]) for r in found[of]]

    others = [other for other in found if other != name] if name == FLASH else []
    steps = {of: [1 / rate for rate in column(of, "tokens_per_second")] for of in found}
    head = {FLASH: FLASH, GENAI_OURS: FLASH, GENAI_INT4: INT4}.get(name, "")
    same = next((i for i, (a, b) in enumerate(zip(found[name][0]["tokens"], found[FLASH][0]["tokens"])) if a != b), ENGINE_TOKENS)
    kind, path = engine
    package = {"flashhead": "onnxruntime", "genai": "onnxruntime-genai", "llama.cpp": "llama-cpp-python"}[kind]
    record(
        run, "engines", model, (about["vocab_size"], about["hidden_size"]), name, threads, steps[name],
        real_weights=True, context=ENGINE_PROMPT + ENGINE_TOKENS, backend=package, backend_version=version(package),
        settings={"prompt": ENGINE_PROMPT, "tokens": ENGINE_TOKENS, "equal_tokens": same},
        speedup_over_dense=None if GENAI_INT8 not in steps else ratio(steps[GENAI_INT8], steps[name])["median"],
        prompt_seconds=statistics.median(column(name, "prompt_seconds")), prompt_seconds_rounds=column(name, "prompt_seconds"),
        first_token_seconds=statistics.median(s["first_token_seconds"] for s in starts), peak_bytes=max(r["peak_bytes"] for r in (*starts, *found[name])),
        model_bytes=model_bytes(kind, path),
        times_as_fast={other: ratio(steps[other], steps[name]) for other in others},
        prompt_times_as_fast={other: ratio(column(other, "prompt_seconds"), column(name, "prompt_seconds")) for other in others},
        wanted={other: x for other, x in WANTED_ENGINES.items() if other in others},
        **agreement_of(run, head), **power,
    )  # fmt: skip


def model_bytes(kind: str, path: Path) -> int:
    """Bytes of what an engine opens."""
    if path.is_file():
        return path.stat().st_size
    names = ("body.onnx", "head.onnx", "model.onnx.data") if kind == "flashhead" else ("model.onnx", "model.onnx.data")
    return sum((path / name).stat().st_size for name in names if (path / name).is_file())


def genai_export(out: Path, name: str, progress: Progress) -> Path:
    """The model of a checkpoint as ONNX Runtime GenAI's builder exports it, kept in the user's cache folder.

    Raises:
        ExportError: the builder failed.
    """
    from flashhead_edge.checkpoint import open_source
    from flashhead_edge.checkpoint.loading import model_config

    options = {"hf_token": "false", **BUILDS[name]}
    folder = cache_folder() / f"{out.name}-genai-{key_of(files_of(out), options)}"
    if folder.is_dir():
        return folder
    progress(f"{name}: building", None)
    source = open_source(out)
    with replacing(folder.resolve(), 4 * sum(size for _, size, _ in files_of(out))) as new, tempfile.TemporaryDirectory(prefix="flashhead-bench-") as work:
        plain = Path(work) / "source"
        plain.mkdir()
        model_config(source).save_pretrained(plain)
        for path in source.folder.iterdir():
            if path.is_file() and path.name != "config.json" and path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
                (plain / path.name).symlink_to(path.resolve())
        task = {"source": str(plain), "out": str(new), "cache": str(Path(work) / "cache"), "precision": "int4", "options": options}
        command = [sys.executable, "-m", "flashhead_edge.export.run_builder", json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
        if done.returncode:
            said = next((line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), f"exit code {done.returncode}")
            raise ExportError(
                f"{out}: ONNX Runtime GenAI's builder failed ({said}), expected a model that it can build; compare head and models alone, by --part"
            )
    return folder


# what is shared


@contextlib.contextmanager
def started(task: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A worker process; a request gives its reply.

    Raises:
        EngineError: it ended before it answered.
    """
    command = [sys.executable, "-m", "flashhead_edge.bench.onnx_worker", json.dumps(task)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            assert process.stdin is not None and process.stdout is not None

            def ask(request: dict[str, Any]) -> dict[str, Any]:
                assert process.stdin is not None and process.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended: its last lines say why
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    code = process.wait()
                    said.seek(0)
                    last = "\n".join(said.read().splitlines()[-20:])
                    raise EngineError(
                        f"bench onnx: the process of {task.get('engine', task['kind'])} ended with code {code}, expected a reply; its last lines:\n{last}"
                    )
                return json.loads(line)  # type: ignore[no-any-return]

            yield ask
            process.stdin.close()


def exported(out: Path, progress: Progress) -> Path:
    """A checkpoint's export with an int4 body, kept in the user's cache folder."""
    from flashhead_edge.export import export_onnx

    folder = cache_folder() / f"{out.name}-{key_of(files_of(out))}"
    if not folder.is_dir():
        export_onnx(out, folder, body="int4", progress=progress)
    return folder


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a folder's files: another checkpoint has others."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected a checkpoint that flashhead convert wrote; check the path")
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()]


def export_settings(export: Path) -> dict[str, Any]:
    """What the metadata of an export says of its head."""
    import onnx_ir as ir

    found = ir.load(export / "head.onnx").metadata_props
    return json.loads(found["flashhead.settings"]) | {"agreement": json.loads(found["flashhead.agreement"])}  # type: ignore[no-any-return]


def text_ids(export: Path, text: str) -> list[int]:
    """Tokens of a text's beginning.

    Raises:
        SettingsError: it is shorter than the engines' prompt.
    """
    from flashhead_edge.capture import read_text
    from flashhead_edge.jetson.tokenizer import load_chat_tokenizer

    ids = list(load_chat_tokenizer(export)(read_text(text))["input_ids"])[:COMPARED_STATES]
    if len(ids) < ENGINE_PROMPT:
        raise SettingsError(f"bench onnx: {text} has {len(ids)} tokens, expected at least {ENGINE_PROMPT}; give a longer text")
    return ids


def body_states(export: Path, ids: Sequence[int]) -> np.ndarray:
    """Hidden states of an exported body at every position of a text, [n, d] float32."""
    from flashhead_edge.jetson.onnxruntime_backend import open_folder

    backend = open_folder(export, None, None)
    body, found = backend.body(), []
    limit = backend.settings.context_length
    for i in range(0, len(ids[:limit]), PREFILL):
        found.append(body.states(ids[i : i + PREFILL]))
    return np.concatenate(found)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
