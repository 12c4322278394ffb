"""One page of many records: filters, bars beside their baselines, frontiers, and a table that is there without scripts as well."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from flashhead_edge.records.folder import Entry, Found
from flashhead_edge.records.form import PRIMARY
from flashhead_edge.report.html import write_page
from flashhead_edge.report.words import DASH, interval, megabytes, percent, short

NO_NETWORK = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
PARTS = {"head": "a step of the head", "step": "a whole decode step", "text": "whole texts", "agreement": "agreement", "quality": "quality"}
PREDICTED = "predicted"
TURNS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Column:
    """A column of the table; `key` is what its cells sort by."""

    key: str
    title: str


@dataclass(frozen=True)
class Filter:
    """A field that the page can be filtered by."""

    key: str
    title: str


COLUMNS = (
    Column("model", "model"), Column("part", "measured"), Column("head", "head"), Column("precision", "precision"), Column("batch", "batch"),
    Column("device", "device"), Column("backend", "backend"), Column("base", "baseline"), Column("ours", "this head"), Column("fast", "times as fast"),
    Column("agreement", "agreement"), Column("bytes", "of dense bytes"),
)  # fmt: skip
FILTERS = (
    Filter("model", "Model"), Filter("device", "Device"), Filter("precision", "Precision"), Filter("batch", "Batch"), Filter("backend", "Backend"),
    Filter("part", "Measured"), Filter("text", "Text"), Filter("head", "Head"), Filter("weights", "Weights"), Filter("kind", "Kind"),
)  # fmt: skip


def write_explorer(found: Found, path: str | Path) -> None:
    """Write the page: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written. ModuleNotFoundError: plotly is not installed.
    """
    write_page(explorer_page(found), path)


def explorer_page(found: Found) -> str:
    """The whole page as text: self-contained, and kept from any network by its own policy."""
    from plotly.offline import get_plotlyjs

    room = files("flashhead_edge.report")
    style, own, script = ((room / name).read_text(encoding="utf-8") for name in ("report.css", "explorer.css", "explorer.js"))
    entries = sorted(found.entries, key=_place)
    count, sources = len(entries), len({e.file for e in entries})
    about = f"{count:,} record{'' if count == 1 else 's'} from {sources:,} file{'' if sources == 1 else 's'}, each beside the baseline of its own run."
    data = _inside_script(json.dumps([_row_data(e) for e in entries], ensure_ascii=True, separators=(",", ":"), allow_nan=False))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">\n<link rel="icon" href="data:,">\n<title>FlashHead benchmarks</title>\n'
        f"<style>\n{style}{own}</style>\n</head>\n<body>\n<main>\n<h1>FlashHead benchmarks</h1>\n<p class='soft'>{about}</p>\n"
        f"{_refused(found.refused)}{_controls()}{_plots()}{_table(entries)}{_unrecorded(found.unrecorded)}\n</main>\n"
        '<dialog id="record" aria-labelledby="record-title"><form method="dialog"><h2 id="record-title"></h2><button autofocus>Close</button></form>'
        "<p id='record-file'></p><h3>Command</h3><pre id='record-command'></pre><h3>Record</h3><pre id='record-json'></pre></dialog>\n"
        f"<script>{get_plotlyjs()}</script>\n<script type='application/json' id='data'>{data}</script>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _place(e: Entry) -> tuple[bool, bool, bool]:
    """Where a record stands before anybody sorts: measured ones first, of these our own, of these the timed; what is equal stays as the files have it."""
    r = e.record
    return r["kind"] == PREDICTED, not r["head"].startswith("FlashHead"), r["times_as_fast"] is None


def primary(record: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The measure that a record is read by: its name, its figure and the baseline's (None where there is none)."""
    base = record["baseline"] or {}
    names = PRIMARY[record["part"]]
    name = next((n for n in names if record[n] is not None), names[0])
    return name, record[name], base.get(name)


def shown(name: str, value: Any) -> tuple[str, str]:
    """A measure for a person with its unit, and its spread; an empty string where that is not known."""
    if value is None:
        return DASH, ""
    if name == "top1_agreement":
        return percent(value), ""
    if name == "quality":
        ends = value["interval"]
        return f"{value['value']:.4g}", "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"
    return f"{short(value['median'])} {UNITS[name]}", ends_of(value, short)


UNITS = {"microseconds": "us", "tokens_per_second": "tokens/s"}


