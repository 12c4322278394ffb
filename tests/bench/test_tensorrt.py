"""`bench tensorrt` over a stand-in for a folder's engines: which it times, in which turns, and what it says of them. Real engines are for tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashhead_edge.bench import tensorrt as bench
from flashhead_edge.bench.as_records import with_records
from flashhead_edge.bench.energy import Energy
from flashhead_edge.jetson import driver, tensorrt_backend

MICROSECONDS = {"decoder": 460.0, "decoder_dense": 605.0, "head": 20.0}
COUNTS = np.array([[40, 1000, 100]])


class Stream:
    """Counts what was launched; its clock is theirs."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.now = 0.0

    def run(self, part: str) -> None:
        self.launched.append(part)
        self.now += MICROSECONDS[part]

    def wait(self) -> None: ...

    @contextmanager
    def captured(self) -> Iterator[Any]:
        before = len(self.launched), self.now
        yield SimpleNamespace(launch=lambda stream: [self.run("head") for _ in range(bench.HEADS_A_GRAPH)])
        del self.launched[before[0] :]
        self.now = before[1]


class Timer:
    """A GPU's events over that clock."""

    stream: Stream

    def __init__(self) -> None:
        self.at = {0: 0.0, 1: 0.0}

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def mark(self, stream: Stream, which: int) -> None:
        self.at[which] = stream.now

    def microseconds(self) -> float:
        return self.at[1] - self.at[0]


class Folder:
    """What `open_folder` gives, as far as the bench looks."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        engines = {part: {"bytes": 480_000, "seconds": 5.0} for part in ("head", *parts)}
        document = {"made": "Llama-3.2-1B", "group": 128, "engines": engines, "peak_host_bytes": 1, "agreement": {}}
        self.stream, self.asked = Stream(), list[str]()
        self.settings = SimpleNamespace(vocab_size=128_256, hidden_size=2_048, fixed_bytes=5_000, item_bytes=(10, 4_100))
        self.manifest = SimpleNamespace(document=document, max_batch=4, precision="float16", layers="plugin")
        self.runtime, self.facts = SimpleNamespace(trt=SimpleNamespace(__version__="8.6.0")), SimpleNamespace(name="H100")
        self.head = SimpleNamespace(step=lambda states: None)
        self.why = ""

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None: ...

    def context(self, part: str) -> Any:
        return SimpleNamespace(run=lambda stream, why: stream.run(part))

    def decode_graph(self, batch: int, everything: bool, part: str = "decoder") -> Any:
        return SimpleNamespace(graph=SimpleNamespace(nodes=88, launch=lambda stream: stream.run(part)), places={})

    def setting(self, name: str, batch: int) -> np.ndarray:
        return np.zeros(batch, np.int32)

    def begin(self, ids: Any) -> None: ...

    def results(self, places: Any, name: str) -> np.ndarray:
        assert name == "counts"
        return np.repeat(COUNTS, self.batch, 0)

    def decode(self, prompts: Any, steps: int) -> Iterator[Any]:
        self.batch = len(prompts)
        return iter(range(steps))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(*parts: str) -> tuple[dict[str, Any], Folder]:
        folder = Folder(parts)
        monkeypatch.setattr(tensorrt_backend, "open_folder", lambda path, plugin: folder)
        monkeypatch.setattr(driver, "device_facts", lambda: None)
        monkeypatch.setattr(driver, "Timer", Timer)
        monkeypatch.setattr(bench, "WARM_SECONDS", 0.0)
        monkeypatch.setattr(bench, "step_energy", lambda run: Energy((0.08, 0.09, 0.1), "the GPU alone, by NVML") if run(3) == 3 else None)
        return bench.bench_tensorrt(Path("out"), [], [1, 2, 8], "flashhead bench tensorrt out"), folder

    return of


def test_both_engines_take_turns_and_stand_beside_each_other(measured: Any) -> None:
    document, folder = measured("decoder", "decoder_dense")
    records = document["records"]
    assert [(r["head"], r["batch"]) for r in records] == [(head, batch) for batch in (1, 2) for head in ("FlashHead alone", "FlashHead", "dense")]
    alone, ours, dense = records[:3]
    assert (alone["microseconds"], ours["microseconds"], dense["microseconds"]) == pytest.approx((20.0, 460.0, 605.0))
    assert ours["speedup_over_dense"] == pytest.approx(605 / 460) and ours["dense_head_microseconds"] == pytest.approx(165)
    assert ours["share_of_head_gone"] == pytest.approx(145 / 165)
    assert ours["bytes_per_step"] == 5_000 + 1000 * 10 + 100 * 4_100 and dense["bytes_per_step"] == 2 * 128_256 * 2_048
    assert records[4]["bytes_per_step"] == 5_000 + 2 * (1000 * 10 + 100 * 4_100)  # two rows: what they share once
    assert ours["joules_per_token"] == 0.09 and records[4]["joules_per_token"] == 0.045
    steps = [part for part in folder.stream.launched if part != "head"]
    turns = [part for i, part in enumerate(steps) if i == 0 or part != steps[i - 1]]
    assert turns[: 2 * bench.ROUNDS] == ["decoder", "decoder_dense"] * bench.ROUNDS
    found = with_records("tensorrt", document, "flashhead bench tensorrt out")["benchmark"]
    assert [(r["head"], r["batch"], r["times_as_fast"]["samples"]) for r in found["records"]] == [("FlashHead", 1, 7), ("FlashHead", 2, 7)]
    assert found["left_out"] == []


def test_a_folder_without_the_dense_engine_has_no_record_and_says_how_to_get_one(measured: Any) -> None:
    document, _ = measured("decoder")
    assert [r["head"] for r in document["records"]] == ["FlashHead alone", "FlashHead"] * 2
    found = with_records("tensorrt", document, "flashhead bench tensorrt out")["benchmark"]
    assert found["records"] == []
    (sentence,) = found["left_out"]
    assert "no engine with a dense head (flashhead export engines FOLDER --dense-head adds it) in the same run" in sentence
