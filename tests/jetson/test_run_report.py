"""A run's report: energy from samples, bytes from headers, and what is not known said as such."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashhead_edge.generation.decode import Summary
from flashhead_edge.jetson import run_report as module
from flashhead_edge.jetson.board import read_board
from flashhead_edge.jetson.plan import Layer
from flashhead_edge.jetson.plan_sources import need_of
from flashhead_edge.jetson.run_report import bandwidth_of, power_recorded, run_report

BOARDS = Path(__file__).parent / "boards"


def summary(**more: Any) -> Summary:
    values = {"prompt_tokens": 10, "tokens": 21, "seconds": 2.0, "seconds_to_first_token": 0.5, "tokens_per_second": 20 / 1.5, "bytes_per_step": 1000.0}
    return Summary(**(values | more))


def look(at: float, power: float | None, energy: float | None = None) -> Any:
    return SimpleNamespace(at=at, power=power, energy=energy, power_scope=None if power is None else "the whole module", gpus=())


@pytest.mark.parametrize(("board", "expected"), [("orin-nano", 102.0), ("orin-nx", 102), ("agx-orin", 205), ("agx-thor", 273)])
def test_bandwidth_of_the_recorded_boards(board: str, expected: float) -> None:
    found = read_board(BOARDS / board)
    mode = found.power_mode.name if found.power_mode else None
    if board == "orin-nano" and mode not in module.NANO_FAST:
        expected = 68
    assert bandwidth_of(found) == expected


def test_bandwidth_where_no_board_is_known() -> None:
    nothing = read_board(BOARDS / "no-such-board")
    assert bandwidth_of(nothing) is None
    assert bandwidth_of(nothing, [{"bandwidth": 3352.3}]) == 3352.3
    assert bandwidth_of(nothing, [{"bandwidth": None}]) is None
    assert bandwidth_of(nothing, [{"bandwidth": 1.0}, {"bandwidth": 1.0}]) is None  # which of two ran it is not known


def test_figures_of_a_run(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported("onnxruntime", "int4", "all")
    monkeypatch.setattr(module, "read_board", lambda: read_board(BOARDS / "orin-nx"))
    taken = [look(99.0, 4.0), look(101.0, 4.0), look(103.0, 8.0)]  # between 100 and 102: one second at 4 W, one from 4 to 6 W
    r = run_report(folder, summary(), taken, 102.0, head_seconds=0.25)
    assert r.joules == pytest.approx(9.0) and r.joules_per_token == pytest.approx(9 / 21) and r.power_scope == "the whole module"
    need = need_of(folder)
    per = sum(layer.per_position for layer in need.layers)
    assert r.bytes_per_token == need.weights - need.tables + 20 * per + 1000  # 10 of the prompt and half of the answer
    assert r.bandwidth_share == pytest.approx(r.bytes_per_token * (20 / 1.5) / 102e9)
    assert r.head_share_of_bytes == pytest.approx(1000 / r.bytes_per_token)
    assert r.head_share_of_time == pytest.approx(0.125)
    assert r.unknown == {}
    other = dataclasses.replace(need, weights=10_000_000, tables=4_000_000, layers=(Layer(100),))  # of a backend that has laid the model out in its own way
    assert run_report(folder, summary(), taken, 102.0, need=other).bytes_per_token == 6_000_000 + 20 * 100 + 1000


def test_counter_of_energy_stands_before_the_power(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's power is a mean over a second: beside a run of a tenth of one it is the idle GPU's."""
    monkeypatch.setattr(module, "read_board", lambda: read_board(BOARDS / "no-such-board"))
    taken = [look(100.0, 70.0, 1000.0), look(100.5, 70.0, 1035.0), look(101.0, 90.0, 1235.0)]  # 70 W, then 400 W
    r = run_report(exported("onnxruntime", "int4", "all"), summary(seconds=0.25), taken, 100.75)
    assert r.joules == pytest.approx(0.25 * 400) and r.joules_per_token == pytest.approx(100 / 21)
    without = run_report(exported("onnxruntime", "int4", "all"), summary(seconds=0.25), taken[:1] + [look(101.0, 70.0)], 100.75)
    assert without.joules == pytest.approx(0.25 * 70)


def test_what_is_not_known_is_said(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_board", lambda: read_board(BOARDS / "no-such-board"))
    folder = exported("onnxruntime", "int4", "all")
    r = run_report(folder, summary(tokens=1), [look(0.0, None)], 102.0)
    assert (r.tokens_per_second, r.joules, r.joules_per_token, r.bandwidth_share, r.head_share_of_time, r.power_scope) == (None,) * 6
    assert r.unknown.keys() == {"joules_per_token", "bandwidth_share"} and "tells the power" in r.unknown["joules_per_token"]
    assert "too short" in run_report(folder, summary(), [look(0.0, 5.0)], 102.0).unknown["joules_per_token"]
    exact = run_report(folder, summary(exact=True), [look(0.0, None)], 102.0)
    assert exact.bytes_per_token is None is exact.head_share_of_bytes and "several tokens" in exact.unknown["bytes_per_token"]
    (tmp_path / "config.json").write_text("[]")
    assert "expected an object" in run_report(tmp_path, summary(), [look(0.0, None)], 102.0).unknown["bytes_per_token"]


def test_untied_embeddings_are_no_bytes_of_a_token(exported: Any) -> None:
    """A token reads one row of them: the tiny model's are 256 rows of 32 floats."""
    need = need_of(exported("onnxruntime", "int4", "all"))
    assert 0 < need.tables < need.weights


def test_power_is_recorded_where_there_is_some() -> None:
    with power_recorded(BOARDS / "orin-nx") as taken:
        start = time.monotonic()
        time.sleep(0.02)
        end = time.monotonic()
    assert all(s.power == pytest.approx(5.21, abs=0.01) for s in taken) and taken[0].at <= start and taken[-1].at >= end
    with power_recorded(BOARDS / "no-such-board") as nothing:
        pass
    assert [s.power for s in nothing] == [None]


def test_generate_reports_its_run(exported: Any, flashhead: Any) -> None:
    code, out, err = flashhead("generate", exported("onnxruntime", "int4", "all"), "--prompt", "ab", "--raw", "--max-new-tokens", 5, "--json")
    assert code == 0, err
    document = json.loads(out)
    report = document["report"]
    assert report["seconds_to_first_token"] == document["seconds_to_first_token"] <= document["seconds"]
    assert 0 < report["head_share_of_time"] < 1 and 0 < report["head_share_of_bytes"] < 1
    assert "seconds_to_first_token" in err and "head_share_of_time" in err


def test_chat_reports_each_turn(exported: Any, flashhead: Any) -> None:
    code, out, err = flashhead("chat", exported("onnxruntime", "int4", "all"), "--max-new-tokens", 4, "--json", stdin="ab\ncd\n")
    assert code == 0, err
    turns = json.loads(out)["turns"]
    assert len(turns) == 2 and all(0 < t["report"]["head_share_of_time"] < 1 for t in turns)  # the second turn's time is its own
    assert err.count("the first after") == 2 and "% of the time, " in err
