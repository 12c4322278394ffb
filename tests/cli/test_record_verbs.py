"""flashhead report, flashhead bench suite, flashhead bench compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import one_document
from small_records import made, many

from flashhead_edge.bench import suite
from flashhead_edge.errors import SettingsError
from flashhead_edge.records import form
from flashhead_edge.records.folder import KEY, read_records, write_records
from flashhead_edge.records.form import document

# report


def test_report_shows_the_rest_where_a_file_is_broken(inside: Callable[..., Any], tmp_path: Path) -> None:
    write_records(tmp_path / "runs/a.json", many(5))
    (tmp_path / "runs/b.json").write_text("{")
    result = inside("report", tmp_path / "runs", "-o", tmp_path / "index.html", "--json")
    assert result.returncode == 0
    answer = one_document(result.stdout)
    assert answer["records"] == 5 and answer["page"] == str(tmp_path / "index.html")
    assert answer["left_out"][0].startswith("b.json: it cannot be read as JSON")
    assert "left out: b.json" in result.stderr
    assert "b.json: it cannot be read" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "-o", "x.html"), "nowhere: no such file or folder, expected records"),
        (("bad.json", "-o", "x.html"), "report: no record to show, expected one at least (bad.json: its form is 7"),
        (("good.json",), "Missing option '-o'"),
        (("good.json", "-o", "no/folder/x.html"), "does not exist"),
        (("-o", "x.html"), "Missing argument 'RECORDS...'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_report_refuses_and_writes_nothing(
    inside: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"schema": 7, "records": []}')
    write_records(Path("good.json"), [made()])
    result = inside("report", *arguments)
    assert result.returncode == 2
    assert words in result.stderr and result.stderr.splitlines()[-1].startswith("flashhead: ")
    assert result.stdout == ""
    assert not Path("x.html").exists()


# compare


def test_compare_ends_with_1_on_a_loss_beyond_the_spread(inside: Callable[..., Any], tmp_path: Path) -> None:
    write_records(tmp_path / "a.json", [made(), made(batch=4, us=50.0)])
    write_records(tmp_path / "b.json", [made("run-2"), made("run-2", batch=4, us=60.0)])
    result = inside("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert result.returncode == 1
    answer = one_document(result.stdout)
    lost = [c for c in answer["changes"] if c["verdict"] == "lost"]
    assert [(c["record"]["batch"], c["measure"]) for c in lost] == [(4, "microseconds")]
    assert lost[0]["ratio"] == pytest.approx(50 / 60)
    assert "1 lost beyond the spread and 2 %" in result.stderr
    assert inside("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--tolerance", "0.3").returncode == 0
    assert inside("bench", "compare", tmp_path / "b.json", tmp_path / "a.json").returncode == 0  # a gain


def test_compare_fails_where_a_file_of_after_is_broken_or_all_is_asked_for(inside: Callable[..., Any], tmp_path: Path) -> None:
    """A bench that has vanished is no proof that nothing was lost."""
    write_records(tmp_path / "a/x.json", [made(), made(batch=4)])
    write_records(tmp_path / "a/y.json", [made(model="Qwen3-1.7B")])
    write_records(tmp_path / "b/x.json", [made("run-2"), made("run-2", batch=4)])
    sides = tmp_path / "a", tmp_path / "b"
    result = inside("bench", "compare", *sides, "--json")
    assert result.returncode == 0
    assert one_document(result.stdout)["only_before"] == ["FlashHead on Qwen3-1.7B (head, bf16, batch 1; cuda, NVIDIA H100 80GB HBM3)"]
    assert "only before: FlashHead on Qwen3-1.7B" in result.stderr
    assert inside("bench", "compare", *sides, "--all").returncode == 1
    (tmp_path / "b/y.json").write_text("{")
    result = inside("bench", "compare", *sides)
    assert result.returncode == 1 and "left out: y.json: it cannot be read" in result.stderr


def test_compare_shows_what_moved_and_says_what_it_is_about(inside: Callable[..., Any], tmp_path: Path) -> None:
    def text(run: str, name: str, us: float) -> dict[str, Any]:
        return made(run, settings={"text": name}, us=us)

    write_records(tmp_path / "a.json", [text("run-1", "GSM8K", 50.0), text("run-1", "German", 50.0)])
    write_records(tmp_path / "b.json", [text("run-2", "GSM8K", 50.0), text("run-2", "German", 25.0)])
    write_records(tmp_path / "c.json", [text("run-3", "GSM8K", 90.0)])
    found = inside("bench", "compare", tmp_path / "a.json", tmp_path / "b.json").stdout
    assert "German" in found and "GSM8K" not in found and "5 the same" in found
    result = inside("bench", "compare", tmp_path / "a.json", tmp_path / "c.json", "--json")
    assert result.returncode == 1
    (lost,) = [c for c in one_document(result.stdout)["changes"] if c["verdict"] == "lost"]
    assert lost["record"]["settings"] == {"text": "GSM8K"} and "command" not in lost["record"]


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_compare_takes_no_tolerance_that_nothing_can_fail(inside: Callable[..., Any], tmp_path: Path, tolerance: str) -> None:
    write_records(tmp_path / "a.json", [made()])
    assert inside("bench", "compare", tmp_path / "a.json", tmp_path / "a.json", "--tolerance", tolerance).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_a_reader_that_goes_is_no_loss(root: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "a.json", many(300))
    command = f"{sys.executable} -m flashhead_edge bench compare a.json a.json --json | true; echo ${{PIPESTATUS[0]}}"
    there = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=there)
    assert done.stdout.split() == ["141"], done.stderr


def test_compare_without_a_common_subject_is_wrong_input(inside: Callable[..., Any], tmp_path: Path) -> None:
    write_records(tmp_path / "a.json", [made()])
    write_records(tmp_path / "b.json", [made("run-2", device="another")])
    result = inside("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.returncode == 2
    assert "have no subject in common (1 and 1 records)" in result.stderr


# suite


def document_of(run: str) -> dict[str, Any]:
    return {"records": ["the bench's own"], KEY: document([made(run)])}


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plan of four tasks whose command line is a program of this test: `NAME --json` writes to calls.txt and does what its name says."""
    program = tmp_path / "stand_in.py"
    program.write_text(
        "import json, os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'process')!r}).write_text(str(os.getpid()))\n"
        f"pathlib.Path({str(tmp_path / 'calls.txt')!r}).open('a').write(sys.argv[1] + '\\n')\n"
        "print('[    3 s]  40 % reading', file=sys.stderr, flush=True)\n"
        f"if sys.argv[1] == 'slow' and not pathlib.Path({str(tmp_path / 'quick')!r}).exists(): time.sleep(600)\n"
        "if sys.argv[1] == 'fails': print('flashhead: it is broken, expected whole; mend it', file=sys.stderr); sys.exit(1)\n"
        "if sys.argv[1] == 'chats': print('hello'); sys.exit(0)\n"
        f"document = json.loads({json.dumps(document_of('RUN'))!r}.replace('RUN', sys.argv[1]))\n"
        "print(json.dumps(document))\n"
    )
    monkeypatch.setattr(suite, "FLASHHEAD", (sys.executable, str(program)))
    tasks = [
        suite.Task("one", ("one",), 1, ()),
        suite.Task("away", ("away",), 1, (lambda: None, lambda: "no part is here; install the part")),
        suite.Task("fails", ("fails",), 1, ()),
        suite.Task("chats", ("chats",), 1, ()),
    ]
    monkeypatch.setattr(suite, "plan", lambda inputs: tasks)
    return tmp_path


