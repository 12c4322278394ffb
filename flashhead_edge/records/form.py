"""A record: its fields, its figures, and the check that every file of records passes."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from flashhead_edge.errors import SettingsError

VERSION = 1  # of the form: rises where a reader of the old one would misread
KINDS = ("measured", "predicted")
MEASURES: dict[str, Any] = dict.fromkeys((
    "microseconds", "tokens_per_second", "first_token_seconds", "joules_per_token", "bytes_per_step", "bytes_per_step_p99", "peak_bytes",
    "top1_agreement", "top1_agreement_interval", "quality",
))  # fmt: skip
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("kind", "run", "bench", "part", "model", "shape", "real_weights", "precision", "head")),
    "settings": {},
    "observed": {},
    **dict.fromkeys(("target_agreement", "calibrated_agreement", "backend", "backend_version", "device", "driver", "power_mode", "threads")),
    **dict.fromkeys(("batch", "context", "tokens", "seeds", "dense_bytes_per_step")),
    **MEASURES,
    **dict.fromkeys(("times_as_fast", "baseline", "date", "commit", "command", "source", "note")),
}
PRIMARY: dict[str, tuple[str, ...]] = {  # by part: what a record is read by, the first that it has
    "head": ("microseconds", "tokens_per_second"), "step": ("microseconds", "tokens_per_second"), "text": ("tokens_per_second", "microseconds"),
    "agreement": ("top1_agreement",), "quality": ("quality",),
}  # fmt: skip
SUBJECT = (
    "bench", "part", "model", "shape", "real_weights", "precision", "head", "target_agreement", "backend", "device", "power_mode", "threads", "batch",
    "context", "tokens",
)  # fmt: skip


def record(**fields: Any) -> dict[str, Any]:
    """A measured record, in the form's order; fields that are not given are null.

    Raises:
        TypeError: a field is not one of `FIELDS`.
    """
    return _filled(FIELDS, {"kind": "measured", **fields})


def baseline(run: str, head: str, backend: str | None = None, backend_version: str | None = None, **measures: Any) -> dict[str, Any]:
    """What a record of the same `run` is compared with; measures that are not given are null.

    Raises:
        TypeError: a measure is not one of `MEASURES`.
    """
    return {"run": run, "head": head, "backend": backend, "backend_version": backend_version, **_filled(MEASURES, measures)}


def _filled(known: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := fields.keys() - known.keys():
        raise TypeError(f"a record has no field {', '.join(sorted(unknown))}")
    return {**known, **fields}


def figure(median: float | None, low: float | None = None, high: float | None = None, spread: str | None = None, samples: int | None = None) -> Any:
    """A median with its spread (`range` or `mad`), or None where there is no median."""
    return None if median is None else {"median": median, "low": low, "high": high, "spread": spread, "samples": samples}


def run_name(*parts: object) -> str:
    """Twelve hexadecimal digits that name a run, from what tells it from others: its command, its moment, its machine."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:12]


def subject(record: Mapping[str, Any]) -> str:
    """What a record is about, as one string: two records of one subject in one run are duplicates, those of two runs can be compared.

    What calibration chose for a head (`settings.head`) is no part of it, so that two calibrations can be compared.
    """
    asked = record.get("quality") or {}
    settings = {k: v for k, v in record["settings"].items() if k != "head"}
    return json.dumps(
        [record["kind"], *(record.get(name) for name in SUBJECT), *(asked.get(n) for n in ("task", "metric", "domain")), settings], sort_keys=True
    )


def described(record: Mapping[str, Any]) -> str:
    """What tells a record from others of its model and head, for a person: part, precision, batch, context, text, target, run."""
    asked, text, target = record.get("quality") or {}, record["settings"].get("text"), record.get("target_agreement")
    words = (
        record["part"] if not asked else f"{asked['task']}: {asked['metric']}", record.get("precision"), record.get("batch") and f"batch {record['batch']}",
        record.get("context") is not None and f"{record['context']} cached", record.get("tokens") and f"{record['tokens']} tokens",
        record.get("threads") and f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}", isinstance(text, str) and text,
        target is not None and f"target {100 * target:g} %",
    )  # fmt: skip
    return ", ".join(str(word) for word in words if word)


