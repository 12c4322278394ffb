"""What `flashhead bench compare` found: a table for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashhead_edge.records.compare import Change, Comparison
from flashhead_edge.records.form import described
from flashhead_edge.report.words import DASH, counted

COLUMNS = ("model, head", "of", "device, backend", "measure", "before", "after", "ratio", "spreads allow", "baseline", "")
NAMED = 20  # subjects of one side alone


def verdict(change: Change, tolerance: float) -> str:
    """`lost`, `gained`, or `same`: within both spreads or the tolerance."""
    if change.lost(tolerance):
        return "lost"
    return "gained" if change.low > 1 and change.ratio > 1 + tolerance else "same"


def show_comparison(found: Comparison, tolerance: float, console: Console) -> None:
    """A row for each measure that was lost or gained, the lost first, and the rest counted; the ratio is above 1 where the newer side is better."""
    moved = [c for c in found.changes if verdict(c, tolerance) != "same"]
    table = Table(title="after against before: above 1 is better", title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i < 4 else "right", overflow="fold")
    for c in sorted(moved, key=lambda c: (not c.lost(tolerance), c.ratio)):
        r, said = c.record, verdict(c, tolerance)
        cells = [
            f"{r['model']}, {r['head']}", described(r), f"{r['device']}, {r['backend']}", _measure(c), f"{c.before:,.5g}", f"{c.after:,.5g}", f"{c.ratio:.3f}",
            f"{c.low:.3f} to {c.high:.3f}" if c.spread_known else DASH, DASH if c.baseline is None else f"{c.baseline:.3f}", said,
        ]  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in cells), style={"lost": "bold red", "gained": "green"}.get(said))
    if moved:
        console.print(table)
    for where, titles in (("before", found.only_before), ("after", found.only_after)):
        for one in titles[:NAMED]:
            console.print(Text(f"only {where}: {one}"))
        if len(titles) > NAMED:
            console.print(Text(f"only {where}: {len(titles) - NAMED} more"))
    lost, same = sum(c.lost(tolerance) for c in found.changes), len(found.changes) - len(moved)
    rest = f"{counted(len(found.only_before), 'subject')} only before, {len(found.only_after)} only after"
    console.print(Text(f"{counted(len(found.changes), 'measure')}, {lost} lost beyond the spread and {100 * tolerance:g} %, {same} the same; {rest}"))


def _measure(change: Change) -> str:
    asked = change.record["quality"] if change.measure == "quality" else None
    return change.measure.replace("_", " ") if asked is None else f"{asked['task']}: {asked['metric']}"