def test_suite_keeps_records_says_what_it_skips_and_goes_on(benches: Path) -> None:
    said: list[str] = []
    shown: list[str] = []
    out = benches / "out"
    first = suite.run_suite(out, suite.Inputs(), lambda message, share=None: shown.append(message), said.append)
    assert [(o.task, o.what, o.records) for o in first] == [("away", "skipped", 0), ("one", "done", 1), ("fails", "failed", 0), ("chats", "failed", 0)]
    assert "skipped away: no part is here; install the part" in said
    assert "failed fails: flashhead fails ended with 1: it is broken, expected whole; mend it" in said
    assert "failed chats: flashhead chats printed no JSON document" in said
    assert any(m.startswith("one (1 of 3, about ") and m.endswith("left): reading") for m in shown)
    assert [e.record["run"] for e in read_records([out]).entries] == ["one"]
    assert json.loads((out / "one.json").read_text())["records"] == ["the bench's own"]
    said.clear()
    second = suite.run_suite(out, suite.Inputs(), said=said.append)
    assert [o.what for o in second] == ["skipped", "kept", "failed", "failed"]
    assert "kept one: 1 records from before" in said
    assert (benches / "calls.txt").read_text().split() == ["one", "fails", "chats", "fails", "chats"]  # what is done is not done again
    (out / "one.json").write_text("{")
    said.clear()
    assert [o.what for o in suite.run_suite(out, suite.Inputs(), said=said.append)][1] == "done"
    assert any("one: its file is damaged" in s for s in said)


