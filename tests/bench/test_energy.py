"""Joules of a step: from a board's rails and from a counter, and why they are not known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from flashhead_edge.bench import energy
from flashhead_edge.jetson import board_telemetry


class Steps:
    """Steps of a millisecond, at least 25 of them a call."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, wanted: int) -> int:
        done = max(wanted, 25)
        time.sleep(done / 1000)
        self.count += done
        return done


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that draws 20 W and tells it, by a counter or not."""

    def tell(power: float | None, counts: bool) -> None:
        real, begun = board_telemetry.sample, time.monotonic()

        def sample(*arguments: Any, **options: Any) -> Any:
            import dataclasses

            found = real("/nowhere", nvml=False)
            counter = 20 * (found.at - begun) if counts else None
            return dataclasses.replace(found, power=power, energy=counter, power_scope="the GPU alone, by NVML" if power else None)

        monkeypatch.setattr(board_telemetry, "sample", sample)

    return tell


@pytest.mark.parametrize("counts", [True, False], ids=["counter", "power"])
def test_a_step_s_joules_are_watts_times_its_time(telling: Any, counts: bool) -> None:
    telling(20.0, counts)
    steps = Steps()
    found = energy.step_energy(steps, seconds=0.3)
    assert found.scope == "the GPU alone, by NVML" and found.unknown is None
    # 20 W over steps of a millisecond; sleeps and the looks in between last longer than they should, never shorter
    assert len(found.joules) == 3 and all(0.0199 <= j < 0.04 for j in found.joules)
    assert steps.count >= 700


def test_where_nothing_tells_the_power_nothing_is_run(telling: Any) -> None:
    telling(None, False)
    steps = Steps()
    assert energy.step_energy(steps) == energy.Energy((), None, "no rail and no NVML tells the power")
    assert energy.step_energy(steps, gpu=False).unknown == "no rail tells the power" and steps.count == 0


def test_a_cpu_s_steps_do_not_take_the_gpu_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr("flashhead_edge.jetson.board_nvml.read_gpus", lambda unread: asked.append(1) or [{"power": 300.0, "energy": 1.0}])
    monkeypatch.setattr(energy, "SECONDS", 0.01)
    assert energy.step_energy(lambda n: n, gpu=False).joules == ()
    assert asked == []
