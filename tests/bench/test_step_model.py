"""The model of a step's time: parameters come back from steps that obey it, and what cannot be fitted is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flashhead_edge.bench.step_model import Card, Fit, compared, fitted, step_of
from flashhead_edge.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
TRUE, CARD = Fit(1.5, 1.1), Card(3e12, 132, 1.755)
NEARLY = 5e-3  # SmolLM2's codes take 2 % less than its bytes on this card, and the fit counts codes
NAMES = ("Llama-3.2-1B", "Qwen3-1.7B", "Qwen3-0.6B", "Gemma-3-270M", "SmolLM2-135M")


def records(fit: Fit, card: Card = CARD) -> list[dict]:
    return [
        {"model": name, "batch": batch, "context": 512, "head": head, "microseconds": {"median": slower * fit.microseconds(step_of(name), card)}}
        for name in NAMES
        for batch, head, slower in ((1, "FlashHead", 1.0), (1, "dense fp16", 1.4), (4, "FlashHead", 1.5))
    ]


def test_two_shapes_say_the_others():
    fit, rows = compared(records(TRUE), ("Llama-3.2-1B", "SmolLM2-135M"), CARD)
    assert (fit.stretch, fit.phase) == pytest.approx((TRUE.stretch, TRUE.phase), rel=NEARLY)
    assert [r["model"] for r in rows] == list(NAMES)
    assert all(abs(r["off"]) < NEARLY for r in rows)
    assert [r["model"] for r in rows if r["fitted_on"]] == ["Llama-3.2-1B", "SmolLM2-135M"]


def test_another_device_by_the_fit_of_the_first():
    fit, _ = compared(records(TRUE), NAMES[:2], CARD)
    half = replace(CARD, multiprocessors=66)
    _, rows = compared(records(TRUE, half), (), half, fit)
    assert all(abs(r["off"]) < NEARLY for r in rows)
    _, wrong = compared(records(TRUE, half), (), CARD, fit)
    assert min(r["off"] for r in wrong) < -0.1


def test_the_slower_of_memory_and_instructions_counts():
    step = step_of("Llama-3.2-1B")
    now = TRUE.microseconds(step, CARD)
    assert TRUE.microseconds(step, replace(CARD, bandwidth=9e12)) == now
    assert TRUE.microseconds(step, replace(CARD, bandwidth=1e11)) == pytest.approx(step.bytes / 1e5 + 1.1 * step.phases)
    assert TRUE.microseconds(step, replace(CARD, multiprocessors=8)) > 5 * now
    with pytest.raises(SettingsError, match="take less than their bytes"):
        compared(records(TRUE), ("Llama-3.2-1B", "SmolLM2-135M"), replace(CARD, bandwidth=1e11))


def test_bytes_are_those_of_the_floor():
    # The floors at 3.0 TB/s, with the head: 174, 263, 96, 21 and 22 us; the small models' heads are read from others' shares.
    for name, floor, apart in zip(NAMES, (174, 263, 96, 21, 22), (0.02, 0.02, 0.03, 0.08, 0.08)):
        assert step_of(name).bytes / 3e12 * 1e6 == pytest.approx(floor, rel=apart), name


def test_refused():
    with pytest.raises(SettingsError, match="'Llama-9'"):
        step_of("Llama-9")
    with pytest.raises(SettingsError, match="1 steps"):
        fitted([(step_of("Llama-3.2-1B"), 400.0)], CARD)
    with pytest.raises(SettingsError, match="Qwen3-8B is not among"):
        compared(records(TRUE), ("Qwen3-8B", "SmolLM2-135M"), CARD)


def test_what_the_page_says_is_what_the_records_give():
    """docs/cuda.md: how far off the model is, in order of the shapes."""
    page = (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    said = page[page.index("**A model of a step's time**") : page.index("**Beside vLLM**")]
    h100, h200 = (json.loads((ROOT / "docs" / "benchmarks" / f"decode-{card}.json").read_text(encoding="utf-8"))["records"] for card in ("h100", "h200"))
    fit, here = compared(h100, ("Llama-3.2-1B", "SmolLM2-135M"), Card(3.02e12, 132, 1.755))
    _, there = compared(h200, (), Card(4.1e12, 132, 1.755), fit)
    assert f"({fit.stretch:.3f} times 135 ticks" in said and f"waits for another ({fit.phase:.2f} us)" in said
    offs = [r["off"] for r in here if not r["fitted_on"]] + [r["off"] for r in there]
    assert re.findall(r"[+-]\d+\.\d %", said) == [f"{100 * off:+.1f} %" for off in offs]
    assert max(map(abs, offs)) < 0.15  # what was wanted