def test_suite_refuses_a_folder_of_other_inputs_or_another_commit(benches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = benches / "out"
    suite.run_suite(out, suite.Inputs())
    with pytest.raises(SettingsError, match=r"it holds a suite of quick false, expected true, .*name a new folder"):
        suite.run_suite(out, suite.Inputs(quick=True))
    monkeypatch.setattr(suite, "commit", lambda: "another")
    with pytest.raises(SettingsError, match=r"it holds a suite of commit .*, expected \"another\""):
        suite.run_suite(out, suite.Inputs())
    (out / suite.STATE).write_text("{")
    with pytest.raises(SettingsError, match="it is no JSON"):
        suite.run_suite(out, suite.Inputs())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_suite_keeps_what_was_done_and_leaves_no_process(benches: Path, root: Path) -> None:
    script, out = benches / "run.py", benches / "out"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom flashhead_edge.bench import suite\n"
        f"suite.FLASHHEAD = (sys.executable, {str(benches / 'stand_in.py')!r})\n"
        "suite.plan = lambda inputs: [suite.Task(n, (n,), 1, ()) for n in ('one', 'slow', 'two')]\n"
        "suite.run_suite(Path(sys.argv[1]), suite.Inputs())\n"
    )
    start = [sys.executable, str(script), str(out)]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, cwd=root)
    calls = benches / "calls.txt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (calls.exists() and calls.read_text().split() == ["one", "slow"]):
        time.sleep(0.05)
    assert calls.read_text().split() == ["one", "slow"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((benches / "process").read_text()), 0)
    assert sorted(p.name for p in out.iterdir()) == [suite.STATE, "one.json"]
    (benches / "quick").write_text("")
    done = subprocess.run(start, capture_output=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert calls.read_text().split() == ["one", "slow", "slow", "two"]


def test_the_real_plan_names_calls_that_the_command_line_knows(inside: Callable[..., Any], tmp_path: Path) -> None:
    for inputs in (suite.Inputs(), suite.Inputs(tmp_path, tmp_path / "x.txt", tmp_path / "x.gguf", ("gsm8k=x.jsonl", "wikitext")), suite.Inputs(quick=True)):
        tasks = suite.plan(inputs)
        assert len({t.name for t in tasks}) == len(tasks)
        for task in tasks:
            assert inside(*task.arguments, "--json", "--help").returncode == 0, task


def test_without_a_checkpoint_the_tasks_on_it_say_so() -> None:
    reasons = {t.name: suite.reason(t) for t in suite.plan(suite.Inputs())}
    assert (
        reasons["evaluate"]
        == reasons["quality-text"]
        == reasons["decode-checkpoint"]
        == reasons["onnx-checkpoint"]
        == "it needs a checkpoint and a text: --checkpoint FOLDER --text FILE"
    )
    assert suite.module("no_such_package", "x")() == "no_such_package is not installed; pip install 'flashhead-edge[x]'"


def test_suite_asks_for_checkpoint_and_text_together(inside: Callable[..., Any], tmp_path: Path) -> None:
    result = inside("bench", "suite", tmp_path / "out", "--checkpoint", tmp_path)
    assert result.returncode == 2
    assert "--checkpoint and --text belong together" in result.stderr
    assert not (tmp_path / "out").exists()
    for asked, words in (
        (("--task", "gsm8k"), "--task is asked of a checkpoint"),
        (("--checkpoint", tmp_path, "--text", __file__, "--task", "gsm8k", "--task", "gsm8k=x"), "a task is asked once"),
    ):
        result = inside("bench", "suite", tmp_path / "out", *asked)
        assert result.returncode == 2 and words in result.stderr and not (tmp_path / "out").exists()


def test_quality_is_a_task_of_its_own_for_the_text_and_for_each_question(tmp_path: Path) -> None:
    tasks = {t.name: t for t in suite.plan(suite.Inputs(tmp_path, tmp_path / "x.txt", None, ("gsm8k=/data/g.jsonl", "wikitext"), quick=True))}
    assert tasks["quality-text"].arguments[:5] == ("bench", "quality", str(tmp_path), "--text", str(tmp_path / "x.txt"))
    assert tasks["quality-gsm8k"].arguments == ("bench", "quality", str(tmp_path), "--task", "gsm8k=/data/g.jsonl", "--limit", "8")
    assert tasks["quality-wikitext"].arguments[4] == "wikitext"


def test_the_time_left_in_words() -> None:
    assert [suite.minutes(s) for s in (4.4, 89, 91, 3500, 4800)] == ["4 s", "89 s", "2 min", "58 min", "1 h 20 min"]


# what is not installed


@pytest.mark.parametrize("package", ["plotly", "jsonschema"])
def test_report_without_its_extra_is_one_sentence(inside: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    write_records(tmp_path / "a.json", [made()])
    form._validator.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = inside("report", tmp_path / "a.json", "-o", tmp_path / "index.html")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"flashhead: {package} is not installed; pip install 'flashhead-edge[report]'"
    assert not (tmp_path / "index.html").exists()


def test_a_bench_needs_no_extra_for_its_records() -> None:
    """A board that measures has neither a plotting library nor one that checks schemas."""
    code = (
        "import sys; sys.modules['jsonschema'] = sys.modules['plotly'] = None\n"
        "from flashhead_edge.bench.as_records import with_records\n"
        "print(len(with_records('decode', {'records': [{'model': 'x', 'head': 'FlashHead', 'batch': 1}]}, 'x')['benchmark']['left_out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "1", done.stderr
