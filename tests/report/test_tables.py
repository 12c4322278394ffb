"""Tables and words: the numbers are those of the document, and no token's text is taken for markup."""

from __future__ import annotations

import io
from typing import Any

import pytest
from report_document import document
from rich.console import Console

from flashhead_edge.report import words
from flashhead_edge.report.tables import show_conversion, show_evaluation, show_inspection


def printed(show: Any, what: Any) -> str:
    console = Console(file=io.StringIO(), width=170)
    show(what, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_evaluation() -> None:
    d = document()
    text = printed(show_evaluation, d)
    for record in [*d["texts"], d, *d["rivals"]]:
        assert words.percent(record["top1_agreement"]) in text
        assert words.percent(record["bytes_share"]) in text
    for rival in d["rivals"]:
        assert rival["name"] in text
    assert "[red]x (" in text
    assert words.verdict(d)[1] in text.replace("\n", " ")


def test_one_text_without_rivals_or_worst() -> None:
    d = document(1) | {"rivals": [], "worst_tokens": []}
    text = printed(show_evaluation, d)
    assert "all texts" not in text
    assert "worst tokens" not in text


def test_narrow_console_keeps_every_word() -> None:
    console = Console(file=io.StringIO(), width=60)
    show_evaluation(document(1), console)
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def conversion() -> dict[str, Any]:
    text = {
        "name": "own text",
        "positions": 60_000,
        "required": 0.9995,
        "top1_agreement": 0.99952,
        "top1_agreement_interval": [0.9993, 0.9997],
        "misses": 29,
        "reached": True,
    }
    points = [{"target_agreement": t, "held_out_agreement": t, "cost": c, "reached": t < 0.9995} for t, c in ((0.99, 9e5), (0.995, 1.1e6), (0.9995, 3e6))]
    return {
        "target_agreement": 0.995, "own_text_target": 0.9995, "chosen": "clusters of 64, rows product8 + bits96", "texts": [text],
        "frontier": points, "bytes_per_step": 1.13e6, "bytes_per_step_p99": 3.3e6, "dense_bytes_per_step": 56_600_000, "reached": True, "extrapolated": [],
    }  # fmt: skip


def test_conversion() -> None:
    text = printed(show_conversion, conversion())
    (taken,) = [line for line in text.splitlines() if line.strip().startswith("taken ")]
    assert "99.50 %" in taken
    assert "1.1 MB" in taken
    assert "1.94 %" in taken
    assert "product8 + bits96" in text
    assert "99 of 100 steps read at most 3.3 MB" in text
    assert text.count("NO") == 1  # the last point of the frontier
    assert "extrapolated" not in text
    timed = printed(show_conversion, conversion() | {"device": "orin"})
    assert "microseconds on orin" in timed
    assert "of dense " not in timed


def test_conversion_says_what_failed() -> None:
    text = printed(show_conversion, conversion() | {"reached": False, "extrapolated": ["clusters"]})
    assert "give up none of its held-out tokens" in " ".join(text.split())
    assert "fewer than 10 held-out misses" in text


def test_inspection() -> None:
    text = printed(show_inspection, {"head": "fitted", "bytes": {"index": 12345, "share": 0.25}, "texts": [{"a": 1}, {"a": 2}], "margin": None, "on": True})
    for part in ("fitted", "12,345", "0.25", "2 entries", "–", "yes"):
        assert part in text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (1.0, "100.00 %"), (0.5, "50.00 %"), (0.99996, "99.996 %"), (0.999999, "99.9999 %"), (0.99994, "99.99 %"), (0.0, "0.00 %")]
)
def test_percent_never_rounds_up_to_all(share: float | None, text: str) -> None:
    assert words.percent(share) == text


@pytest.mark.parametrize(
    ("target", "lowest", "high", "kind"),
    [(0.995, 0.995, 0.997, "kept"), (0.995, 0.994, 0.996, "close"), (0.995, 0.98, 0.99, "missed"), (None, 0.9, 0.95, "none")],
)
def test_verdict(target: float | None, lowest: float, high: float, kind: str) -> None:
    s = {"target_agreement": target, "lowest_agreement": lowest, "lowest_agreement_interval": [0.5, high], "lowest_agreement_text": "a.txt", "texts": 2}
    found, sentence = words.verdict({"summary": s})
    assert found == kind
    assert words.percent(lowest) in sentence
    assert "a.txt" in sentence
    assert ("starts at 50.00 %" in sentence) == (kind == "kept")  # few positions do not make a promise sure


def test_visible() -> None:
    assert [words.visible(t) for t in (None, "", " a\n\t")] == ["–", "(empty)", "␣a↵⇥"]
