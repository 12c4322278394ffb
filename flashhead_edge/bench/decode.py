"""Time whole texts on a GPU through the torch-free CUDA backend: the step, tokens a second, the first token of a prompt.

    flashhead bench decode
    flashhead bench decode --shape Llama-3.2-1B --batch 1 --json
    flashhead bench decode CHECKPOINT

Without a checkpoint the models are made: real shapes, random weights, heads that open as many clusters as a real one. numpy alone. A step is its CUDA graph,
replayed with 512 tokens cached; texts are read by the host one step behind the device, as `generate` would.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import CACHED, made_program, models, step_times, tokens_a_second
from flashhead_edge.bench.cuda_dense import dense_steps
from flashhead_edge.bench.provenance import commit
from flashhead_edge.errors import SettingsError
from flashhead_edge.progress import Progress, silent

BATCHES = (1, 4, 8)
PROMPT = 512  # tokens of the prompt whose first token is waited for
ROUNDS = 5  # of prompts, after one that is dropped


def bench_decode(folder: Path | None, shapes: Sequence[str], batches: Sequence[int], command: str, progress: Progress = silent) -> dict[str, Any]:
    """Time a checkpoint, or made models.

    Args:
        shapes: of made models (`bench.cuda.models`), none is all.
        batches: texts at a time, none is `BATCHES`.
    Returns:
        One JSON document: `records`.
    Raises:
        SettingsError: a shape is not known. DeviceError: no GPU, or too little memory. What opening a checkpoint raises.
    """
    from flashhead_edge.jetson.driver import device_facts

    known, batches = models(), tuple(batches) or BATCHES
    if unknown := [name for name in shapes if name not in known]:
        raise SettingsError(f"bench decode: {unknown[0]} is not known, expected one of {', '.join(known)}; name one of them")
    facts = device_facts()
    if folder is not None:
        from flashhead_edge.jetson.cuda_folder import open_folder

        with open_folder(folder, batch=max(batches), progress=progress) as backend:
            return {"records": _measured(backend.model, folder.resolve().name, True, batches, command, progress, facts.free_bytes)}
    records: list[dict[str, Any]] = []
    for name in shapes or known:
        records += _made(name, facts, batches, command, progress)
    return {"records": records}


def _made(name: str, facts: Any, batches: Sequence[int], command: str, progress: Progress) -> list[dict[str, Any]]:
    """The records of one made model."""
    from flashhead_edge.jetson.cuda_session import open_model
    from flashhead_edge.program.head import Device

    model, vocab, group = models()[name]
    with tempfile.TemporaryDirectory(prefix="flashhead-bench-") as work:
        progress(f"{name}: making weights", None)
        device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
        m = open_model(made_program(Path(work) / "program", model, vocab, device, group=group, batch=max(batches)), progress=progress)
        try:
            return _measured(m, name, False, batches, command, progress, facts.free_bytes)
        finally:
            m.close()


def _measured(m: Any, name: str, real: bool, batches: Sequence[int], command: str, progress: Progress, free: int) -> list[dict[str, Any]]:
    """The records of an open model, before which so many bytes of the device were free."""
    from flashhead_edge.jetson.cuda_memory import device_bytes
    from flashhead_edge.jetson.cuda_session import step_graph

    common = {
        "model": name, "real_weights": real, "shape": [m.head.vocab, m.head.hidden], "device": m.facts.name, "backend": "cuda",
        "backend_version": m.facts.cuda_version, "body": "w4a16", "precision": m.program.precision, "context": m.program.context, "cached": CACHED,
        "device_bytes": m.plan.size, "planned_bytes": device_bytes(m.plan.size), "real_bytes": free - m.device.memory()[0], "weight_bytes": m.plan.weight_bytes,
        "commit": commit(), "command": command,
    }  # fmt: skip
    progress(f"{name}: the first token", None)
    common["prompt"] = min(PROMPT, m.program.context - 1)
    first = first_token_seconds(m, common["prompt"])
    common |= {"first_token_seconds": float(np.median(first)), "first_token_spread": [float(first.min()), float(first.max())]}
    records = []
    for rows in batches:
        progress(f"{name}: timing, batch {rows}", None)
        nodes, times = step_graph(m, rows, False).nodes, step_times(m, rows)
        record: dict[str, Any] = {
            "batch": rows,
            "microseconds": float(np.median(times)),
            "spread": [float(times.min()), float(times.max())],
            "graph_nodes": nodes,
        }
        record["without_head"] = float(np.median(step_times(m, rows, without=("FlashHead",))))
        record["dense"] = dense_steps(m, rows, record["microseconds"], record["without_head"])
        records.append(common | record | {"tokens_per_second": tokens_a_second(m, rows)})
    return records


def first_token_seconds(m: Any, tokens: int) -> np.ndarray:
    """From a prompt of so many tokens to the first one after it, on the host's clock, one figure a round."""
    from flashhead_edge.jetson.cuda_session import decode

    prompt = [1 + at % 1000 for at in range(tokens)]
    found = []
    for _ in range(1 + ROUNDS):
        begun = time.perf_counter()
        next(decode(m, [prompt], 1))
        found.append(time.perf_counter() - begun)
    return np.array(found[1:])
