"""What `flashhead bench decode` measured: a table for a terminal, and one self-contained page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashhead_edge.report.html import html_table, whole_page, write_page
from flashhead_edge.report.plots import Point, Series, legend, lines_plot

COLUMNS = (
    "model", "batch", "us a step (lowest to highest)", "tokens a second", "first token, ms", "prompt, tokens a second", "graph nodes", "on the GPU, MB",
    "16-bit head / ours", "8-bit head / ours",
)  # fmt: skip


def show_decoding(document: Mapping[str, Any], console: Console) -> None:
    """One row a batch and model."""
    table = Table(title="decoding by our kernels alone", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right")
    for r in document["records"]:
        table.add_row(*_row(r))
    console.print(table)


def write_decoding(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with a plot, tokens a second by batch: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(decoding_page(document), path)


def decoding_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    records = document["records"]
    names = list(dict.fromkeys(str(r["model"]) for r in records))
    series = [Series(name, [Point(r["batch"], r["tokens_per_second"], _label(r)) for r in records if r["model"] == name]) for name in names]
    plot = lines_plot("decoding", "Tokens a second by batch", series, "batch", "tokens a second")
    table = html_table("all", list(COLUMNS), [[escape(cell) for cell in _row(r)] for r in records])
    first = records[0]
    about = f"{escape(str(first['device']))}, {escape(str(first['command']))}; a prompt of {first['prompt']} tokens, {first['cached']} cached in a timed step"
    section = f"<section><figure>{plot}{legend(names, marks=True)}</figure>{table}</section>"
    return whole_page("FlashHead: decoding", "Decoding by our kernels alone", about, [section])


def _row(r: Mapping[str, Any]) -> list[str]:
    low, high = r["spread"]
    return [
        r["model"], str(r["batch"]), f"{r['microseconds']:,.1f} ({low:,.1f} to {high:,.1f})", f"{r['tokens_per_second']:,.0f}",
        f"{1e3 * r['first_token_seconds']:,.1f}", f"{r['prompt'] / r['first_token_seconds']:,.0f}", str(r["graph_nodes"]), f"{r['device_bytes'] / 1e6:,.0f}",
        *(_ratio(r.get("dense", {}).get(kind)) for kind in ("16 bits", "8 bits")),
    ]  # fmt: skip


def _ratio(dense: Mapping[str, Any] | None) -> str:
    """Of the step with a dense head to ours, with what ours saves."""
    return "-" if dense is None else f"{dense['ratio']:.2f} ({dense['saved']:,.0f} us)"


def _label(r: Mapping[str, Any]) -> str:
    return f"{r['model']}, batch {r['batch']}: {r['tokens_per_second']:,.0f} tokens a second"