def title(record: Mapping[str, Any]) -> str:
    """A record's subject for a person: head, model, what tells it from others, backend and device."""
    return f"{record['head']} on {record['model']} ({described(record)}; {record['backend']}, {record['device']})"


def identity(record: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a record: the same for the same content."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:12]


def document(records: Iterable[Mapping[str, Any]], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """What a file of records holds; `left_out`: sentences on what the run measured that is no record."""
    return {"schema": VERSION, "records": list(records), "left_out": list(left_out)}


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a file of records."""
    found = json.loads((files("flashhead_edge.records") / "record.schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@functools.cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    whole = schema()
    return Draft202012Validator({"$ref": "#/$defs/record", "$defs": whole["$defs"]})


@functools.cache
def _file_validator() -> Any:
    from jsonschema import Draft202012Validator

    whole = schema()
    return Draft202012Validator({**whole, "properties": {**whole["properties"], "records": {"type": "array"}}})


def check_document(found: Any, where: str) -> None:
    """Check a file of records against the schema, its records apart.

    Raises:
        SettingsError: it breaks a rule. ModuleNotFoundError: jsonschema is not installed.
    """
    from jsonschema.exceptions import best_match

    error = best_match(_file_validator().iter_errors(found))
    if error is not None:
        raise SettingsError(f"{where}: {_place(error.absolute_path)}{_words(error.message)}, expected the form of record.schema.json; correct or remove it")


def check_record(found: Any, where: str) -> None:
    """Check one record against the schema, and what a schema cannot say: that its baseline is of its own run and has what the record is read by, that
    medians and shares lie between their ends, that its date is one.

    Args:
        where: what an error calls the record, such as `runs/a.json, record 3`.
    Raises:
        SettingsError: it breaks a rule. ModuleNotFoundError: jsonschema is not installed.
    """
    if isinstance(found, Mapping) and found.get("kind", "measured") == "measured" and found.get("baseline") is None:
        raise SettingsError(
            f"{where}: a measured record has no baseline, expected the dense head (or what it is compared with) of the same run; measure both in one run"
        )
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(found))
    if error is not None:
        raise SettingsError(f"{where}: {_place(error.absolute_path)}{_words(error.message)}, expected the form of record.schema.json; correct or remove it")
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as half:
        raise SettingsError(f"{where}: it holds half a character ({half.reason}), expected text that UTF-8 can write; correct or remove it") from half
    base = found["baseline"]
    if base is not None and base["run"] != found["run"]:
        raise SettingsError(
            f"{where}: its baseline is of run {_words(base['run'])}, expected its own run {_words(found['run'])}; compare what was measured in one run"
        )
    if base is not None and not any(found[name] is not None and base[name] is not None for name in PRIMARY[found["part"]]):
        raise SettingsError(
            f"{where}: record and baseline have no {' or '.join(PRIMARY[found['part']])} both, expected it of both, of one run; measure the baseline too"
        )
    if found["date"] is not None:
        _check_date(found["date"], where)
    for side in (found, base or {}):
        _check_interval("top1_agreement", side.get("top1_agreement"), side.get("top1_agreement_interval"), where)
        asked = side.get("quality") or {}
        _check_interval("quality", asked.get("value"), asked.get("interval"), where)
    for name, value in [*found.items(), *(base or {}).items()]:
        if name in (*MEASURES, "times_as_fast") and isinstance(value, Mapping) and "median" in value:
            low, high = value["low"], value["high"]
            if (low is not None and low > value["median"]) or (high is not None and high < value["median"]):
                raise SettingsError(f"{where}: {name} has its median {value['median']} outside of {low} to {high}, expected it inside; correct the record")


def _check_date(text: str, where: str) -> None:
    try:
        datetime.datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError as error:
        raise SettingsError(f"{where}: date: {text} is no day of a calendar ({error}), expected one; correct the record") from error


def _check_interval(name: str, value: float | None, ends: Sequence[float] | None, where: str) -> None:
    if ends is not None and (value is None or not ends[0] <= value <= ends[1]):
        raise SettingsError(f"{where}: {name} is {value}, outside of its interval {ends[0]} to {ends[1]}, expected it inside; correct the record")


def _place(path: Sequence[str | int]) -> str:
    return ".".join(str(p) for p in path) + ": " if path else ""


def _words(message: object, most: int = 200) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= most else text[: most - 3] + "..."
