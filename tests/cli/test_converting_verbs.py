"""convert and calibrate, as a person runs them, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_tools import one_document


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_convert_then_calibrate_then_inspect(inside, model_folder: Path, tmp_path: Path) -> None:
    from flashhead_edge.checkpoint import read_index

    out = tmp_path / "out"
    converted = inside("convert", model_folder, out, "--positions", 1000, "--json")
    assert converted.returncode == 0, converted.stderr
    summary = one_document(converted.stdout)
    assert summary["head"] == "fitted"
    assert summary["target_agreement"] == 0.995
    assert summary["dense_bytes_per_step"] == 2 * 256 * 32
    assert "writing the checkpoint" in converted.stderr
    assert "target: 99.50 %" in converted.stderr  # the table, beside the document
    before = read_index(out)

    again = inside("calibrate", out, "--target-agreement", 0.98, "--positions", 1000)
    assert again.returncode == 0, again.stderr
    assert "target: 98.00 %" in again.stdout
    after = read_index(out)
    assert np.array_equal(before.token_table, after.token_table)  # not clustered again
    assert one_document(inside("inspect", out, "--json").stdout)["calibration"]["target_agreement"] == 0.98

    files = tree(tmp_path)
    refused = inside("convert", model_folder, out)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "exists already" in refused.stderr.splitlines()[-1]
    assert tree(tmp_path) == files


def test_published_head_needs_no_calibration(inside, model_folder: Path, tmp_path: Path) -> None:
    converted = inside("convert", model_folder, tmp_path / "out", "--head", "published", "--json")
    assert converted.returncode == 0, converted.stderr
    assert one_document(converted.stdout)["head"] == "published"
    described = one_document(inside("inspect", tmp_path / "out", "--json").stdout)
    assert described["head"] == "published"
    assert described["stages"] == {}


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("empty", (), "empty"),
        ("{model}", ("--target-agreement", 0.2), "target agreement is 0.2"),
        ("{model}", ("--positions", 10), "10 is not in the range x>=1000"),
        ("{model}", ("--device", "abacus"), "abacus"),
        ("{model}", ("--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=["no model", "target", "positions", "device", "text"],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    inside, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path, model: str, more: tuple[object, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = inside("convert", model.format(model=model_folder), "out", *more)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("flashhead: ")
    assert words in last
    assert tree(tmp_path) == ["empty"]
