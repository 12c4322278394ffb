"""What a person sees when something is wrong: one line, the right exit code, a traceback only where it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge import inspection
from flashhead_edge.cli import main
from flashhead_edge.errors import CheckpointError, DeviceError


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def describe(folder: object) -> None:
        raise error

    monkeypatch.setattr(inspection, "describe", describe)


def test_missing_folder_is_one_line(flashhead, tmp_path: Path) -> None:
    result = flashhead("inspect", tmp_path / "nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("flashhead: ")
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(CheckpointError("a: b;\n  do c"), 2), (DeviceError("a: b;\n  do c"), 1)], ids=["input", "failure"])
def test_flashhead_error_is_its_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    fail_with(monkeypatch, error)
    assert exit_code("inspect", "x") == code
    assert capsys.readouterr() == ("", "flashhead: a: b; do c\n")


def test_unexpected_error_is_one_line_with_a_hint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, RuntimeError("first\nsecond"))
    assert exit_code("inspect", "x") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "flashhead: RuntimeError: first second (a defect or a broken machine: flashhead --debug shows where it happened)\n"


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "x"), ("inspect", "x", "--debug")], ids=["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError("why"), CheckpointError("why")], ids=["unexpected", "expected"])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], error: Exception) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match="why"):
        main(list(arguments))


def test_debug_in_a_process_exits_1_with_the_traceback(flashhead, tmp_path: Path) -> None:
    result = flashhead("inspect", tmp_path / "nowhere", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "CheckpointError" in result.stderr


def test_interrupt_exits_130_without_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert exit_code("inspect", "x") == 130
    assert capsys.readouterr().err.strip() == "flashhead: interrupted"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'transformers'", name="transformers.models"))
    assert exit_code("inspect", "x") == 1
    assert capsys.readouterr().err == "flashhead: transformers is not installed; pip install 'flashhead-edge[torch]'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "model"), "Missing argument 'OUT'"),
        (("convert", "model", "out", "--head", "other"), "'fitted', 'published'"),
        (("convert", "model", "out", "--positions", "0"), "--positions"),
        (("evaluate", "out"), "Missing option '--text'"),
        (("generate", "out", "--prompt", "x", "--exact", "--temperature", "1"), "--exact is the dense head's greedy text"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_and_exits_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert exit_code(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("flashhead: ")
    assert words in err
    assert "--help" in err


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    for verb in ("convert", "calibrate", "evaluate", "generate", "chat", "inspect", "doctor"):
        assert f"  {verb} " in out
        assert exit_code(verb, "--help") == 0
        assert "--json" in capsys.readouterr().out


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    import flashhead_edge

    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"flashhead, version {flashhead_edge.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_said(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-m", "flashhead_edge", "doctor", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "flashhead: the output: the disk is full, expected room for the answer; free some space or write it elsewhere"


def test_a_reader_that_goes_is_no_defect() -> None:
    """flashhead doctor --json | true: nothing is said, and the exit code is SIGPIPE's, which no failure has."""
    run = [sys.executable, "-m", "flashhead_edge", "doctor", "--json"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 141
    assert all(line.endswith("looking") for line in said.splitlines())  # progress, and nothing of an error
