"""`bench decode` over an emulated GPU: which steps it times, what it says of them, and that a dense rival is held against numpy first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda_emulator import at, emulated
from cuda_truth import MODELS, small_program

from flashhead_edge.bench import cuda, cuda_dense, decode
from flashhead_edge.bench.energy import Energy
from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.jetson import cuda_library, cuda_session, driver
from flashhead_edge.program.weights import widened

try:
    cuda_library.library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

JOULES = 0.012


class Rival:
    """A dense head in numpy, where the real one launches kernels. `off` names the next token instead of the best."""

    MADE: ClassVar[list[Rival]] = []
    off = 0

    def __init__(self, m: Any, kind: str) -> None:
        self.m, self.kind, self.bytes, self.open, self.puts = m, kind, 1_000, True, 0
        self.name = {"16 bits": "dense fp16", "8 bits": "dense int8, one scale a row"}[kind]
        self.MADE.append(self)

    def put(self, rows: int) -> None:
        m, half = self.m, np.float16 if self.m.program.precision == "float16" else np.uint16
        states, matrix = (
            widened(at(address, half, n, m.head.hidden), m.program.precision)
            for address, n in ((m.value(m.head.node.inputs[0]), rows), (m.weight(m.head.node.attributes["rows"]), m.head.vocab))
        )
        at(m.block("token"), np.int64, rows)[:] = ((states @ matrix.T).argmax(1) + self.off) % m.head.vocab
        self.puts += 1

    def close(self) -> None:
        self.open = False


class Clock:
    """The host's clock where a GPU's events stand."""

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None: ...

    def mark(self, stream: Any, which: int) -> None:
        self.at = getattr(self, "at", {}) | {which: time.perf_counter()}

    def microseconds(self) -> float:
        return 1e6 * (self.at[1] - self.at[0])


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[int]]]:
    """An emulated model, and the steps that were asked for where power is told."""
    asked: list[int] = []

    def captured(m: Any, put: Any) -> Any:
        return SimpleNamespace(launch=lambda stream: put(), close=lambda: None)

    def energy(run: Any) -> Energy:
        asked.append(run(3))
        return Energy((JOULES, 2 * JOULES, JOULES / 2), "the GPU alone, by NVML")

    Rival.MADE.clear()
    for room, name, value in (
        (cuda, "CACHED", 16), (cuda, "REPLAYS", 2), (cuda, "WARM_SECONDS", 0.0), (cuda, "captured", captured), (decode, "captured", captured),
        (cuda_dense, "CACHED", 16), (decode, "CACHED", 16), (decode, "REPLAYS", 2),
        (decode, "PROMPT", 12), (decode, "DenseHead", Rival), (cuda_dense, "DenseHead", Rival),
        (decode, "step_energy", energy),
        (decode, "turn_times", partial(cuda.turn_times, rounds=3, replays=2)), (decode, "graph_times", partial(cuda.graph_times, rounds=2, replays=2)),
        (decode, "texts_of", partial(cuda.texts_of, tokens=4)), (driver, "Timer", Clock),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, value)
    with emulated(small_program(tmp_path / "program", next(iter(MODELS)))) as (m, _):
        m.device.memory = lambda: (0, 0)  # type: ignore[union-attr, method-assign, assignment]
        graph = cuda_session.step_graph
        monkeypatch.setattr(cuda_session, "step_graph", lambda *a: SimpleNamespace(launch=graph(*a).launch, nodes=88))
        yield m, asked


def measured(m: Any, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    return decode.measured(m, "made", False, batches, "flashhead bench decode", lambda *_: None, 5_000)


def test_every_head_is_timed_at_every_batch_that_the_rival_takes(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    m, asked = opened
    monkeypatch.setattr(decode, "most_rows", lambda m: 2)  # as of the real rival's eight
    records = measured(m, (1, 2, 4))
    heads = ["FlashHead", "dense fp16", "dense int8, one scale a row", "no head"]
    assert [(r["batch"], r["head"]) for r in records] == [(b, h) for b in (1, 2) for h in heads] + [(4, "FlashHead"), (4, "no head")]
    assert all(len(r["microseconds_rounds"]) == 3 and r["context"] == 16 and r["positions"] == 192 for r in records)
    assert all(("joules_per_token" in r) == (r["head"] != "no head") for r in records)
    assert [r.get("joules_per_token") for r in records if r["batch"] == 2] == [*[JOULES / 2] * 3, None]
    assert asked == [3] * 7 and not any(r.open for r in Rival.MADE)
    ours = {r["batch"]: r for r in records if r["head"] == "FlashHead"}
    dense = next(r for r in records if r["head"] == "dense fp16")
    assert ours[1]["speedup_over_dense"] == pytest.approx(np.median(np.divide(dense["microseconds_rounds"], ours[1]["microseconds_rounds"])))
    assert "speedup_over_dense" not in ours[4] and "head_microseconds" in dense
    settings, stages = m.program.settings, len(m.program.settings["item_bytes"])
    assert ours[1]["bytes_per_step"] >= settings["fixed_bytes"] and stages == m.head.counted - 1
    each = [ours[b]["bytes_per_step"] - settings["fixed_bytes"] for b in (1, 4)]
    assert each[1] > 2 * each[0] > 0  # what rows share is counted once, the rest a row
    assert ours[1]["real_bytes"] == 5_000 and ours[1]["first_token_spread"][0] <= ours[1]["first_token_seconds"]


def test_a_rival_that_names_a_wrong_token_is_not_timed(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rival, "off", 1)
    with pytest.raises(DeviceError, match=r"dense head: it names token \d+ with a logit of .*, expected \d+ with"):
        measured(opened[0], (1,))


def test_dense_heads_whose_states_do_not_fit_a_block_are_left_out(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB of shared memory, as capability 8.6 has them, hold eight states of 2,048 numbers and four of 4,096; of 32,768 not one."""

    def of(hidden: int, shared: int) -> Any:
        return SimpleNamespace(head=SimpleNamespace(hidden=hidden), limits=SimpleNamespace(shared_bytes=shared))

    assert [cuda_dense.most_rows(of(d, 99 << 10)) for d in (576, 2_048, 4_096, 32_768)] == [8, 8, 4, 0]
    assert cuda_dense.most_rows(of(4_096, 227 << 10)) == 8
    monkeypatch.setattr(decode, "most_rows", lambda m: 0)
    assert [r["head"] for r in measured(opened[0], (1,))] == ["FlashHead", "no head"] and not Rival.MADE


def test_a_cache_that_ends_before_the_timed_steps_is_refused(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CACHED", 192)
    with pytest.raises(SettingsError, match="the cache of made holds 192 positions, expected 193, since steps around the 192th are timed"):
        measured(opened[0], (1,))
