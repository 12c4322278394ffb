"""What `flashhead bench vllm` measured: a table for a terminal, and one self-contained page with plots."""

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

COLUMNS = ("model", "body", "runner", "batch", "head", "GPU, step", "GPU, head", "GPU, sampler", "host, head", "tokens a second (lowest to highest)")


def show_serving(document: Mapping[str, Any], console: Console) -> None:
    """One row a head, batch, runner, body and model: GPU time of a decode step and its parts, host time of the head, tokens a second."""
    table = Table(title="a decode step in vLLM, microseconds", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:3] else "right")
    for r in document["records"]:
        table.add_row(*_row(r))
    console.print(table)


def write_serving(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with two plots a model, body and runner, GPU time of a step and tokens a second by batch: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(serving_page(document), path)


def serving_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    sections = []
    for i, (title, group) in enumerate(groupby(document["records"], key=lambda r: ", ".join(_row(r)[:3]))):
        records = list(group)
        heads = list(dict.fromkeys(r["head"] for r in records))
        plots = []
        for kind, unit, value in (("step", "microseconds of GPU time", _step), ("rate", "tokens a second", _rate)):
            series = [Series(head, [Point(r["batch"], value(r), _label(r)) for r in records if r["head"] == head]) for head in heads]
            plots.append(lines_plot(f"serving-{i}-{kind}", f"{unit.capitalize()} by batch, {title}", series, "batch", unit))
        table = html_table(title, list(COLUMNS[3:]), [[escape(cell) for cell in _row(r)[3:]] for r in records])
        sections.append(f"<section><h2>{escape(title)}</h2><figure>{''.join(plots)}{legend(heads, marks=True)}</figure>{table}</section>")
    first = document["records"][0]
    about = f"{escape(str(first['device']))}, vLLM {escape(str(first['backend_version']))}, {escape(str(first['command']))}"
    return whole_page("FlashHead: a decode step in vLLM", "A decode step in vLLM", about, sections)


def _row(r: Mapping[str, Any]) -> list[str]:
    gpu, (low, high) = r["gpu_microseconds"], r["tokens_per_second_spread"]
    times = [f"{t:,.1f}" for t in (gpu["total"], gpu["head"], gpu["sampler"], r["host_microseconds"]["head"])]
    made = [r["model"], r["settings"]["body"], r["settings"]["runner"], str(r["batch"]), r["head"]]
    return [*made, *times, f"{r['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"]


def _step(r: Mapping[str, Any]) -> float:
    return float(r["gpu_microseconds"]["total"])


def _rate(r: Mapping[str, Any]) -> float:
    return float(r["tokens_per_second"])


def _label(r: Mapping[str, Any]) -> str:
    return f"{r['head']}, batch {r['batch']}: {_step(r):,.1f} us a step, {_rate(r):,.0f} tokens a second"
