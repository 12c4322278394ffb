"""The model of a step's time: parameters come back from steps that obey it, and what cannot be fitted is refused."""

import pytest

from flashhead_edge.bench.step_model import Fit, compared, fitted, step_of
from flashhead_edge.errors import SettingsError

TRUE, BANDWIDTH = Fit(1.3, 1.1), 3e12
NAMES = ("Llama-3.2-1B", "Qwen3-1.7B", "Qwen3-0.6B", "Gemma-3-270M", "SmolLM2-135M")


def records(fit: Fit, bandwidth: float = BANDWIDTH) -> list[dict]:
    return [
        {"model": name, "batch": batch, "context": 512, "head": head, "microseconds": slower * fit.microseconds(step_of(name), bandwidth)}
        for name in NAMES
        for batch, head, slower in ((1, "FlashHead", 1.0), (1, "dense fp16", 1.4), (4, "FlashHead", 1.5))
    ]


def test_two_shapes_say_the_others():
    fit, rows = compared(records(TRUE), ("Llama-3.2-1B", "SmolLM2-135M"), BANDWIDTH)
    assert (fit.stretch, fit.phase) == pytest.approx((TRUE.stretch, TRUE.phase))
    assert [r["model"] for r in rows] == list(NAMES)
    assert all(abs(r["off"]) < 1e-3 for r in rows)
    assert [r["model"] for r in rows if r["fitted_on"]] == ["Llama-3.2-1B", "SmolLM2-135M"]


def test_another_devices_fit_with_another_bandwidth():
    fit, _ = compared(records(TRUE), NAMES[:2], BANDWIDTH)
    _, rows = compared(records(TRUE, 4e12), (), 4e12, fit)
    assert all(abs(r["off"]) < 1e-3 for r in rows)
    _, wrong = compared(records(TRUE, 4e12), (), BANDWIDTH, fit)
    assert max(r["off"] for r in wrong) > 0.1


def test_few_multiprocessors_decode_slower_than_memory_reads():
    step = step_of("Llama-3.2-1B")
    assert TRUE.microseconds(step, BANDWIDTH, 8, 1.0) > 5 * TRUE.microseconds(step, BANDWIDTH)
    assert TRUE.microseconds(step, 1e10, 8, 1.0) == TRUE.microseconds(step, 1e10)


def test_bytes_are_those_of_the_floor():
    # The floors at 3.0 TB/s, with the head: 174, 263, 96, 21 and 22 us; the small models' heads are read from others' shares.
    for name, floor, apart in zip(NAMES, (174, 263, 96, 21, 22), (0.02, 0.02, 0.03, 0.08, 0.08)):
        assert step_of(name).bytes / 3e12 * 1e6 == pytest.approx(floor, rel=apart), name


def test_refused():
    with pytest.raises(SettingsError, match="'Llama-9'"):
        step_of("Llama-9")
    with pytest.raises(SettingsError, match="1 steps"):
        fitted([(step_of("Llama-3.2-1B"), 400.0)], BANDWIDTH)
    with pytest.raises(SettingsError, match="Qwen3-8B is not among"):
        compared(records(TRUE), ("Qwen3-8B", "SmolLM2-135M"), BANDWIDTH)
