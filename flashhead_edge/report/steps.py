"""Decode steps with several heads, as `flashhead bench decode` and `bench tensorrt` measured them: a table for a terminal, and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flashhead_edge.report.html import html_table, whole_page, write_page
from flashhead_edge.report.plots import Point, Series, legend, lines_plot
from flashhead_edge.report.tables import new_table
from flashhead_edge.report.words import DASH, number

Record = Mapping[str, Any]
TITLES = {"cuda": "a decode step by our kernels alone", "tensorrt": "a decode step in TensorRT"}  # by backend


@dataclass(frozen=True)
class Column:
    """A column that is shown where a record has it."""

    title: str
    cell: Callable[[Record], str | None]
    on_page_alone: bool = False  # a terminal is narrow


def _of(name: str, scale: float = 1.0, digits: int = 0) -> Callable[[Record], str | None]:
    return lambda r: None if r.get(name) is None else number(scale * r[name], digits)


def _end(which: int) -> Callable[[Record], str | None]:
    return lambda r: number(r["spread"][which], 1)


def _gone(r: Record) -> str | None:
    return None if r.get("share_of_head_gone") is None else f"{100 * r['share_of_head_gone']:.0f} %"


COLUMNS = (
    Column("head", lambda r: str(r["head"])), Column("batch", lambda r: str(r["batch"])), Column("us a step", _of("microseconds", digits=1)),
    Column("lowest", _end(0)), Column("highest", _end(1)), Column("x dense", _of("speedup_over_dense", digits=2)), Column("of the dense head gone", _gone),
    Column("tokens a second", _of("tokens_per_second")), Column("mJ a token", _of("joules_per_token", 1e3, 1)),
    Column("first token, ms", _of("first_token_seconds", 1e3, 1)),
    Column("head's bytes, MB", _of("bytes_per_step", 1e-6, 1), True), Column("graph nodes", _of("graph_nodes"), True),
    Column("engine, MB", _of("engine_bytes", 1e-6, 2), True), Column("on the GPU, MB", _of("device_bytes", 1e-6), True),
)  # fmt: skip


def show_steps(document: Mapping[str, Any], console: Console) -> None:
    """A table a model, one row a head and batch."""
    columns, title = [c for c in _shown(document["records"]) if not c.on_page_alone], _title(document["records"])
    for name, records in _by_model(document["records"]):
        table = new_table(f"{title}, {name}", [c.title for c in columns], "x dense: how many times as fast as the step with the dense head")
        table.columns[0].min_width = len("FlashHead")
        for r in records:
            table.add_row(*(Text(cell) for cell in _cells(r, columns)))
        console.print(table)


def write_steps(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with a plot a model, time of a step by batch: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(steps_page(document), path)


def steps_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    columns, sections = _shown(document["records"]), []
    for i, (name, records) in enumerate(_by_model(document["records"])):
        heads = list(dict.fromkeys(r["head"] for r in records))
        series = [Series(head, [Point(r["batch"], r["microseconds"], _label(r)) for r in records if r["head"] == head]) for head in heads]
        plot = lines_plot(f"steps-{i}", f"Time of a step by batch, {name}", series, "batch", "microseconds")
        table = html_table(name, [c.title for c in columns], [[escape(cell) for cell in _cells(r, columns)] for r in records])
        sections.append(f"<section><h2>{escape(name)}</h2><figure>{plot}{legend(heads, marks=True)}</figure>{table}</section>")
    first, title = document["records"][0], _title(document["records"])
    about = f"{first['device']}, {first['backend']} {first['backend_version']}, {first['command']}; {first['context']} tokens cached in a timed step"
    return whole_page(f"FlashHead: {title}", title[0].upper() + title[1:], escape(about), sections)


def _title(records: Sequence[Record]) -> str:
    return TITLES[records[0]["backend"]]


def _by_model(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    return [(name, list(group)) for name, group in groupby(records, key=lambda r: str(r["model"]))]


def _shown(records: Sequence[Record]) -> list[Column]:
    return [c for c in COLUMNS if any(c.cell(r) is not None for r in records)]


def _cells(r: Record, columns: Sequence[Column]) -> list[str]:
    return [c.cell(r) or DASH for c in columns]


def _label(r: Record) -> str:
    return f"{r['head']}, batch {r['batch']}: {r['microseconds']:,.1f} us a step"
