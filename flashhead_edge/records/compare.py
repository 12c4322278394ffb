"""Two folders of records, subject by subject: ratios with the interval that both spreads allow, and which of them are losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_edge.records.folder import Entry
from flashhead_edge.records.form import subject, title

SMALLER_IS_BETTER = ("microseconds", "first_token_seconds", "joules_per_token", "bytes_per_step", "peak_bytes")
LARGER_IS_BETTER = ("tokens_per_second", "top1_agreement")
ANSWERS = ("top1_agreement", "quality")
EXACT = ("bytes_per_step", "top1_agreement", "quality")  # no clock: how fast the machine was that day is not in them


@dataclass(frozen=True)
class Change:
    """What became of one measure of one subject. A ratio above 1 is a gain, whatever the measure."""

    record: Mapping[str, Any]  # the newer folder's, for its names
    measure: str
    before: float
    after: float
    ratio: float
    low: float  # the least ratio that both spreads allow
    high: float
    baseline: float | None  # the ratio of the baselines: what the machine itself gained or lost

    @property
    def spread_known(self) -> bool:
        return self.low != self.high

    def lost(self, tolerance: float) -> bool:
        """Worse beyond what both spreads allow, and by more than `tolerance`, a share; answers have no tolerance, their interval says it all."""
        return self.high < 1 and self.ratio < 1 - (0 if self.measure in ANSWERS else tolerance)


@dataclass(frozen=True)
class Comparison:
    """Changes in the order of the newer folder, and the subjects that only one folder has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]  # by title
    only_after: tuple[str, ...]


def compare(before: Sequence[Entry], after: Sequence[Entry], relative: bool = False) -> Comparison:
    """Compare what both sides measured. Several runs of a subject count as one: the median of their medians, the widest of their ends.

    Args:
        relative: take each time against its own baseline (`times_as_fast`) instead of the clock, for machines that differ from day to day.
    """
    sides = [_by_subject(entries) for entries in (before, after)]
    changes = [c for key, mine in sides[1].items() if key in sides[0] for c in _changes(sides[0][key], mine, relative)]
    only = [tuple(title(records[0]) for key, records in one.items() if key not in other) for one, other in (sides, reversed(sides))]
    return Comparison(tuple(changes), only[0], only[1])


def _by_subject(entries: Sequence[Entry]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for e in entries:
        if e.record["kind"] == "measured":
            found.setdefault(subject(e.record), []).append(e.record)
    return found


def _changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], relative: bool) -> list[Change]:
    found = []
    clocks = ("times_as_fast",) if relative else tuple(n for n in (*SMALLER_IS_BETTER, *LARGER_IS_BETTER) if n not in EXACT)
    for name in (*clocks, *EXACT):
        was, now = pooled(before, name), pooled(after, name)
        if was is None or now is None:
            continue
        smaller = name in SMALLER_IS_BETTER or (name == "quality" and not after[0]["quality"]["higher_is_better"])
        middle = _ratio(was.median, now.median, smaller)
        low, high = (_ratio(was.low, now.high, True), _ratio(was.high, now.low, True)) if smaller else (
            _ratio(was.high, now.low, False), _ratio(was.low, now.high, False))  # fmt: skip
        if middle is None or low is None or high is None:  # a zero has no ratio
            continue
        bases = [pooled([r["baseline"] for r in side], name) for side in (before, after)] if name not in (*EXACT, "times_as_fast") else [None, None]
        base = None if bases[0] is None or bases[1] is None else _ratio(bases[0].median, bases[1].median, smaller)
        found.append(Change(after[0], name, was.median, now.median, middle, low, high, base))
    return found


def _ratio(before: float, after: float, smaller: bool) -> float | None:
    top, bottom = (before, after) if smaller else (after, before)
    return top / bottom if bottom > 0 else None


@dataclass(frozen=True)
class Ends:
    """A median between its ends, which are the median itself where no spread is known."""

    median: float
    low: float
    high: float


def pooled(records: Sequence[Mapping[str, Any]], name: str) -> Ends | None:
    """Median, least and most of a measure over the runs of a subject; None where no run has it."""
    ends = [e for e in (_ends(r, name) for r in records) if e is not None]
    if not ends:
        return None
    return Ends(statistics.median(e.median for e in ends), min(e.low for e in ends), max(e.high for e in ends))


def _ends(record: Mapping[str, Any], name: str) -> Ends | None:
    value = record[name]
    if value is None:
        return None
    if name in ("top1_agreement", "quality"):
        share, ends = (value, record["top1_agreement_interval"]) if name == "top1_agreement" else (value["value"], value["interval"])
        return Ends(share, *(ends or (share, share)))
    if isinstance(value, Mapping):
        m = value["median"]
        return Ends(m, m if value["low"] is None else value["low"], m if value["high"] is None else value["high"])
    return Ends(value, value, value)
