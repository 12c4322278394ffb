"""What `flashhead bench compare` found: a table for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashhead_edge.records.compare import Change, Comparison
from flashhead_edge.report.words import DASH

COLUMNS = ("model", "part", "head", "batch", "device, backend", "measure", "before", "after", "ratio", "spreads allow", "baseline", "")


def verdict(change: Change, tolerance: float) -> str:
    """`lost`, `gained`, or `same`: within both spreads or the tolerance."""
    if change.lost(tolerance):
        return "lost"
    return "gained" if change.low > 1 and change.ratio > 1 + tolerance else "same"


def show_comparison(found: Comparison, tolerance: float, console: Console) -> None:
    """A row a measure; the ratio is above 1 where the newer side is better."""
    table = Table(title="after against before: above 1 is better", title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i in (0, 1, 2, 4, 5) else "right")
    for c in found.changes:
        r, said = c.record, verdict(c, tolerance)
        threads = f", {r['threads']} threads" if r["threads"] else ""
        cells = [
            r["model"], r["part"], r["head"], DASH if r["batch"] is None else str(r["batch"]), f"{r['device']}, {r['backend']}{threads}", _measure(c),
            f"{c.before:,.5g}", f"{c.after:,.5g}", f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}" if c.spread_known else DASH,
            DASH if c.baseline is None else f"{c.baseline:.3f}", said,
        ]  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in cells), style={"lost": "bold red", "gained": "green"}.get(said))
    console.print(table)
    lost = sum(c.lost(tolerance) for c in found.changes)
    rest = f"{found.only_before} subjects only before, {found.only_after} only after"
    console.print(Text(f"{len(found.changes)} measures, {lost} lost beyond the spread and {100 * tolerance:g} %; {rest}"))


def _measure(change: Change) -> str:
    asked = change.record["quality"] if change.measure == "quality" else None
    return change.measure.replace("_", " ") if asked is None else f"{asked['task']}: {asked['metric']}"
