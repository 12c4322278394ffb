"""What `flashhead bench onnx` measured: tables for a terminal, and one self-contained page with plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flashhead_edge.report.html import html_table, whole_page, write_page
from flashhead_edge.report.plots import Point, Series, legend, lines_plot
from flashhead_edge.report.tables import new_table
from flashhead_edge.report.words import DASH, interval, megabytes, number, percent

OURS = "FlashHead"
TITLES = {"head": "a step of the head", "models": "a token of a whole model, int4 body", "engines": "engines, end to end"}
COLUMNS = {
    "head": ["us a step", "99 of 100 below", "reads", "agreement", "95 % interval"],
    "models": ["ms a token", "tokens a second", "best published"],
    "engines": ["tokens a second", "prompt, ms", "start, s", "peak memory", "x model", "agreement", "equal tokens"],
}
CAPTIONS = {
    "head": "FlashHead's speed over a row's, round by round: median (lowest to highest). us: mean over the states of a round, median of the rounds",
    "models": "the same body with another head, or with none, or ONNX Runtime's own where a row says so; FlashHead's speed over a row's as above",
    "engines": "tokens a second: after the first. prompt: to its first token. start: from the imports to the first token. memory: above what the "
    "process has after its imports, and over the model's files. equal tokens: until the text differs from FlashHead's",
}


@dataclass(frozen=True)
class Sheet:
    """One table: of a part, a model and a number of threads."""

    part: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    ours: int | None  # the row that stands out


def sheets(document: Mapping[str, Any]) -> Iterator[Sheet]:
    """The tables, in the order of the records."""
    for (part, model), records in groups(document).items():
        for threads in sorted({r["threads"] for r in records}):
            some = [r for r in records if r["threads"] == threads]
            ours: Mapping[str, Any] = next((r for r in some if r["head"] == OURS), {"times_as_fast": {}, "wanted": {}})
            v, d = some[0]["shape"]
            many = f"{threads} thread" + ("s" if threads > 1 else "")
            columns = ["head" if part != "engines" else "engine", *COLUMNS[part], f"{OURS} is x times as fast", "wanted"]
            if part == "engines":
                columns.append("to the first token")
            rows = [[r["head"], *FIGURES[part](r), *against(ours, r["head"], part)] for r in some]
            at = next((i for i, r in enumerate(some) if r is ours), None)
            yield Sheet(part, f"{TITLES[part]}: {model}, {v:,} x {d:,}, {many}", columns, rows, at)


def groups(document: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records by part and model."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in document["records"]:
        found.setdefault((r["part"], r["model"]), []).append(r)
    return found


def against(ours: Mapping[str, Any], other: str, part: str) -> list[str]:
    """How FlashHead compares with another of the same run, and what is wanted."""
    ratio, wanted = ours["times_as_fast"].get(other), ours["wanted"].get(other)
    out = [spread(ratio), DASH if wanted is None or ratio is None else f"{wanted:g}: {'reached' if ratio['median'] >= wanted else 'not reached'}"]
    return out if part != "engines" else [*out, spread(ours.get("prompt_times_as_fast", {}).get(other))]


def spread(ratio: Mapping[str, float] | None) -> str:
    return DASH if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _head(r: Mapping[str, Any]) -> list[str]:
    return [
        number(r["microseconds"], 0), number(r["microseconds_p99"], 0), megabytes(r["bytes_per_step"]),
        percent(r["top1_agreement"]), interval(r["top1_agreement_interval"]),
    ]  # fmt: skip


def _model(r: Mapping[str, Any]) -> list[str]:
    return [number(r["microseconds"] / 1e3), number(r["tokens_per_second"], 1), number(r["settings"].get("published"))]


def _engine(r: Mapping[str, Any]) -> list[str]:
    same, tokens = r["settings"]["equal_tokens"], r["settings"]["tokens"]
    return [
        number(r["tokens_per_second"], 1), number(1e3 * r["prompt_seconds"], 0), number(r["first_token_seconds"]), megabytes(r["peak_bytes"]),
        number(r["peak_bytes"] / r["model_bytes"]), percent(r["top1_agreement"]), "all" if same == tokens else f"{same} of {tokens}",
    ]  # fmt: skip


FIGURES = {"head": _head, "models": _model, "engines": _engine}


def show_onnx(document: Mapping[str, Any], console: Console) -> None:
    """What opens, then a table for each part, model and number of threads, then what was not measured."""
    console.print(Text(str(document["device"])))
    for c in document["counts"]:
        stages = len(c["counts"]["mean"]) - 2
        columns = ["opened", *(f"code {i + 1}" for i in range(stages)), "exact rows"]
        table = new_table(f"{c['model']}, {c['clusters']:,} clusters: opened, rows scored", ["a step", *columns], c["source"])
        for name, counts in c["counts"].items():
            table.add_row(name, *(f"{x:,.0f}" for x in counts))
        console.print(table)
    for sheet in sheets(document):
        table = new_table(sheet.title, sheet.columns, CAPTIONS[sheet.part])
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for sentence in document["skipped"]:
        console.print(Text(f"not measured: {sentence}"))


def write_onnx(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with a plot for each part and model: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(onnx_page(document), path)


def onnx_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    tables: dict[str, list[str]] = {}
    for sheet in sheets(document):
        rows = [[escape(cell) for cell in row] for row in sheet.rows]
        key = sheet.title.rpartition(",")[0]  # without the threads
        tables.setdefault(key, []).append(html_table(sheet.title, [escape(c) for c in sheet.columns], rows, sheet.ours))
    sections = []
    for i, ((title, made), ((part, model), records)) in enumerate(zip(tables.items(), groups(document).items())):
        names = list(dict.fromkeys(r["head"] for r in records))
        series = [Series(name, [_point(r) for r in records if r["head"] == name]) for name in names]
        unit = "microseconds a step" if part == "head" else "tokens a second"
        plot = lines_plot(f"onnx-{i}", f"{TITLES[part].capitalize()} by threads, {model}", series, "threads", unit)
        sections.append(f"<section><h2>{escape(title)}</h2><figure>{plot}{legend(names, marks=True)}</figure>{''.join(made)}</section>")
    sections += [f"<p>Not measured: {escape(sentence)}</p>" for sentence in document["skipped"]]
    first = document["records"][0]
    about = f"{escape(str(document['device']))}, ONNX Runtime {escape(str(first['backend_version']))}, {escape(str(first['command']))}"
    return whole_page("FlashHead: ONNX on a CPU", "ONNX on a CPU", about, sections)


def _point(r: Mapping[str, Any]) -> Point:
    y = r["microseconds"] if r["part"] == "head" else r["tokens_per_second"]
    unit = "us a step" if r["part"] == "head" else "tokens a second"
    return Point(r["threads"], y, f"{r['head']}, {r['threads']} threads: {y:,.1f} {unit}")
