"""docs/benchmarks, and the tables that `make docs` makes of it."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_records import made, predicted

from flashhead_edge.errors import SettingsError
from flashhead_edge.records.folder import Entry, read_records, write_records
from flashhead_edge.records.form import figure, identity
from flashhead_edge.report.pages import CITED, benchmarks_block, cited, faithful_block, headline_block, with_block, with_figures

FOLDER = "docs/benchmarks"


@pytest.fixture(scope="module")
def pages(root: Path) -> Any:
    return runpy.run_path(str(root / "scripts/benchmark_pages.py"))["pages"]


def test_pages_are_current(root: Path, pages: Any) -> None:
    """Red: run `make docs`."""
    stale = [path.relative_to(root).as_posix() for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == []


def test_our_records_are_small_whole_and_say_where_they_come_from(root: Path) -> None:
    found = read_records([root / FOLDER])
    assert found.refused == ()
    assert len(found.entries) > 200
    assert all(p.stat().st_size < 400_000 for p in (root / FOLDER).glob("*.json"))
    for e in found.entries:
        r = e.record
        assert r["date"] and r["commit"] and r["command"], e.file
        assert "/" not in r["device"] and "/tmp" not in r["command"]
        assert r["source"] is None or (root / r["source"].split(":")[0]).is_file(), r["source"]


def test_our_figures_stand_on_the_pages_that_they_name(root: Path) -> None:
    """A record that was taken from a page says no more than it: each median of a time or a rate is there, as people write it."""
    texts: dict[str, str] = {}
    missing = []
    for e in read_records([root / FOLDER]).entries:
        r = e.record
        if r["source"] is None:  # a file that a bench wrote
            continue
        source = r["source"].split(":")[0]
        page = "docs/kernels.md" if source == "scripts/predict_boards.py" else source  # the script's table is kept there
        text = texts.setdefault(page, (root / page).read_text(encoding="utf-8"))
        text = text[: text.find("<!-- records:")] + text[text.find("<!-- end of records") :] if "<!-- records:" in text else text
        for side in (r, r["baseline"]):
            for name, scale in (("microseconds", 1e-3 if r["bench"] == "onnx" and r["part"] == "step" else 1.0), ("tokens_per_second", 1.0)):
                if side[name] is None or (side is r["baseline"] and "the ratio times ours" in (r["note"] or "")):
                    continue
                value = side[name]["median"] * scale
                if not any(f"{value:,.{digits}f}" in text for digits in (0, 1, 2)):
                    missing.append((e.file, r["model"], name, value))
    assert missing == []


def test_the_predictions_are_what_the_script_predicts(root: Path) -> None:
    """Red: python scripts/predict_boards.py docs/benchmarks/boards-predicted.json."""
    kept = [dict(e.record) for e in read_records([root / FOLDER / "boards-predicted.json"]).entries]
    script = runpy.run_path(str(root / "scripts/predict_boards.py"))
    assert script["records"](kept[0]["date"], kept[0]["commit"]) == kept
    assert len(kept) == 15


def test_records_of_a_run_are_kept_without_its_machine_s_paths(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(root / "scripts/keep_records.py"))
    command = "flashhead bench quality /tmp/x/OUT --task gsm8k=/data/g.jsonl --text '/a b/c.txt' --limit 8"
    write_records(tmp_path / "run.json", [made(command=command, commit=None)])
    keep = script["main"]
    monkeypatch.setattr("sys.argv", ["keep_records.py", str(tmp_path / "kept.json"), str(tmp_path / "run.json"), "--commit", "abc1234"])
    keep()
    (one,) = read_records([tmp_path / "kept.json"]).entries
    assert one.record == made(command="flashhead bench quality OUT --task gsm8k=g.jsonl --text c.txt --limit 8", commit="abc1234")
    monkeypatch.setattr("sys.argv", ["keep_records.py", str(tmp_path / "other.json"), str(tmp_path / "run.json")])
    with pytest.raises(SystemExit, match="FlashHead on Llama-3.2-1B: the record has no commit"):
        keep()
    assert not (tmp_path / "other.json").exists()


def test_a_changed_record_makes_the_pages_stale(root: Path, tmp_path: Path, pages: Any) -> None:
    shutil.copytree(root / FOLDER, tmp_path / FOLDER)
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        shutil.copy(page, tmp_path / page.relative_to(root))
    file = tmp_path / FOLDER / "tensorrt-h100.json"
    whole = json.loads(file.read_text())
    for r in whole["records"]:
        if (r["head"], r["model"], r["batch"]) == ("FlashHead", "Llama-3.2-1B", 1):
            r["microseconds"] = figure(987.6)
    file.write_text(json.dumps(whole))
    changed = pages(tmp_path)
    assert all("987.6 us" in changed[tmp_path / name] for name in ("README.md", "docs/benchmarks.md"))
    file.write_text(file.read_text().replace('"baseline"', '"base"'))
    with pytest.raises(SettingsError, match=r"tensorrt-h100.json, record 1"):
        pages(tmp_path)


def side(*records: dict[str, Any]) -> list[Entry]:
    return [Entry(r, identity(r), "a.json") for r in records]


def test_the_table_keeps_predictions_apart_and_joins_runs() -> None:
    block = benchmarks_block(side(made("a", us=24.0), made("b", us=25.0), made("c", us=27.0), made(head="published"), predicted(), made("d", model="a|b<i>")))
    rows = [line for line in block.splitlines() if line.startswith("| ") and "---" not in line and not line.startswith("| model")]
    assert len(rows) == 3
    assert "25 us (23.52 to 27.54)" in rows[0] and "dense bf16: 200 us (196 to 204)" in rows[0]
    assert rows[1].startswith("| a\\|b&lt;i> |")
    assert rows[2].startswith("| *Llama-3.2-1B* |") and block.index("Predicted") < block.index("*136 us*")


def test_blocks_are_replaced_between_their_markers_alone() -> None:
    page = "before\n<!-- records: made -->\nold\n<!-- end of records -->\nafter \\1\n"
    once = with_block(page, "records", "| new \\g<1> |")
    assert once == "before\n<!-- records: made -->\n\n| new \\g<1> |\n\n<!-- end of records -->\nafter \\1\n"
    assert with_block(once, "records", "| new \\g<1> |") == once
    for broken in ("no markers", page + page):
        with pytest.raises(SettingsError, match=r"blocks named records, expected one"):
            with_block(broken, "records", "x")


def test_a_headline_without_its_record_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"headline 'The head's step.*0 subjects of records, expected one"):
        headline_block([], FOLDER)


def test_figures_in_sentences_come_from_records(root: Path) -> None:
    entries = read_records([root / FOLDER]).entries
    page = "We had <!-- figure onnx-1 -->99<!-- end --> tokens a second,\n<!-- figure int4-bytes_share --><!-- end --> of the bytes; the rest <stays>.\n"
    assert with_figures(page, entries) == page.replace(">99<", ">132<").replace("bytes_share --><", "bytes_share -->28.0 %<")
    texts = "".join((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md", "docs/quality.md"))
    assert {name for name in CITED if f"<!-- figure {name} -->" not in texts} == set()  # what nobody cites is not kept
    with pytest.raises(SettingsError, match=r"figure onnx-9: no such figure, expected one of vllm-3b"):
        with_figures("<!-- figure onnx-9 -->1<!-- end -->", entries)
    with pytest.raises(SettingsError, match=r"figure tensorrt: 0 subjects of records, expected one"):
        cited("tensorrt", [e for e in entries if e.record["bench"] != "tensorrt"])


def test_the_table_of_agreement_wants_both_targets_of_a_text(root: Path) -> None:
    entries = read_records([root / FOLDER]).entries
    assert faithful_block(entries).splitlines()[-1] == "| mean | 99.92 % at **1.42 %** | 100.00 % at **2.61 %** |"
    one = [e for e in entries if not (e.record["settings"].get("text") == "GSM8K" and e.record["target_agreement"] == 0.999)]
    with pytest.raises(SettingsError, match=r"no record of GSM8K at 99.9 %, expected both targets"):
        faithful_block(one)
