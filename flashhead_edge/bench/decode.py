"""Time whole texts on a GPU through the torch-free CUDA backend: the step beside dense heads, tokens a second, the first token of a prompt, joules.

    flashhead bench decode
    flashhead bench decode --shape Llama-3.2-1B --batch 1 --json
    flashhead bench decode CHECKPOINT

Without a checkpoint the models are made: real shapes, random weights, heads that open as many clusters as a real one. numpy alone. A step is its CUDA graph,
replayed with 512 tokens cached, in turns with the same step that has a dense head in our head's place (bench.cuda_dense); texts are read by the host one
step behind the device, as `generate` would.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import CACHED, REPLAYS, captured, cut_for, graph_times, made_program, models, replay, texts_of, turn_times
from flashhead_edge.bench.cuda_dense import KINDS, DenseHead, check_dense, most_rows, put_dense_step
from flashhead_edge.bench.energy import step_energy
from flashhead_edge.bench.provenance import calibration, commit
from flashhead_edge.bench.steps import FLASH, TEXTS, against, decoded, drawn, timed
from flashhead_edge.costs import dense_bytes
from flashhead_edge.errors import SettingsError
from flashhead_edge.progress import Progress, silent

BATCHES = (1, 4, 8)
PROMPT = 512  # tokens of the prompt whose first token is waited for
ROUNDS = 5  # of prompts, after one that is dropped
NO_HEAD = "no head"


def bench_decode(folder: Path | None, shapes: Sequence[str], batches: Sequence[int], command: str, progress: Progress = silent) -> dict[str, Any]:
    """Time a checkpoint, or made models.

    Args:
        shapes: of made models (`bench.cuda.models`), none is all.
        batches: texts at a time, none is `BATCHES`.
    Returns:
        One JSON document: `records`, one a model, batch and head (`step_records`); ours also has the first token's seconds and the memory.
    Raises:
        SettingsError: a shape is not known, or the model holds too little text. DeviceError: no GPU, too little memory, or a dense rival that names a
            wrong token. What opening a checkpoint raises.
    """
    from flashhead_edge.jetson.driver import device_facts

    known, batches = models(), tuple(batches) or BATCHES
    if unknown := [name for name in shapes if name not in known]:
        raise SettingsError(f"bench decode: {unknown[0]} is not known, expected one of {', '.join(known)}; name one of them")
    facts = device_facts()
    if folder is not None:
        from flashhead_edge.jetson.cuda_folder import open_folder

        with open_folder(folder, batch=max(batches), progress=progress) as backend:
            own = measured(backend.model, folder.resolve().name, True, batches, command, progress, facts.free_bytes)
            return {"records": [r | calibration(folder) if r["head"] == FLASH else r for r in own]}
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
            return [r | {"group": group} for r in measured(m, name, False, batches, command, progress, facts.free_bytes)]
        finally:
            m.close()


def measured(m: Any, name: str, real: bool, batches: Sequence[int], command: str, progress: Progress, free: int) -> list[dict[str, Any]]:
    """The records of a model that is open: all heads, batch by batch.

    Args:
        free: bytes of the device that were free before it was opened.
    """
    from flashhead_edge.jetson.cuda_memory import device_bytes

    if m.program.context < CACHED + REPLAYS // 2:
        raise SettingsError(
            f"bench decode: the cache of {name} holds {m.program.context:,} positions, expected {CACHED + REPLAYS // 2:,}, since steps around the "
            f"{CACHED}th are timed; time a model of a longer context"
        )
    common = {
        "model": name, "real_weights": real, "shape": [m.head.vocab, m.head.hidden], "device": m.facts.name, "backend": "cuda",
        "backend_version": m.facts.cuda_version, "body": "w4a16", "precision": m.program.precision, "context": CACHED, "positions": m.program.context,
        "dense_bytes_per_step": dense_bytes(m.head.vocab, m.head.hidden), "commit": commit(), "command": command,
    }  # fmt: skip
    progress(f"{name}: the first token", None)
    prompt = min(PROMPT, m.program.context - 1)
    first = first_token_seconds(m, prompt)
    ours = {
        "device_bytes": m.plan.size, "planned_bytes": device_bytes(m.plan.size), "real_bytes": free - m.device.memory()[0],
        "weight_bytes": m.plan.weight_bytes, "prompt": prompt, "first_token_seconds": float(np.median(first)),
        "first_token_spread": [float(first.min()), float(first.max())],
    }  # fmt: skip
    progress(f"{name}: the dense head's token", None)
    if most_rows(m):
        check_dense(m)
    records: list[dict[str, Any]] = []
    for rows in batches:
        progress(f"{name}: timing, batch {rows}", None)
        found = {r["head"]: common | {"batch": rows} | r for r in step_records(m, rows, partial(_say, progress, f"{name}: batch {rows}"))}
        found[FLASH] |= ours
        records += found.values()
    return records


def _say(progress: Progress, about: str, what: str) -> None:
    progress(f"{about}, {what}", None)


def step_records(m: Any, rows: int, progress: Callable[[str], object] = lambda what: None) -> list[dict[str, Any]]:
    """A greedy step of some rows with each head, in turns, and what it draws: `FlashHead` first, the dense ones, no head at all.

    Returns:
        A record each: `head`, `timed`; of a head `drawn` and `bytes_per_step`; of ours `tokens_per_second`, `graph_nodes` and how it stands `against` the
        head in 16 bits; of a dense one its launches' own `head_microseconds`. Of more rows than the dense ones take (`cuda_dense.most_rows`), ours
        and none.
    """
    from flashhead_edge.jetson.cuda_program import put_step
    from flashhead_edge.jetson.cuda_session import step_graph

    rivals = [DenseHead(m, kind) for kind in KINDS] if rows <= most_rows(m) else []
    graphs: dict[str, Any] = {}
    try:
        with cut_for(m, rows):
            graphs[FLASH] = captured(m, partial(put_step, m, rows, False))
            for rival in rivals:
                graphs[rival.name] = captured(m, partial(put_dense_step, m, rival, rows))
            graphs[NO_HEAD] = captured(m, partial(put_step, m, rows, False, ("FlashHead",)))
        times = turn_times(m, graphs)
        energy = {}
        for name in (n for n in graphs if n != NO_HEAD):
            progress(f"power, {name}")
            energy[name] = step_energy(partial(replay, m, graphs[name]))
        alone = {rival.name: graph_times(m, partial(rival.put, rows)) for rival in rivals}
    finally:
        for held in (*graphs.values(), *rivals):
            held.close()
    texts = [texts_of(m, rows) for _ in range(TEXTS)]
    s = m.program.settings
    found = {name: {"head": name} | timed(us) for name, us in times.items()}
    for name, one in energy.items():
        found[name] |= drawn(one, rows)
    found[FLASH] |= decoded(texts, s["fixed_bytes"], s["item_bytes"]) | {"graph_nodes": step_graph(m, rows, False).nodes}
    for rival in rivals:
        found[rival.name] |= {"bytes_per_step": rival.bytes, "head_microseconds": float(np.median(alone[rival.name]))}
    if rivals:
        dense = times[rivals[0].name]
        found[FLASH] |= against(times[FLASH], dense, float(np.median(dense) - np.median(times[NO_HEAD])))
    return list(found.values())


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
