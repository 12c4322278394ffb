"""What `flashhead bench quality` measured: tables for a terminal, and kept records as a table of docs/quality.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from flashhead_edge.records.folder import Entry
from flashhead_edge.report.pages import markdown
from flashhead_edge.report.tables import new_table, show_evaluation
from flashhead_edge.report.words import DASH, interval, number, percent


def show_quality(document: Mapping[str, Any], console: Console) -> None:
    """The tasks' answers, their measures and what of them is a likelihood; then the texts, as `evaluate` shows them."""
    tasks = document["tasks"]
    if tasks:
        _show_answers(tasks, console)
        _show_metrics(tasks, console)
        _show_scored(tasks, console)
    texts = document["texts"]
    if texts is not None:
        show_evaluation(texts, console)
        _show_running(texts, console)


def _show_answers(tasks: list[Any], console: Console) -> None:
    rows = [(p["task"], name, s) for t in tasks for p in t["parts"] for name, s in _shares(p)] + [
        (t["task"], "steps of the dense text", t["steps"]) for t in tasks if t["steps"] is not None
    ]
    if not rows:
        return
    table = new_table("equal with both heads", ["task", "what", "equal", "share", "95 % interval"])
    for task, what, s in rows:
        table.add_row(Text(task), Text(what), f"{s['same']:,} of {s['of']:,}", percent(s["share"]), interval(s["interval"]))
    console.print(table)


def _shares(part: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = [] if part["equal_texts"] is None else [("whole text", part["equal_texts"])]
    return found + [("answer" if name == "none" else f"answer ({name})", s) for name, s in (part["equal_answers"] or {}).items()]


def _show_metrics(tasks: list[Any], console: Console) -> None:
    table = new_table("the harness's own figures", ["task", "metric", "items", "dense head", "FlashHead", "FlashHead / dense"])
    for p in (p for t in tasks for p in t["parts"]):
        for m in p["metrics"]:
            ratio = m["flash"] / m["dense"] if m["dense"] and m["flash"] is not None else None
            name = m["metric"] if m["filter"] == "none" else f"{m['metric']} ({m['filter']})"
            table.add_row(Text(p["task"]), Text(name), f"{p['items']:,}", number(m["dense"], 4), number(m["flash"], 4), number(ratio, 4))
    console.print(table)


def _show_scored(tasks: list[Any], console: Console) -> None:
    found = [(t["task"], t["scored"]) for t in tasks if t["scored"] is not None]
    if not found:
        return
    table = new_table(
        "tokens whose probability was asked: FlashHead's loss above the dense head's, nats a token",
        ["task", "tokens", "with an exact row", "all", "with an exact row", "without", "same best token"],
        "A token without an exact row has the score of a short code, or of its cluster; the normalising sum is made of all three kinds.",
    )
    for name, s in found:
        loss = (number(s["loss"][k], 4) for k in ("all", "with_exact_row", "without"))
        table.add_row(Text(name), f"{s['tokens']:,}", percent(s["exact_rows"]["share"]), *loss, percent(s["agreement"]["share"]))
    console.print(table)


def _show_running(texts: Mapping[str, Any], console: Console) -> None:
    """Free-running text: what `evaluate` gives as a mean length, as whole texts."""
    table = new_table("greedy text that runs freely", ["text", "prompts", "tokens", "whole text equal", "equal until, mean", "median"])
    for r in texts["texts"]:
        free = r["free_running"]
        if free is None:
            table.add_row(Text(r["text"]), *[DASH] * 5)
        else:
            whole = round(free["whole"] * free["prompts"])
            table.add_row(
                Text(r["text"]), str(free["prompts"]), str(free["tokens"]), f"{whole} of {free['prompts']}", number(free["mean"], 1), number(free["median"], 1)
            )
    console.print(table)


KEPT = ("task", "measure", "items", "dense head", "FlashHead", "95 % interval", "from")


def quality_block(entries: Sequence[Entry]) -> str:
    """The records of `bench quality` as Markdown, in their files' order."""
    return markdown(KEPT, [_kept_row(e) for e in entries if e.record["bench"] == "quality"])


def _kept_row(entry: Entry) -> list[str]:
    q, base = entry.record["quality"], entry.record["baseline"]["quality"]
    name = q["task"] if q["domain"] is None else f"{q['task']} ({q['domain']})"
    shown = percent if q["interval"] is not None else _four
    dense = DASH if base is None else shown(base["value"])
    return [name, q["metric"], f"{q['samples']:,}", dense, shown(q["value"]), interval(q["interval"]), entry.file]


def _four(value: float | None) -> str:
    return number(value, 4)
