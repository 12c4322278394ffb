"""evaluate, inspect and doctor on a real checkpoint of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import one_document

import flashhead_edge


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lamps.txt"
    path.write_text("Lamps are lit at dusk, and the keeper counts them twice. " * 20, encoding="utf-8")
    return path


def test_evaluate_prints_one_document_and_writes_the_report(inside, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = inside("evaluate", checkpoint, "--text", text, "--positions", 300, "--html", tmp_path / "report.html", "--json")
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    wanted = {"positions", "top1_agreement", "top1_agreement_interval", "coverage", "bytes_per_step", "bytes_per_step_p99", "dense_bytes_per_step", "rivals"}
    assert wanted <= document.keys()
    assert document["positions"] == 300
    assert document["top1_agreement"] == 1.0  # its head leaves nothing out
    assert document["dense_bytes_per_step"] == 2 * 256 * 32
    assert len(document["rivals"]) >= 4
    assert document["command"].startswith(f"flashhead evaluate {checkpoint} --text ")
    assert all(wanted - {"rivals"} <= rival.keys() for rival in document["rivals"])
    assert "lamps.txt" in result.stderr  # the table, for a person
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_evaluate_without_json_prints_the_table_on_stdout(inside, checkpoint: Path, text: Path) -> None:
    result = inside("evaluate", checkpoint, "--text", text, "--positions", 64)
    assert result.returncode == 0, result.stderr
    assert "100.00" in result.stdout
    assert "lamps.txt" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "nowhere.txt"), "evaluation text nowhere.txt: no such file"),
        (("--text", "{text}", "--html", "nowhere/report.html"), "does not exist"),
    ],
    ids=["text", "html"],
)
def test_evaluate_refuses_before_it_works(inside, checkpoint: Path, text: Path, arguments: tuple[str, ...], words: str) -> None:
    result = inside("evaluate", checkpoint, *(a.format(text=text) for a in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr.splitlines()[-1]


def test_inspect_says_what_is_in_a_checkpoint(inside, checkpoint: Path) -> None:
    document = one_document(inside("inspect", checkpoint, "--json").stdout)
    assert document["head"] == "fitted"
    assert (document["vocab_size"], document["hidden_size"], document["n_clusters"], document["cluster_size"]) == (256, 32, 32, 8)
    assert document["always_scored"] == 2
    assert [stage["code"] for stage in document["stages"].values()] == ["int", "int"]
    assert document["stages"]["1"]["bits_per_column"] == 4
    assert document["stages"]["1"]["margin"] is None  # infinite
    assert document["bytes"]["dense_per_step"] == 2 * 256 * 32
    shown = inside("inspect", checkpoint)
    assert "fitted" in shown.stdout
    assert shown.stderr == ""


def test_index_bytes_are_those_of_the_file(inside, checkpoint: Path) -> None:
    """What `inspect` counts is what lies on the disk, but for the header and a few numbers: margins, caps, widths of codes of one width."""
    document = one_document(inside("inspect", checkpoint, "--json").stdout)
    file = checkpoint / "flash_head_assets/index.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert 0 <= file.stat().st_size - header - document["bytes"]["index"] < 150


def test_inspect_names_a_damaged_file(inside, checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    file = copy / "flash_head_assets/index.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    result = inside("inspect", copy)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "index.safetensors" in result.stderr


def test_doctor_json_is_one_document(inside) -> None:
    result = inside("doctor", "--json")
    assert result.returncode == 0
    document = one_document(result.stdout)
    assert document["flashhead_edge"] == flashhead_edge.__version__
    assert {"torch", "Python"} <= {f["name"] for f in document["facts"]}
    shown = inside("doctor")
    assert len(shown.stdout.splitlines()) == len(document["facts"]) + 1


def test_json_reader_is_strict() -> None:
    """The helper that the tests above rely on."""
    with pytest.raises(json.JSONDecodeError):
        one_document("{}\n{}")
    with pytest.raises(AssertionError):
        one_document('{"x": NaN}')


def test_evaluate_without_rivals_gives_the_same_figures_of_the_head_itself(inside, checkpoint: Path, text: Path) -> None:
    """Everything but the rivals is as it is beside them."""
    beside = one_document(inside("evaluate", checkpoint, "--text", text, "--positions", 200, "--json").stdout)
    alone = one_document(inside("evaluate", checkpoint, "--text", text, "--positions", 200, "--no-rivals", "--json").stdout)
    assert alone["rivals"] == [] and beside["rivals"]
    other = {"rivals", "command", "texts", "benchmark"}
    assert {k: v for k, v in alone.items() if k not in other} == {k: v for k, v in beside.items() if k not in other}
    records, fewer = (document["benchmark"]["records"] for document in (beside, alone))
    assert len(records) == 2 * (1 + len(beside["rivals"])) and len(fewer) == 2  # all texts together, and the one text
    run = {"run", "date", "command", "baseline"}
    assert {k: v for k, v in fewer[0].items() if k not in run} == {k: v for k, v in records[0].items() if k not in run}
