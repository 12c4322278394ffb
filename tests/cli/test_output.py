"""stdout is the answer, JSON is strict, progress gives a sign of life."""

from __future__ import annotations

import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from flashhead_edge.cli.common import answer_only, figures, plain, write_json
from flashhead_edge.cli.display import plain_lines, shown_progress, subject


@dataclass
class Sample:
    share: float
    where: Path


def test_json_is_strict_and_knows_numpy() -> None:
    document = {
        "margin": math.inf,
        "nan": np.float32("nan"),
        "count": np.int64(3),
        "array": np.array([[1, 2]], np.int32),
        "sample": Sample(0.5, Path("a/b")),
        "yes": True,
        "pair": (1, "ü"),
        4: None,
    }
    out = io.StringIO()
    write_json(document, out)
    text = out.getvalue()
    assert text.endswith("}\n")
    assert "ü" in text
    assert "Infinity" not in text
    assert "NaN" not in text
    assert plain(document) == {
        "margin": None, "nan": None, "count": 3, "array": [[1, 2]], "sample": {"share": 0.5, "where": "a/b"}, "yes": True, "pair": [1, "ü"], "4": None,
    }  # fmt: skip


def test_json_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="object has no form in JSON"):
        plain({"x": object()})


def test_libraries_cannot_write_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with answer_only() as stdout:
        print("noise")  # noqa: T201
        stdout.write("answer")
    assert capsys.readouterr() == ("answer", "noise\n")


def test_figures_go_to_stderr_nested_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    figures("title", {"bytes": 1234567, "share": 0.123456789, "deep": {"flag": True}, "many": list(range(20)), "none": None})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["title", "  bytes  1,234,567", "  share  0.1235", "  deep", "    flag  yes", "  many: 20 entries (--json shows them)"]


def test_silence_is_broken_and_new_subjects_are_said() -> None:
    stream = io.StringIO()
    with plain_lines("loading", stream, silence_s=0.2) as progress:
        time.sleep(0.75)
        progress("clustering: pass 1", 0.25)
        progress("clustering: pass 2", 0.5)
        time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    loading = [line for line in lines if line.endswith("loading")]
    assert 3 <= len(loading) <= 5  # at once, then every 0.2 s
    assert [line.split("] ")[1] for line in lines if "clustering" in line][:2] == [" 25 % clustering: pass 1", " 50 % clustering: pass 2"]


def test_progress_stops_with_its_block() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="inside"), plain_lines("working", stream, silence_s=0.1):
        raise ValueError("inside")
    said = stream.getvalue()
    time.sleep(0.3)
    assert stream.getvalue() == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_progress("loading") as progress:
        progress("capturing [hidden] states: window 3", 0.5)
        progress("capturing [hidden] states: window 6", 1.0)
        progress("clustering", None)
    shown = terminal.getvalue()
    assert "loading" in shown
    assert "capturing [hidden] states: window 6" in shown
    assert "100%" in shown
    assert "clustering" in shown


def test_subject_is_what_stands_before_the_colon() -> None:
    assert subject("clustering: pass 3, objective 0.5") == "clustering"
    assert subject("loading") == "loading"