def ends_of(figure: Mapping[str, Any], number: Callable[[float], str]) -> str:
    """`low to high`, or nothing where the spread is not known."""
    low, high = figure["low"], figure["high"]
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def fast(figure: Mapping[str, Any] | None) -> tuple[str, str]:
    """`1.27`, and `1.26 to 1.28`."""
    return (DASH, "") if figure is None else (f"{figure['median']:.2f}", ends_of(figure, lambda v: f"{v:.2f}"))


def agreement(record: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Agreement with the dense head, measured in the run or, where it was not, that of the checkpoint's calibration; True for the latter."""
    measured = record["top1_agreement"]
    return (measured, False) if measured is not None else (record["calibrated_agreement"], record["calibrated_agreement"] is not None)


def bytes_share(record: Mapping[str, Any]) -> float | None:
    """Bytes that a step of the head reads, of the dense head's in 16 bits."""
    mine, dense = record["bytes_per_step"], record["dense_bytes_per_step"]
    return mine / dense if mine is not None and dense and math.isfinite(mine / dense) else None


def weights(record: Mapping[str, Any]) -> str:
    return {True: "real", False: "random", None: "not known"}[record["real_weights"]]


def _row_data(e: Entry) -> dict[str, Any]:
    """A row for the script: what it sorts and filters by, and the record without its nulls."""
    r, (name, ours, base) = e.record, primary(e.record)
    return {
        "id": e.id, "file": e.file, "measure": name, "weights": weights(r), "part": part_of(r), "text": text_of(r),
        "ours": _plain(ours), "base": _plain(base), "bytes": bytes_share(r),
        "agreement": agreement(r)[0], "record": _without_nulls(r),
    }  # fmt: skip


def part_of(record: Mapping[str, Any]) -> str:
    """What was measured, as the table says it."""
    return PARTS[record["part"]] if record["quality"] is None else f"{record['quality']['task']}: {record['quality']['metric']}"


def text_of(record: Mapping[str, Any]) -> str | None:
    """The text that it was measured on, where it has one."""
    text = record["settings"].get("text")
    return text if isinstance(text, str) else None


def _plain(value: Any) -> Any:
    return value if not isinstance(value, Mapping) else value.get("median", value.get("value"))


def _energy(measures: Mapping[str, Any] | None) -> str:
    """`0.065 J a token`, or nothing where it is not known."""
    found = (measures or {}).get("joules_per_token")
    return "" if found is None else f"{found['median']:.3g} J a token"


def _without_nulls(value: Any) -> Any:
    return {k: _without_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def _text(text: str) -> str:
    """Text as HTML, whose characters that turn a line's direction are shown instead of obeyed."""
    return escape(TURNS.sub("\ufffd", text))


def _inside_script(text: str) -> str:
    """JSON that no HTML parser reads as anything else."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _refused(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_text(s)}</li>" for s in sentences)
    what = "1 file or record was" if len(sentences) == 1 else f"{len(sentences):,} files or records were"
    return f"<section class='verdict missed' id='refused'><h2>{what} left out</h2><ul class='plain'>{items}</ul></section>"


def _unrecorded(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_text(s)}</li>" for s in sentences)
    return f"<section id='unrecorded'><h2>Measured, and no record</h2><ul class='plain'>{items}</ul></section>"


def _controls() -> str:
    selects = "".join(f'<label>{f.title}<select id="filter-{f.key}" data-key="{f.key}"><option value="">all</option></select></label>' for f in FILTERS)
    return (
        '<section class="scripted" hidden><h2>Filter</h2><form id="filters">'
        f'{selects}</form><p class="bar-line"><span id="count" role="status"></span> <button type="button" id="reset">Show all</button></p></section>'
    )


MEASURES = {
    "microseconds": "time of a step", "tokens_per_second": "tokens a second", "times_as_fast": "times as fast", "bytes_per_step": "bytes of a step",
    "first_token_seconds": "seconds to the first token", "joules_per_token": "joules a token",
}  # fmt: skip


def _plots() -> str:
    options = "".join(f'<option value="{k}">{t}</option>' for k, t in MEASURES.items())
    chosen = f'<p class="bar-line"><label>Shown <select id="measure">{options}</select></label></p>'
    swatches = (("base", "baseline of the same run"), ("ours", "this head"), ("hatched", "predicted"))
    key = " ".join(f'<span class="key"><span class="swatch {kind}"></span> {what}</span>' for kind, what in swatches)
    charts = (
        ("Beside the baseline", chosen, "bars", "Bars of each head beside its baseline",
         f"{key} Whiskers: least and most of the rounds, or the median absolute deviation; none where the spread is not known."),
        ("Agreement against bytes", "", "by-bytes", "Agreement by share of the dense head's bytes",
         "Up and to the left is better. A line joins the measured heads of one model, text, device and batch that no other one of these beats in both. "
         "Open marks: predicted, or the agreement is that of the calibration."),
        ("Agreement against time", "", "by-time", "Agreement by share of the baseline's time", "Time of the head, of its own baseline’s. Left of 1 is faster."),
    )  # fmt: skip
    return "".join(
        f'<section class="scripted" hidden><h2>{title}</h2>{more}<figure>'
        f'<div id="{name}" class="chart" role="img" aria-label="{escape(label)}; the table holds the same figures"></div>'
        f'<figcaption>{caption} <span id="{name}-note"></span></figcaption></figure></section>'
        for title, more, name, label, caption in charts
    )


def _table(entries: Sequence[Entry]) -> str:
    head = "".join(f'<th scope="col" data-key="{c.key}">{c.title}</th>' for c in COLUMNS) + '<th scope="col">command</th>'
    body = "\n".join(_row(e) for e in entries)
    return (
        '<section><h2>Records</h2><p class="bar-line scripted" hidden><button type="button" id="copy">Copy as Markdown</button> '
        '<span id="copied" role="status"></span></p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Records"><table id="records"><thead><tr>'
        f'{head}</tr></thead><tbody>\n{body}\n</tbody></table></div><p class="scripted" hidden><button type="button" id="more">Show more</button></p>'
        '<p class="note-line">A record that says “random” timed random weights in a real model’s shape. Agreement in brackets is that of the calibration. '
        "Nothing is shown that has no baseline of its own run, with the same figure; what is not known is a dash.</p></section>"
    )


def _row(e: Entry) -> str:
    r, (name, ours, base) = e.record, primary(e.record)
    share, calibrated = agreement(r)
    read = bytes_share(r)
    predicted = r["kind"] == PREDICTED
    model = _text(r["model"]) + (' <small class="tag">random</small>' if r["real_weights"] is False else "")
    model += f' <small class="tag predicted">{PREDICTED}</small>' if predicted else ""
    ends = "" if r["top1_agreement_interval"] is None else interval(r["top1_agreement_interval"])
    cached = "" if r["context"] is None else f"{r['context']:,} cached"
    about = "".join(f"<small>{_text(small)}</small>" for small in (text_of(r) or "", cached, "" if r["tokens"] is None else f"{r['tokens']:,} tokens") if small)
    target = "" if r["target_agreement"] is None else f"<small>target {100 * r['target_agreement']:g} %</small>"
    rival = r["baseline"]["head"] if r["baseline"] else ""

    def figure(pair: tuple[str, str], *more: str) -> str:
        return f'<a href="#r-{e.id}">{_text(pair[0])}</a>' + "".join(f"<small>{_text(small)}</small>" for small in (pair[1], *more) if small)

    threads = "" if r["threads"] is None else f"{r['threads']} thread{'' if r['threads'] == 1 else 's'}"
    how = "".join(f"<small>{_text(small)}</small>" for small in (threads, r["power_mode"] or "") if small)
    agrees = DASH if share is None else figure((f"({percent(share)})" if calibrated else percent(share), ends))
    cells = [
        _text(part_of(r)) + about, _text(r["head"]) + target, _text(r["precision"] or DASH),
        DASH if r["batch"] is None else str(r["batch"]), _text(r["device"]) + how,
        _text(f"{r['backend']} {r['backend_version'] or ''}".strip()), figure(shown(name, base), rival, _energy(r["baseline"])),
        figure(shown(name, ours), _energy(r)), figure(fast(r["times_as_fast"])), agrees,
        DASH if read is None else figure((percent(read), megabytes(r["bytes_per_step"]))),
    ]  # fmt: skip
    said = _text(r["command"] or "not known")
    tds = "".join(f"<td>{c}</td>" for c in cells)
    where, day = _text(f"{e.file}, run {r['run']}"), _text((r["date"] or DASH)[:10])
    call = f"<details><summary>command</summary><code>{said}</code> <small>{where}</small></details><small>{day}</small>"
    return f'<tr id="r-{e.id}"{" class=predicted" if predicted else ""}><th scope="row">{model}</th>{tds}<td>{call}</td></tr>'
