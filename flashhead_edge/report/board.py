"""What a board does and whether a model fits it, for a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashhead_edge.report.tables import new_table
from flashhead_edge.report.words import DASH

MIB = 1 << 20
PARTS = {
    "weights": "weights",
    "head_index": "head: index",
    "exact_rows": "head: exact rows, and the embedding of a tied model",
    "kv_cache": "KV cache",
    "weights_laid_out_anew": "weights laid out anew by the runtime",
    "prompt": "a prompt's scratch",
    "runtime": "runtime: program, libraries, contexts",
}


def show_plan(document: Mapping[str, Any], console: Console) -> None:
    """What `jetson.plan.plan` returned."""
    title = f"{document['model']} in {document['runtime']}: {document['context']:,} positions, batch {document['batch']} (predicted)"
    table = new_table(title, ["part", "MiB"])
    for key, name in PARTS.items():
        if document["parts"][key]:
            table.add_row(name, size(document["parts"][key]))
    table.add_row("all", size(document["needed"]), style="bold")
    table.add_row("free", size(document["free"]))
    console.print(table)
    console.print(Text(f"free: {document['memory']}."))
    limit = "" if document["context_limit"] is None else f" of the model's {document['context_limit']:,}"
    most = document["largest_context"]
    if document["fits"] is None:
        verdict = "how much is free is not known"
    elif document["fits"]:
        verdict = f"fits; at most {most:,} positions{limit} do"
    else:
        verdict = f"does not fit; at most {most:,} positions{limit} do" if most else "does not fit, at no context"
    console.print(Text(f"{verdict}. {document['kv_cache_per_position']:,} bytes of cache a position."))
    for note in document["notes"]:
        console.print(Text(f"- {note}"))


def show_looks(documents: Iterator[Mapping[str, Any]], console: Console) -> None:
    """Looks at a board: in place on a terminal, one below the other elsewhere."""
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        if not console.is_terminal:
            for document in documents:
                console.print(look_table(document))
            return
        with Live(console=console, auto_refresh=False) as live:
            for document in documents:
                live.update(look_table(document), refresh=True)


def write_lines(documents: Iterator[Mapping[str, Any]], stdout: TextIO) -> None:
    """One line of strict JSON a look."""
    with contextlib.suppress(KeyboardInterrupt):
        for document in documents:
            stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
            stdout.flush()


def look_table(d: Mapping[str, Any]) -> Table:
    """One look, a row for each subject that the board tells something of."""
    software = ", ".join(x for x in (f"L4T {d['l4t']}" if d["l4t"] else "", f"JetPack {d['jetpack']}" if d["jetpack"] else "") if x)
    table = Table(title=Text(f"{d['board']}{f' ({software})' if software else ''}"), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "power mode": None if d["power_mode"] is None else f"{d['power_mode']}, clocks {_locked(d['clocks_locked'])}",
        "CPU": _joined(_share(d["cpu_load"]), *(_clock(c) for c in d["cpu_clocks"])),
        "GPU": _joined(_share(d["gpu_load"]), _clock(d["gpu_clock"])),
        "memory clock": _clock(d["memory_clock"]),
        **{f"GPU {i} (NVML)": _nvml(g) for i, g in enumerate(d["gpus"])},
        "memory": None if d["memory_available"] is None else f"{size(d['memory_available'])} of {size(d['memory_total'])} MiB available",
        "of it nvmap": None if d["nvmap"] is None else f"{size(d['nvmap'])} MiB of all processes",
        "largest blocks": None if d["largest_block"] is None else f"{d['largest_block'][0]:,} x {d['largest_block'][1] / MIB:g} MiB",
        "swap": None if d["swap_used"] is None else f"{size(d['swap_used'])} of {size(d['swap_total'])} MiB",
        "power": None if d["power"] is None else f"{d['power']:.2f} W ({d['power_scope']}){_energy(d['joules'])}",
        "rails": _joined(*(f"{name} {watts:.2f} W" for name, watts in d["rails"].items())),
        "temperatures": _joined(*(f"{name} {value:.1f} C" for name, value in d["temperatures"].items())),
        "server": None if d["server"] is None else _server(d["server"]),
        "throttling": _joined(*d["throttled"], *(f"alarm {a}" for a in d["alarms"]), *(f"{n:,} x {kind} since boot" for kind, n in d["events"].items() if n)),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    if not d["gpus"] and d["gpu_clock"] is None and d["gpu_load"] is None:
        table.add_row("GPU", Text(f"none that can be seen ({d['unread'].get('NVML', 'no device files of one')})"))
    for path, why in list(d["unread"].items())[:8]:
        if path != "NVML":
            table.add_row(Text("not read", style="dim"), Text(f"{path}: {why}", style="dim"))
    return table


def size(value: float | None) -> str:
    """Bytes as MiB."""
    return DASH if value is None else f"{value / MIB:,.0f}"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def _clock(clock: Mapping[str, Any] | None) -> str | None:
    if clock is None or clock["now"] is None:
        return None
    bounds = "" if clock["least"] is None or clock["most"] is None else f" of {clock['least']:,.0f} to {clock['most']:,.0f}"
    return f"{clock['now']:,.0f} MHz{bounds}"


def _locked(locked: bool | None) -> str:
    return "not known" if locked is None else "locked" if locked else "not locked"


def _server(s: Mapping[str, Any]) -> str:
    first = None if s["seconds_to_first_token"] is None else f"the first after {s['seconds_to_first_token']:.3g} s"
    speed = None if s["tokens_per_second"] is None else f"{s['tokens_per_second']:,.1f} tokens a second"
    energy = None if s["joules_per_token"] is None else f"{s['joules_per_token']:.3g} J a token"
    return _joined(speed, first, energy, f"{s['texts_active']} texts", f"{s['texts_waiting']} waiting" if s["texts_waiting"] else None)


def _energy(joules: float | None) -> str:
    return "" if joules is None else f", {joules:,.0f} J since the start"


def _nvml(gpu: Mapping[str, Any]) -> str:
    memory = None if gpu["memory_free"] is None else f"{size(gpu['memory_free'])} of {size(gpu['memory_total'])} MiB free"
    figures = (_share(gpu["load"]), _unit(gpu["clock"], "MHz"), _unit(gpu["temperature"], "C"), _unit(gpu["power"], "W"), memory)
    return _joined(gpu["name"], *figures)


def _unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:,.4g} {unit}"


def _joined(*parts: str | None) -> str:
    return ", ".join(p for p in parts if p)
