"""What `flashhead bench head` measured: tables for a terminal, and one self-contained page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flashhead_edge.report.html import html_table, whole_page, write_page
from flashhead_edge.report.plots import Point, Series, legend, lines_plot
from flashhead_edge.report.tables import new_table
from flashhead_edge.report.words import DASH, number, percent

STEPS = ("opened", "code 1", "code 2", "code 3", "code 4", "exact rows")


def show_heads(document: Mapping[str, Any], console: Console) -> None:
    """What opens, then a table for each shape, then from which batch on the dense head is faster."""
    console.print(Text(f"{document['device']}, copy bandwidth {document['bandwidth'] / 1e12:.2f} TB/s (read and written)"))
    for c in document["counts"]:
        stages = len(c["counts"]["measured mean"]) - 2
        columns = [STEPS[0], *STEPS[1 : 1 + stages], STEPS[-1]]
        table = new_table(f"{c['model']}, {c['clusters']:,} clusters: opened, rows scored", ["a step", *columns], f"from {c['source']}")
        for name, counts in c["counts"].items():
            table.add_row(name, *(f"{x:,.0f}" for x in counts))
        console.print(table)
    for model, records in by_model(document):
        v, d = records[0]["shape"]
        columns = ["head", "N", "MB a step", "floor, us", "us, median", "p99", "of bandwidth", "x dense", "x published"]
        table = new_table(f"{model}, {v:,} x {d:,}", columns, "floor: the bytes at the copy's bandwidth. x dense: how many times as fast as the dense head")
        for r in records:
            us, floor = r["microseconds"], r["floor_microseconds"]
            takes = f" ({r['settings']['takes']})" if "takes" in r["settings"] else ""
            draw = r["head"].startswith("draw")
            table.add_row(
                Text(r["head"] + takes), str(r["batch"]), number(r["bytes_per_step"] / 1e6), number(floor), number(us), number(r["microseconds_p99"]),
                percent(floor / us, 1), *(DASH if draw else number(r[key]) for key in ("speedup_over_dense", "speedup_over_published")),
            )  # fmt: skip
        console.print(table)
    for c in document["crossovers"]:
        console.print(Text(f"{c['model']}: {crossover_sentence(c)}"))
    if "stored" in document:
        console.print(Text(f"kept in {document['stored']}"))


def by_model(document: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Records in groups of one model."""
    return [(str(name), list(group)) for name, group in groupby(document["records"], key=lambda r: r["model"])]


def crossover_sentence(c: Mapping[str, Any]) -> str:
    """From which batch on the dense head is faster, where tokens and where logits are wanted."""
    parts = []
    for kind, found in c["kinds"].items():
        most = max(m["batch"] for m in found["measured"])
        least = f"at no batch up to {most}" if found["crossover"] is None else f"from a batch of {found['crossover']} on"
        parts.append(f"{least} for {kind}")
    return f"the dense head is faster {', '.join(parts)}; auto takes it there"


def write_heads(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a page with one plot a shape: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(heads_page(document), path)


def heads_page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    sections = []
    for i, (model, records) in enumerate(by_model(document)):
        shown = [r for r in records if not r["head"].startswith("draw")]
        names = list(dict.fromkeys(r["head"] for r in shown))
        series = [Series(name, [_point(r) for r in shown if r["head"] == name]) for name in names]
        v, d = records[0]["shape"]
        plot = lines_plot(f"heads-{i}", f"Microseconds of a step by batch, {model}", series, "batch", "microseconds a step")
        table = html_table(model, ["head", "batch", "MB", "us, median", "p99"], [_row(r) for r in records])
        sections.append(f"<section><h2>{escape(model)}, {v:,} x {d:,}</h2><figure>{plot}{legend(names, marks=True)}</figure>{table}</section>")
    about = f"{escape(str(document['device']))}, copy bandwidth {document['bandwidth'] / 1e12:.2f} TB/s, {escape(str(document['records'][0]['command']))}"
    return whole_page("FlashHead: a step of the head", "A step of the output head", about, sections)


def _point(r: Mapping[str, Any]) -> Point:
    return Point(r["batch"], r["microseconds"], f"{r['head']}, batch {r['batch']}: {r['microseconds']:.2f} us, 99 of 100 below {r['microseconds_p99']:.2f}")


def _row(r: Mapping[str, Any]) -> list[str]:
    numbers = (number(r["bytes_per_step"] / 1e6), number(r["microseconds"]), number(r["microseconds_p99"]))
    return [escape(r["head"]), str(r["batch"]), *numbers]
