"""The form of records, files of them, and the comparison of two sides."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

import bench_onnx_document
import pytest
import report_document
from small_records import made, many, predicted

from flashhead_edge.bench.as_records import CONVERTERS, as_records, machine, with_records
from flashhead_edge.bench.provenance import calibration
from flashhead_edge.errors import FlashHeadError, SettingsError
from flashhead_edge.records.compare import compare
from flashhead_edge.records.folder import KEY, Entry, read_records, write_records
from flashhead_edge.records.form import FIELDS, MEASURES, baseline, check_record, document, figure, identity, record, schema

MOMENT = datetime.datetime(2026, 11, 28, 4, 0, tzinfo=datetime.timezone.utc)


def test_schema_is_a_schema_and_names_the_fields_of_the_code() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())
    parts = schema()["$defs"]
    assert set(parts["record"]["required"]) == set(parts["record"]["properties"]) == set(FIELDS)
    assert set(parts["baseline"]["required"]) == set(parts["baseline"]["properties"]) == {"run", "head", "backend", "backend_version", *MEASURES}


@pytest.mark.parametrize(
    "good",
    [
        made(),
        predicted(),
        made(spread=0.0),
        made(top1_agreement=None, top1_agreement_interval=None, settings={"deep": [{"x": None}]}),
        made(settings={"median": 1}, observed={"median": "x"}),
    ],
)
def test_good_records_pass(good: dict[str, Any]) -> None:
    check_record(good, "here")


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in made().items() if k != name}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (made(baseline=None), "a measured record has no baseline, expected the dense head"),
        (without("baseline"), "a measured record has no baseline"),
        (without("kind"), "'kind' is a required property"),
        (made(run="run-2") | {"baseline": made()["baseline"]}, "its baseline is of run run-1, expected its own run run-2"),
        (made() | {"speed": 3}, "'speed' was unexpected"),
        (made(kind="guessed"), "kind: 'guessed' is not one of"),
        (made(batch=0), "batch: 0 is less than the minimum of 1"),
        (made(batch=1.5), "batch: 1.5 is not of type"),
        (made(real_weights="yes"), "real_weights: 'yes' is not of type"),
        (made(top1_agreement=1.01), "top1_agreement: 1.01 is greater than the maximum of 1"),
        (made(microseconds=figure(3.0, 4.0, 5.0, "range", 2)), "microseconds has its median 3.0 outside of 4.0 to 5.0"),
        (made(microseconds=figure(-1.0)), "microseconds"),
        (made(date="yesterday"), "date: 'yesterday'"),
        (made(head=""), "head: '' should be non-empty"),
        (made(date="9999-99-99"), "date: 9999-99-99 is no day of a calendar"),
        (made(real_weights=None), "real_weights: None is not of type 'boolean'"),
        (made(top1_agreement_interval=[0.9996, 0.994]), "top1_agreement is 0.9955, outside of its interval 0.9996 to 0.994"),
        (made(top1_agreement=None), "top1_agreement is None, outside of its interval"),
        (made(baseline=baseline("run-1", "dense bf16")), "record and baseline have no microseconds or tokens_per_second both"),
        (made(baseline=baseline("run-1", "dense bf16", bytes_per_step=5e8)), "record and baseline have no microseconds or tokens_per_second both"),
        (made(part="agreement"), "record and baseline have no top1_agreement both"),
        (predicted(tokens_per_second=figure(100.0, 90.0, 110.0)), "tokens_per_second"),
        (predicted(microseconds=figure(136.0, 5.0, 200.0)), "microseconds"),
        (predicted(baseline=baseline("rule", "dense bf16", microseconds=figure(6_440.0, 6_000.0, 7_000.0, "range", 5))), "baseline"),
        (predicted(source=None), "source: None is not of type 'string'"),
        (predicted(microseconds=figure(136.0, 130.0, 140.0, "range", 5)), "microseconds"),
        ([], "[] is not of type 'object'"),
        ("x", "'x' is not of type 'object'"),
    ],
)
def test_rules_that_are_broken_are_named(bad: Any, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_record(bad, "runs/a.json, record 3")
    assert str(error.value).startswith("runs/a.json, record 3: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_unknown_names_are_defects_of_the_caller() -> None:
    with pytest.raises(TypeError, match="no field speed"):
        record(speed=3)
    with pytest.raises(TypeError, match="no field speed"):
        baseline("run", "dense", speed=3)


# files


def test_files_and_folders_are_read_whatever_their_depth(tmp_path: Path) -> None:
    records = many(12)
    write_records(tmp_path / "a.json", records[:5])
    write_records(tmp_path / "deep/er/b.json", records[5:])
    (tmp_path / "bench.json").write_text(json.dumps({"records": ["a bench's own"], KEY: document([made("run-9")])}), encoding="utf-8")
    (tmp_path / ".suite.json").write_text("{}", encoding="utf-8")
    found = read_records([tmp_path])
    assert found.refused == ()
    assert [e.record for e in found.entries] == [*records[:5], made("run-9"), *records[5:]]
    assert {e.file for e in found.entries} == {"a.json", "bench.json", "deep/er/b.json"}
    assert read_records([tmp_path / "a.json"]).entries[0].id == identity(records[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it cannot be read as JSON"),
        ("\udcff", "it cannot be read as JSON"),
        ("[" * 100_000, "it cannot be read as JSON"),
        ('{"schema": 1, "records": [NaN]}', "NaN is no number of JSON"),
        ('{"schema": 1, "records": [1e999]}', "1e999 is too large for a number"),
        ('{"schema": 1, "records": [99999999999999999999]}', "99999999999999999999 is too large for a number"),
        (json.dumps(document([made(model="\ud800")])), "record 1: it holds half a character"),
        ("[]", "it is no file of records"),
        ('{"schema": true, "records": []}', "it is no file of records"),
        ('{"records": []}', "it is no file of records"),
        ('{"schema": 2, "records": []}', "its form is 2, expected at most 1; install a newer flashhead-edge"),
        ('{"schema": 1, "records": {}}', "records: {} is not of type 'array'"),
        ('{"schema": 0, "records": []}', "its form is 0, expected 1; restore the file"),
        ('{"schema": 1, "records": [], "foo": "x"}', "'foo' was unexpected"),
        ('{"schema": 1, "records": [], "left_out": 5}', "left_out: 5 is not of type 'array'"),
        ('{"schema": 1, "records": [], "records": []}', "the name 'records' stands twice in one object"),
        (json.dumps(document([made(batch=0), *[{"kind": "measured"}] * 5])), "record 1: batch: 0 is less"),
    ],
)
def test_a_bad_file_among_good_ones_is_named_and_the_rest_read(tmp_path: Path, text: str, words: str) -> None:
    write_records(tmp_path / "good.json", [made()])
    (tmp_path / "worse.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = read_records([tmp_path])
    assert [e.record for e in found.entries] == [made()]
    assert found.refused[0].startswith("worse.json")
    assert words in found.refused[0]
    assert len(found.refused) <= 4  # a file of many bad records does not fill the screen


def test_what_is_there_twice_counts_once_and_contradictions_count_not_at_all(tmp_path: Path) -> None:
    write_records(tmp_path / "a.json", [made(), made("run-2")])
    write_records(tmp_path / "b.json", [made(), made("run-2", us=30.0)])
    found = read_records([tmp_path])
    assert [e.record["run"] for e in found.entries] == ["run-1"]
    (sentence,) = found.refused
    assert sentence.startswith(
        "a.json, b.json: 2 records of FlashHead on Llama-3.2-1B (head, bf16, batch 1; cuda, NVIDIA H100 80GB HBM3) in run run-2 contradict"
    )


def test_paths_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the folder holds no"):
        read_records([tmp_path])
    with pytest.raises(SettingsError, match="no such file or folder"):
        read_records([tmp_path / "nowhere"])


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.json"
    write_records(out, [made()])
    before = out.read_bytes()
    with pytest.raises(SettingsError, match=r"a.json, record 2: a measured record has no baseline"):
        write_records(out, [made(), made(baseline=None)])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FlashHeadError, match="No space left on device"):
        write_records(out, [made("run-2")])
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_files_say_of_what_is_no_record_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document([made()], ["bench x: a draw: no dense head in the same run, so that it is no record"])))
    assert read_records([tmp_path]).unrecorded == ("a.json: bench x: a draw: no dense head in the same run, so that it is no record",)


# benches


def head_document() -> dict[str, Any]:
    records = []
    for head, us in (("dense bf16", 220.0), ("published", 40.0), ("fitted", 22.0), ("auto", 22.0), ("draw from the candidates", 4.0)):
        for batch in (1, 8):
            records.append({
                "model": "Llama-3.2-1B", "shape": [128_256, 2_048], "real_weights": False, "batch": batch, "context": None, "head": head, "settings": {},
                "backend": "cuda", "backend_version": "13.0", "device": "H100", "threads": None, "microseconds": us * batch, "spread": 0.5,
                "bytes_per_step": 4e6, "dense_bytes_per_step": 525_336_576, "counts": [1.0] if head == "fitted" else None, "commit": "abc", "command": "x",
            })  # fmt: skip
    return {"device": "H100", "records": records}


def tensorrt_document() -> dict[str, Any]:
    common = {
        "model": "Llama-3.2-1B", "shape": [128_256, 2_048], "real_weights": False, "context": 512, "backend": "tensorrt", "backend_version": "8.6.0",
        "device": "H100", "body": "w4a16", "group": 128, "precision": "float16", "layers": "plugin", "dense_bytes_per_step": 525_336_576, "agreement": None,
        "commit": "abc", "command": "x", "batch": 1,
    }  # fmt: skip
    return {"records": [
        common | {"head": "FlashHead alone", "microseconds": 22.0, "spread": [21.0, 23.0]},
        common | {"head": "FlashHead", "microseconds": 528.0, "spread": [527.0, 536.0], "microseconds_rounds": [527.0, 528.0, 536.0],
                  "tokens_per_second": 1761.0, "graph_nodes": 152},
        common | {"head": "dense", "microseconds": 673.0, "spread": [672.0, 680.0], "microseconds_rounds": [672.0, 673.0, 680.0]},
    ]}  # fmt: skip


def decode_document() -> dict[str, Any]:
    """Two batches of ours beside dense heads, of a larger one ours alone; the power is known of all but one step."""
    common = {
        "model": "Llama-3.2-1B", "shape": [128_256, 2_048], "real_weights": False, "context": 512, "positions": 1024, "backend": "cuda",
        "backend_version": "13.0", "device": "H100", "body": "w4a16", "group": 128, "precision": "float16", "dense_bytes_per_step": 525_336_576,
        "commit": "abc", "command": "x",
    }  # fmt: skip
    records = []
    for batch in (1, 4, 16):
        for head, us, joules, read in (
            ("FlashHead", 420.0, 0.05, 9.5e6), ("dense fp16", 565.0, 0.09, 525e6), ("dense int8, one scale a row", 489.0, None, 263e6),
            ("no head", 388.0, None, None),
        ):  # fmt: skip
            if batch == 16 and head.startswith("dense"):
                continue
            records.append(common | {"head": head, "batch": batch, "microseconds": us, "spread": [us - 1, us + 3], "microseconds_rounds": [us, us - 1, us + 3]})
            if head != "no head":
                scope, unknown = (None, "it was not told") if joules is None else ("the GPU alone, by NVML", None)
                each = [] if joules is None else [joules, 0.98 * joules, 1.1 * joules]
                records[-1] |= {"joules_per_token": joules, "joules_rounds": each, "power_scope": scope, "power_unknown": unknown, "bytes_per_step": read}
            if head == "FlashHead":
                records[-1] |= {"tokens_per_second": 2_377.0, "tokens_per_second_spread": [2_370.0, 2_390.0], "tokens_per_second_texts": 3}
                records[-1] |= {"first_token_seconds": 0.004, "first_token_spread": [0.0039, 0.0042], "prompt": 512, "real_bytes": 1_340_100_000}
    return {"records": records}


def vllm_document() -> dict[str, Any]:
    def one(head: str, rate: float, step: float, part: float) -> dict[str, Any]:
        return {
            "model": "Llama-3.2-1B", "shape": [128_256, 2_048], "real_weights": False, "batch": 1, "context": 32, "head": head,
            "settings": {"runner": "v2", "body": "bf16", "crossovers": {"tokens": 24}}, "backend": "vllm", "backend_version": "0.26.0", "device": "H100",
            "tokens_per_second": rate, "tokens_per_second_spread": [rate - 5, rate + 5], "gpu_microseconds": {"total": step, "head": part},
            "commit": "abc", "command": "x",
        }  # fmt: skip

    return {"records": [one("dense", 366, 1357, 183.1), one("published", 359, 1228, 51.0), one("flash", 506, 1181, 30.1)]}


def onnx_document() -> dict[str, Any]:
    own = bench_onnx_document.document()
    for i, r in enumerate(own["records"]):
        r["real_weights"] = r.get("real_weights") or False
        r["microseconds_rounds"] = [r["microseconds"] * x for x in (0.9, 1.0, 1.1 + 0.01 * i)]
    return own


OWN = {
    "head": head_document,
    "decode": decode_document,
    "tensorrt": tensorrt_document,
    "vllm": vllm_document,
    "onnx": onnx_document,
    "evaluate": lambda: report_document.document(2),
}


@pytest.mark.parametrize("bench", OWN)
def test_every_bench_speaks_the_form(bench: str, tmp_path: Path) -> None:
    own = OWN[bench]()
    whole = with_records(bench, own, "flashhead bench x", MOMENT)
    assert {k: v for k, v in whole.items() if k != KEY} == own
    (tmp_path / "x.json").write_text(json.dumps(whole), encoding="utf-8")
    found = read_records([tmp_path / "x.json"])
    assert found.refused == ()
    assert len(found.entries) == len(whole[KEY]["records"]) > 0
    for e in found.entries:
        assert e.record["bench"] == bench and e.record["kind"] == "measured"
        assert e.record["command"] == "flashhead bench x" and e.record["date"] == "2026-11-28T04:00:00Z"
        assert e.record["head"] not in ("fitted", "flash", "dense", "dense bf16", "no head")
        assert e.record["device"] != "cpu" and e.record["commit"]
        assert (e.record["seeds"] == []) == bool(e.record["real_weights"])


def test_every_converter_is_tested() -> None:
    assert set(OWN) == set(CONVERTERS)


def test_ratios_and_spreads_come_from_the_bench_s_own_figures() -> None:
    (one,) = as_records("tensorrt", tensorrt_document(), "x", MOMENT)[0]
    assert one["microseconds"] == {"median": 528.0, "low": 527.0, "high": 536.0, "spread": "range", "samples": 3}
    assert one["times_as_fast"]["median"] == pytest.approx(673 / 528)
    assert one["times_as_fast"]["low"] == pytest.approx(680 / 536) and one["times_as_fast"]["high"] == pytest.approx(672 / 527)  # of the same rounds
    records, _ = as_records("head", head_document(), "x", MOMENT)
    flash = next(r for r in records if r["head"] == "FlashHead" and r["batch"] == 1)
    assert flash["microseconds"] == {"median": 22.0, "low": 21.5, "high": 22.5, "spread": "mad", "samples": 200}
    assert flash["times_as_fast"]["median"] == pytest.approx(10) and flash["observed"] == {"counts": [1.0]}
    assert not any(r["head"].startswith("draw") for r in records)
    text = next(r for r in as_records("vllm", vllm_document(), "x", MOMENT)[0] if r["head"] == "FlashHead" and r["part"] == "text")
    assert text["times_as_fast"]["median"] == pytest.approx(506 / 366)
    onnx = next(r for r in as_records("onnx", onnx_document(), "x", MOMENT)[0] if r["head"] == "FlashHead" and r["part"] == "head" and r["threads"] == 1)
    rounds = [13_000 * a / (500 * b) for a, b in ((0.9, 0.9), (1.0, 1.0), (1.1, 1.12))]
    assert onnx["times_as_fast"] == {"median": pytest.approx(26), "low": pytest.approx(min(rounds)), "high": pytest.approx(26), "spread": "range", "samples": 3}


@pytest.mark.parametrize(
    ("bench", "own", "words"),
    [
        ("head", {"device": "H100", "records": [r for r in head_document()["records"] if r["head"] != "dense bf16"]}, "published on Llama-3.2-1B"),
        ("tensorrt", {"records": tensorrt_document()["records"][:2]}, "no engine with a dense head"),
        ("vllm", {"records": vllm_document()["records"][1:]}, "no dense head in the same run"),
        ("decode", {"records": decode_document()["records"][-2:]}, "FlashHead on Llama-3.2-1B, batch 16: no dense head in the same run"),
    ],
)
def test_what_has_no_baseline_is_named_not_recorded(bench: str, own: dict[str, Any], words: str) -> None:
    records, left_out = as_records(bench, own, "x", MOMENT)
    assert records == []
    (sentence,) = left_out
    assert words in sentence


def test_a_checkpoint_s_records_say_what_its_head_was_held_to() -> None:
    said = {"target_agreement": 0.995, "agreement": 0.9975}
    for bench, own in (("decode", decode_document()), ("tensorrt", tensorrt_document()), ("head", head_document())):
        own["records"] = [r | {"real_weights": True} | (said if r["head"] in ("FlashHead", "fitted") else {}) for r in own["records"]]
        found = {r["head"]: (r["target_agreement"], r["calibrated_agreement"]) for r in as_records(bench, own, "x", MOMENT)[0]}
        assert found.pop("FlashHead") == (0.995, 0.9975) and set(found.values()) <= {(None, None)}, bench
    own = report_document.document(2)
    own["calibration"] = {"target_agreement": 0.995, "top1_agreement": 0.9981}
    (ours, *rivals) = as_records("evaluate", own, "x", MOMENT)[0]
    assert ours["calibrated_agreement"] == 0.9981 and rivals[0]["calibrated_agreement"] is None
    own = onnx_document()
    for r in own["records"]:
        if (r["part"], r["head"]) == ("head", "FlashHead"):
            r["settings"] = {"agreement": {"target_agreement": 0.98, "top1_agreement": 0.99}}
    heads = [r for r in as_records("onnx", own, "x", MOMENT)[0] if r["head"] == "FlashHead" and r["part"] == "head"]
    assert {(r["target_agreement"], r["calibrated_agreement"]) for r in heads} == {(0.98, 0.99)}


def test_a_checkpoint_tells_its_calibration_without_torch(tmp_path: Path) -> None:
    assert calibration(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"flash_head": {"summary": {"target_agreement": 0.995, "top1_agreement": 0.999}}}))
    assert calibration(tmp_path) == {"target_agreement": 0.995, "agreement": 0.999}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert calibration(tmp_path) == {}


@pytest.mark.parametrize(
    ("limits", "said"),
    [([700_000], "limit 700 W"), ([350_000, 350_000], "limit 350 W"), ([700_000, 350_000], None), ([None], None), ([], None)],
)
def test_a_gpu_without_power_modes_says_its_limit(monkeypatch: pytest.MonkeyPatch, limits: list[int | None], said: str | None) -> None:
    monkeypatch.setattr("flashhead_edge.jetson.board_nvml.read_gpus", lambda unread: [{"power_limit": None if w is None else w / 1000} for w in limits])
    assert machine(True)["power_mode"] == said
    assert machine(False)["power_mode"] is None  # a CPU's times are not the GPU's


def test_a_decode_step_stands_beside_the_dense_head_in_16_bits_of_its_batch() -> None:
    records, left_out = as_records("decode", decode_document(), "x", MOMENT)
    assert [(r["head"], r["batch"], r["baseline"]["head"]) for r in records] == [
        (head, batch, "dense fp16") for batch in (1, 4) for head in ("FlashHead", "dense int8, one scale a row")
    ]
    ours, rival = records[:2]
    assert ours["times_as_fast"] == {"median": pytest.approx(565 / 420), "low": pytest.approx(568 / 423), "high": pytest.approx(564 / 419), "spread": "range",
                                     "samples": 3}  # fmt: skip
    assert (ours["part"], ours["precision"], ours["context"], ours["peak_bytes"]) == ("step", "w4a16", 512, 1_340_100_000)
    assert ours["joules_per_token"] == {"median": 0.05, "low": pytest.approx(0.049), "high": pytest.approx(0.055), "spread": "range", "samples": 3}
    assert ours["baseline"]["joules_per_token"]["median"] == 0.09 and rival["joules_per_token"] is None
    assert ours["observed"]["power_scope"] == "the GPU alone, by NVML" and ours["first_token_seconds"]["low"] == 0.0039
    assert ours["tokens_per_second"] == {"median": 2_377.0, "low": 2_370.0, "high": 2_390.0, "spread": "range", "samples": 3}
    assert rival["tokens_per_second"] is None and rival["bytes_per_step"] == 263e6 and rival["baseline"]["bytes_per_step"] == 525e6
    assert left_out == [
        "bench decode: FlashHead on Llama-3.2-1B, batch 16: no dense head in the same run, so that it is no record",
        "bench decode: dense int8, one scale a row: no joules a token: it was not told",
    ]


# comparison


def side(*records: dict[str, Any]) -> list[Entry]:
    return [Entry(r, identity(r), "a.json") for r in records]


def ratios(before: list[Entry], after: list[Entry], **options: Any) -> dict[str, Any]:
    return {c.measure: c for c in compare(before, after, **options).changes}


def test_a_ratio_is_a_loss_only_beyond_both_spreads_and_the_tolerance() -> None:
    before = side(made(us=25.0, spread=0.02))
    within = ratios(before, side(made("run-2", us=25.9, spread=0.02)))["microseconds"]
    assert within.ratio == pytest.approx(25 / 25.9)
    assert within.low == pytest.approx(25 * 0.98 / (25.9 * 1.02)) and within.high == pytest.approx(25 * 1.02 / (25.9 * 0.98))
    assert not within.lost(0.02)  # slower by 3.6 %, but both spreads reach that far
    beyond = ratios(before, side(made("run-2", us=27.0, spread=0.02)))["microseconds"]
    assert beyond.lost(0.02) and not beyond.lost(0.1)
    faster = ratios(before, side(made("run-2", us=20.0)))["microseconds"]
    assert faster.ratio == pytest.approx(1.25) and not faster.lost(0.0)


def test_rates_agreement_and_bytes_have_their_own_direction() -> None:
    before = side(made(tokens_per_second=figure(100.0, 99.0, 101.0, "range", 5)))
    after = side(made("run-2", tokens_per_second=figure(50.0, 49.0, 51.0, "range", 5), bytes_per_step=8e6, top1_agreement=0.99,
                      top1_agreement_interval=[0.988, 0.992]))  # fmt: skip
    found = ratios(before, after)
    assert found["tokens_per_second"].ratio == pytest.approx(0.5) and found["tokens_per_second"].lost(0.02)
    assert found["bytes_per_step"].ratio == pytest.approx(9.5 / 8) and not found["bytes_per_step"].lost(0.0)
    assert found["top1_agreement"].lost(0.5)  # answers have no tolerance
    assert math.isclose(found["microseconds"].baseline, 1.0)


def test_quality_goes_by_its_own_direction() -> None:
    def asked(value: float, higher: bool) -> dict[str, Any]:
        quality = {"task": "t", "metric": "m", "value": value, "interval": [value * 0.99, value * 1.01], "samples": 100, "higher_is_better": higher,
                   "harness": None, "domain": None, "note": None}  # fmt: skip
        return made(part="quality", quality=quality)

    assert ratios(side(asked(10.0, False)), side(asked(12.0, False)))["quality"].lost(0.02)
    assert not ratios(side(asked(10.0, True)), side(asked(12.0, True)))["quality"].lost(0.02)


def test_several_runs_are_one_and_predictions_are_none() -> None:
    before = side(made("a", us=24.0), made("b", us=25.0), made("c", us=29.0), predicted())
    found = ratios(before, side(made("d", us=26.0), predicted()))
    assert set(found) == {"microseconds", "bytes_per_step", "top1_agreement"}
    assert found["microseconds"].before == 25.0
    assert found["microseconds"].high == pytest.approx(29 * 1.02 / (26 * 0.98))


def test_relative_takes_the_machine_out() -> None:
    before, after = side(made(us=25.0, dense=200.0)), side(made("run-2", us=50.0, dense=400.0))
    assert ratios(before, after)["microseconds"].lost(0.02)
    assert ratios(before, after)["microseconds"].baseline == pytest.approx(0.5)
    found = ratios(before, after, relative=True)
    assert "microseconds" not in found and found["times_as_fast"].ratio == pytest.approx(1) and not found["times_as_fast"].lost(0.0)


def test_heads_of_two_targets_are_two_subjects() -> None:
    found = compare(side(made(target_agreement=0.995)), side(made("run-2", target_agreement=0.999)))
    assert found.changes == () and len(found.only_before) == len(found.only_after) == 1


def test_only_equal_subjects_are_compared() -> None:
    before = side(made(), made(batch=4), made(settings={"head": {"margin": 1}, "group": 32}))
    after = side(made("run-2", settings={"head": {"margin": 2}, "group": 32}), made("run-2", device="another"))
    found = compare(before, after)
    assert {c.record["settings"].get("group") for c in found.changes} == {32}  # what calibration chose is no part of the subject
    assert len(found.only_before) == 2
    assert found.only_before[1] == "FlashHead on Llama-3.2-1B (head, bf16, batch 4; cuda, NVIDIA H100 80GB HBM3)"
    assert found.only_after == ("FlashHead on Llama-3.2-1B (head, bf16, batch 1; cuda, another)",)
