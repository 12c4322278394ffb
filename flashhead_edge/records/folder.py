"""Records in files: written whole or not at all, read file by file, so that a broken one hides none of the others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.errors import FlashHeadError, SettingsError
from flashhead_edge.records.form import VERSION, check_document, check_record, document, identity, subject, title

KEY = "benchmark"  # of a bench's own document: under it lies its file of records
MOST_BYTES = 64 << 20  # of a file: a hundred thousand records

NAMED = 3  # records of one file that are refused with a sentence each


@dataclass(frozen=True)
class Entry:
    """A record that passed its check."""

    record: Mapping[str, Any]
    id: str  # of its content
    file: str  # as the user named it, or below the folder that they named


@dataclass(frozen=True)
class Found:
    """What was read: records, a sentence for each file or record that was left out, and those of the files on what was measured and is no record."""

    entries: tuple[Entry, ...]
    refused: tuple[str, ...]
    unrecorded: tuple[str, ...] = ()


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Check and write a file of records: whole, or not at all.

    Raises:
        SettingsError: a record breaks a rule of the form. FlashHeadError: the file cannot be written.
    """
    records = list(records)
    for i, one in enumerate(records):
        check_record(one, f"{path.name}, record {i + 1}")
    text = json.dumps(document(records), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlashHeadError(f"{path}: the records cannot be written ({error.strerror}), expected a folder that takes files; choose another path") from error


def read_records(paths: Sequence[Path]) -> Found:
    """Read files of records and folders of them.

    A file is of the form itself, or a bench's `--json`, which carries it under `benchmark`. In a folder every `*.json` is read, at any depth.
    What cannot be read is left out with a sentence: a broken file, a newer form, a record that breaks a rule, and records that contradict each
    other: the same subject in the same run with other figures. Records that are there twice with the same content count once.

    Raises:
        SettingsError: a path does not exist, or a folder holds no `*.json` at all.
    """
    found: list[Entry] = []
    refused: list[str] = []
    unrecorded: list[str] = []
    for path, name in _files(paths):
        try:
            records, without = _read(path, name)
        except SettingsError as error:
            refused.append(str(error))
            continue
        unrecorded += [f"{name}: {sentence}" for sentence in without]
        wrong: list[str] = []
        for i, one in enumerate(records):
            try:
                check_record(one, f"{name}, record {i + 1}")
            except SettingsError as error:
                wrong.append(str(error))
            else:
                found.append(Entry(one, identity(one), name))
        refused += wrong[:NAMED] + ([f"{name}: {len(wrong) - NAMED} more of its records were left out"] if len(wrong) > NAMED else [])
    kept, contradicting = _without_contradictions(found)
    return Found(tuple(kept), (*refused, *contradicting), tuple(dict.fromkeys(unrecorded)))


def _files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.json") if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise SettingsError(f"{path}: the folder holds no *.json, expected files of records; name the folder that `flashhead bench suite` wrote")
            found += [(p, p.relative_to(path).as_posix()) for p in inside]
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise SettingsError(f"{path}: no such file or folder, expected records; check the path")
    names = [name for _, name in found]
    return [(p, name if names.count(name) == 1 else str(p)) for p, name in found]


def _read(path: Path, name: str) -> tuple[list[Any], list[str]]:
    """The records of a file, not checked one by one yet, and what it says of what is none.

    Raises:
        SettingsError: it is no JSON, of a newer form, or holds no records.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SettingsError(f"{name}: {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}; split the file")
        whole = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SettingsError):
            raise
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise SettingsError(
            f"{name}: it cannot be read as JSON ({' '.join(reason.split())[:200]}), expected a file of records; restore or remove it"
        ) from error
    if isinstance(whole, Mapping) and isinstance(whole.get(KEY), Mapping):
        whole = whole[KEY]
    if not isinstance(whole, Mapping) or not isinstance(whole.get("schema"), int) or isinstance(whole.get("schema"), bool):
        raise SettingsError(f'{name}: it is no file of records, expected {{"schema": {VERSION}, "records": [...]}}; name another file or remove it')
    if whole["schema"] > VERSION:
        raise SettingsError(f"{name}: its form is {whole['schema']}, expected at most {VERSION}; install a newer flashhead-edge")
    if whole["schema"] != VERSION:
        raise SettingsError(f"{name}: its form is {whole['schema']}, expected {VERSION}; restore the file")
    check_document(whole, name)
    return list(whole["records"]), list(whole.get("left_out", ()))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)[:40]!r} stands twice in one object")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 1 << 63:
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _without_contradictions(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Entries without repeats; those that say different things of one subject in one run are all left out, since none is known to be right."""
    by_content = {e.id: e for e in reversed(entries)}  # the first of each
    groups: dict[tuple[str, str], list[Entry]] = {}
    for e in reversed(by_content.values()):
        groups.setdefault((str(e.record["run"]), subject(e.record)), []).append(e)
    kept, refused = [], []
    for (run, _), group in groups.items():
        if len(group) == 1:
            kept.append(group[0])
            continue
        where = ", ".join(sorted({e.file for e in group}))
        one = group[0].record
        refused.append(f"{where}: {len(group)} records of {title(one)} in run {run} contradict each other, expected one; keep the right one")
    return kept, refused
