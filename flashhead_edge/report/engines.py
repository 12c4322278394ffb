"""What `flashhead bench tensorrt` measured: a table for a terminal, and one self-contained page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashhead_edge.report.html import html_table, whole_page, write_page
from flashhead_edge.report.plots import Point, Series, legend, lines_plot
from flashhead_edge.report.words import DASH

COLUMNS = ("model", "batch", "head", "us a step (lowest to highest)", "graph nodes", "engine, MB", "tokens a second", "x dense", "of the dense head gone")


def show_engines(document: Mapping[str, Any], console: Console) -> None:
    """One row a head, batch and model."""
    table = Table(title="a decode step in TensorRT", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right")
    for r in document["records"]:
        table.add_row(*_row(r))
    console.print(table)


def write_engines(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with a plot a model, time of a step by batch: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(engines_page(document), path)


def engines_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    sections = []
    for i, (name, group) in enumerate(groupby(document["records"], key=lambda r: str(r["model"]))):
        records = list(group)
        heads = list(dict.fromkeys(r["head"] for r in records))
        series = [Series(head, [Point(r["batch"], r["microseconds"], _label(r)) for r in records if r["head"] == head]) for head in heads]
        plot = lines_plot(f"engines-{i}", f"Time of a step by batch, {name}", series, "batch", "microseconds")
        table = html_table(name, list(COLUMNS[1:]), [[escape(cell) for cell in _row(r)[1:]] for r in records])
        sections.append(f"<section><h2>{escape(name)}</h2><figure>{plot}{legend(heads, marks=True)}</figure>{table}</section>")
    first = document["records"][0]
    about = f"{escape(str(first['device']))}, TensorRT {escape(str(first['backend_version']))}, {escape(str(first['command']))}"
    return whole_page("FlashHead: a decode step in TensorRT", "A decode step in TensorRT", about, sections)


def _row(r: Mapping[str, Any]) -> list[str]:
    low, high = r["spread"]
    rate, ratio, gone, nodes = (r.get(name) for name in ("tokens_per_second", "ratio_to_dense", "share_of_head_gone", "graph_nodes"))
    return [
        r["model"], str(r["batch"]), r["head"], f"{r['microseconds']:,.1f} ({low:,.1f} to {high:,.1f})", DASH if nodes is None else str(nodes),
        f"{r['engine_bytes'] / 1e6:,.2f}", DASH if rate is None else f"{rate:,.0f}", DASH if ratio is None else f"{ratio:.2f}",
        DASH if gone is None else f"{100 * gone:.0f} %",
    ]  # fmt: skip


def _label(r: Mapping[str, Any]) -> str:
    return f"{r['head']}, batch {r['batch']}: {r['microseconds']:,.1f} us a step"
