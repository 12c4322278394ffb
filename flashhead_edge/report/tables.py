"""Tables for a terminal. Each function writes to the console that it is given, so that stdout stays the answer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashhead_edge.report.words import DASH, interval, megabytes, number, percent, quantiles, verdict, visible

COLOURS = {"kept": "green", "close": "yellow", "missed": "red", "none": "default"}


def new_table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", title_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def show_evaluation(document: Mapping[str, Any], console: Console) -> None:
    """What `evaluate_checkpoint` returned: the texts, the rivals, the worst tokens, the verdict."""
    texts = document["texts"]
    rows = [(t["text"], t) for t in texts] + ([("all texts", document)] if len(texts) > 1 else [])
    head = f"{document['head']} head of {document['model']}, V {document['shape'][0]:,}, d {document['shape'][1]:,}"
    table = new_table(head, ["text", "positions", "agreement", "95 % interval", "coverage", "MB a step", "of dense", "p99 of dense"])
    for name, r in rows:
        p99 = r["bytes_per_step_p99"] / r["dense_bytes_per_step"]
        table.add_row(
            Text(name), f"{r['positions']:,}", percent(r["top1_agreement"]), interval(r["top1_agreement_interval"]), percent(r["coverage"]),
            number(r["bytes_per_step"] / 1e6, 3), percent(r["bytes_share"]), percent(p99),
        )  # fmt: skip
    console.print(table)
    codes = max(len(r["rows_scored"]) for _, r in rows)
    table = new_table("what a step reads (p50 / p90 / p99)", ["text", "clusters", *[f"code {i + 1}" for i in range(codes)], "exact rows", "capped steps"])
    for name, r in rows:
        scored = [quantiles(s) for s in r["rows_scored"]] + [DASH] * (codes - len(r["rows_scored"]))
        capped = DASH if r["capped_steps"] is None else f"{r['capped_steps']:,} ({percent(r['capped_share'])})"
        table.add_row(Text(name), quantiles(r["clusters_opened"]), *scored, quantiles(r["exact_rows"]), capped)
    console.print(table)
    table = new_table(
        "as a language model (this head : dense head)",
        ["text", "perplexity", "of covered", "TV mean", "TV p99", "TV candidates", "same greedy text"],
        "TV: total variation of the sampling distributions at temperature 1. Greedy text: mean (median) tokens until the first that differs.",
    )
    for name, r in rows:
        free = r["free_running"]
        table.add_row(
            Text(name),
            f"{number(r['perplexity'])} : {number(r['perplexity_dense'])}",
            f"{number(r['perplexity_covered'])} : {number(r['perplexity_covered_dense'])}",
            number(r["total_variation"], 4),
            number(r["total_variation_p99"], 4),
            number(r["total_variation_candidates"], 4),
            DASH if free is None else f"{free['mean']:.0f} ({free['median']:.0f}) of {free['tokens']}",
        )
    console.print(table)
    if document["rivals"]:
        show_rivals(document, console)
    worst = document["worst_tokens"][:10]
    if worst:
        console.print(Text("worst tokens: ", style="bold") + Text(", ".join(f"{visible(w['text'])} ({w['missed']} of {w['of']})" for w in worst)))
    kind, sentence = verdict(document)
    console.print(Text(sentence, style=COLOURS[kind]))


def show_rivals(document: Mapping[str, Any], console: Console) -> None:
    """The head beside its rivals, on all texts together and on the text where each did worst."""
    table = new_table("beside other heads, all texts", ["head", "agreement", "lowest text", "coverage", "MB a step", "of dense", "TV mean", "same greedy text"])
    for i, r in enumerate([document, *document["rivals"]]):
        each = [t["top1_agreement"] if i == 0 else t["rivals"][i - 1]["top1_agreement"] for t in document["texts"]]
        free = r["free_running"]
        table.add_row(
            Text(r["name"] if i else f"this head ({r['name']})"), percent(r["top1_agreement"]), percent(min(each)), percent(r["coverage"]),
            number(r["bytes_per_step"] / 1e6, 3), percent(r["bytes_share"]), number(r["total_variation"], 4),
            DASH if free is None else f"{free['mean']:.0f} of {free['tokens']}", style="bold" if i == 0 else None,
        )  # fmt: skip
    console.print(table)


def show_conversion(summary: Mapping[str, Any], console: Console) -> None:
    """What a conversion or calibration returned: the promise, what it was calibrated on, the point taken of the frontier."""
    if "target_agreement" not in summary:
        show_inspection(summary, console)
        return
    table = new_table("calibrated on", ["text", "positions", "required", "held-out agreement", "95 % interval", "misses", "reached"])
    for t in summary.get("texts", []):
        table.add_row(
            Text(str(t["name"])), f"{t['positions']:,}", percent(t["required"]), percent(t["top1_agreement"]), interval(t.get("top1_agreement_interval")),
            f"{t['misses']:,}", "yes" if t["reached"] else "NO",
        )  # fmt: skip
    console.print(table)
    frontier = summary.get("frontier", [])
    if frontier:
        dense, target = summary["dense_bytes_per_step"], summary["target_agreement"]
        device = summary.get("device")
        table = new_table(
            "frontier", ["", "target", "held-out agreement", f"microseconds on {device}" if device else "bytes a step", "" if device else "of dense", "reached"]
        )
        for point in frontier:
            taken = abs(point["target_agreement"] - target) < 1e-12
            cost = [f"{point['cost']:.3g}", ""] if device else [megabytes(point["cost"]), percent(point["cost"] / dense)]
            table.add_row(
                "taken" if taken else "", percent(point["target_agreement"], 2), percent(point["held_out_agreement"]), *cost,
                "yes" if point["reached"] else "NO", style="bold" if taken else None,
            )  # fmt: skip
        console.print(table)
    dense = summary["dense_bytes_per_step"]
    own = f" (own text is held to {percent(summary['own_text_target'])})" if summary.get("own_text_target") else ""
    console.print(Text(f"target: {percent(summary['target_agreement'])} on text never calibrated on{own}"))
    if "chosen" in summary:
        console.print(Text(f"taken: {summary['chosen']}; of its margins, those that reach the target"))
    mean, p99 = summary["bytes_per_step"], summary["bytes_per_step_p99"]
    share = f"{percent(mean / dense)} of the dense head's {megabytes(dense)}"
    console.print(Text(f"a step reads {megabytes(mean)} on average, {share}; 99 of 100 steps read at most {megabytes(p99)}"))
    if "most_bytes_per_step" in summary:
        lost = f"; the caps that see to it lose {summary['lost_to_caps']:,} held-out tokens, counted above" if summary["lost_to_caps"] else ""
        console.print(Text(f"no step reads more than {megabytes(summary['most_bytes_per_step'])}{lost}"))
    if not summary.get("reached", True):
        console.print(Text("The target was not reached on every text: margins give up none of its held-out tokens, more positions may reach it.", style="red"))
    if summary.get("extrapolated"):
        console.print(
            Text(
                f"extrapolated, set by fewer than 10 held-out misses: the margins of {', '.join(summary['extrapolated'])}; more positions make them firmer",
                style="yellow",
            )
        )


def show_quantisation(report: Mapping[str, Any], console: Console) -> None:
    """What `quantize` returned: perplexity and agreement on each text, and bytes."""
    kind = "symmetric" if report["symmetric"] else "with zero points"
    columns = ["text", "positions", "perplexity: float", "nearest", "ours", "agreement: nearest", "ours", "95 % interval"]
    table = new_table(
        f"{report['model']} in 4 bits, groups of {report['group']}, {kind}",
        columns,
        "nearest: round-to-nearest with the same groups. No text here was chosen on.",
    )
    for t in report["texts"]:
        near, ours = t["nearest"], t["ours"]
        table.add_row(
            Text(str(t["name"])), f"{t['positions']:,}", *(number(t[form]["perplexity"], 3) for form in ("float", "nearest", "ours")),
            percent(near["top1_agreement"]), percent(ours["top1_agreement"]), interval(ours["top1_agreement_interval"]),
        )  # fmt: skip
    console.print(table)
    sizes, errors = report["bytes"], report["output_error"]
    console.print(
        Text(f"weights: {megabytes(sizes['before'])} before, {megabytes(sizes['after'])} now, of which the linear layers {megabytes(sizes['linear_after'])}")
    )
    console.print(
        Text(f"output error on the states chosen on: {errors['ours'] / errors['nearest']:.2f} of round-to-nearest's" if errors["nearest"] else "no error")
    )


def show_bundle(result: Any, console: Console) -> None:
    """What a bundle holds: bytes by part, what to type on the board, and what a reader should know."""
    table = new_table(f"{result.archive} for {result.target}", ["part", "MB"])
    table.add_row(f"model ({result.model})", f"{result.model_bytes / 1e6:,.1f}")
    ahead = 0
    if result.ahead is not None:
        ahead = result.ahead.bytes
        table.add_row(f"made ahead: weights as the GPU reads them, {result.ahead.kernels} kernels", f"{ahead / 1e6:,.1f}")
    table.add_row(f"{len(result.wheels)} wheels, installer, checksums", f"{(result.bytes - result.model_bytes - ahead) / 1e6:,.1f}")
    table.add_row("archive", f"{result.bytes / 1e6:,.1f}")
    table.add_row("installed", f"{result.installed_bytes / 1e6:,.1f}")
    console.print(table)
    name = result.archive.replace("\\", "/").rsplit("/", 1)[-1]
    console.print(Text(f"there: tar xf {name}; sudo sh flashhead-*-{result.target}/install.sh (uninstall takes it away)"))
    console.print(Text(f"SHA-256 {result.sha256}"))
    for note in result.notes:
        console.print(Text(note))


def show_export(result: Any, console: Console) -> None:
    """What an export has written: files and sizes, and what to do with them."""
    table = new_table(f"{result.folder} ({result.dialect}, body {result.body or 'not exported'})", ["file", "MB"])
    for name, size in result.files.items():
        table.add_row(name, f"{size / 1e6:,.2f}")
    console.print(table)
    if result.body is not None:
        console.print(Text(f'now: flashhead generate {result.folder} --prompt "..."'))


def show_tensorrt(folder: str, manifest: Mapping[str, Any], console: Console) -> None:
    """What an export for TensorRT holds: its engines, or that there are none yet and where they are built."""
    m, engines = manifest, manifest.get("engines") or {}
    table = new_table(f"{folder} ({m['layers']} layers, {m['precision']}, {m['context']:,} positions, batch {m['max_batch']})", ["engine", "MB", "seconds"])
    for engine in engines.values():
        table.add_row(engine["file"], f"{engine['bytes'] / 1e6:,.2f}", f"{engine['seconds']:,.1f}")
    if engines:
        console.print(table)
    if m.get("weights_bytes"):
        console.print(Text(f"weights, beside the engines: {m['weights_bytes'] / 1e6:,.1f} MB"))
    if not engines:
        console.print(Text(f"no engines yet; on the board: flashhead export engines {folder}"))
    elif m["layers"] == "plugin":
        console.print(Text(f'now: flashhead generate {folder} --prompt "..." --backend tensorrt'))


def show_inspection(description: Mapping[str, Any], console: Console) -> None:
    """What is in a checkpoint: names and values, nested ones indented; lists of records as their number."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    _rows(description, table, 0)
    console.print(table)


def _rows(values: Mapping[str, Any], table: Table, depth: int) -> None:
    for name, value in values.items():
        label = Text("  " * depth + str(name).replace("_", " "))
        if isinstance(value, Mapping):
            if value:
                table.add_row(label, "")
                _rows(value, table, depth + 1)
        elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
            table.add_row(label, f"{len(value)} entries")
        else:
            table.add_row(label, Text(_short(value)))


def _short(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return ", ".join(_short(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
