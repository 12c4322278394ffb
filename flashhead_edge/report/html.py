"""One HTML page that says how faithful a head is: self-contained, no script, no address, readable without its pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from flashhead_edge.errors import FlashHeadError
from flashhead_edge.report import plots
from flashhead_edge.report.words import DASH, interval, megabytes, number, percent, quantiles, verdict, visible


def write_html(document: Mapping[str, Any], path: str | Path) -> None:
    """Write the report of what `evaluate_checkpoint` returned: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    write_page(page(document), path)


def write_page(text: str, path: str | Path) -> None:
    """Write a page: whole, or not at all.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlashHeadError(f"{path}: the report cannot be written ({error.strerror}), expected a folder that takes files; choose another path") from error


def page(document: Mapping[str, Any]) -> str:
    """The whole page as text."""
    sections = [_promise(document), _agreement(document), _texts(document), _reads(document), _language(document), _worst(document), _how(document)]
    about = (
        f"How faithful its {escape(document['head'])} head is to the dense head, and what it reads. "
        f"{document['shape'][0]:,} tokens, hidden size {document['shape'][1]:,}."
    )
    return whole_page(f"FlashHead report: {document['model']}", str(document["model"]), about, sections)


def whole_page(title: str, heading: str, about: str, sections: Sequence[str]) -> str:
    """A self-contained page around its sections, which like `about` are HTML already."""
    style = (files("flashhead_edge.report") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{escape(heading)}</h1>\n<p class='soft'>{about}</p>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def html_table(name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], ours: int | None = None) -> str:
    """A table whose cells are HTML already; `ours` is the row that stands out."""
    head = "".join(f'<th scope="col">{c}</th>' for c in columns)
    body = ""
    for i, row in enumerate(rows):
        cells = f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:])
        body += f"<tr{' class=ours' if i == ours else ''}>{cells}</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _figure(plot: str, legend: str, caption: str) -> str:
    return f"<figure>{plot}{legend}<figcaption>{caption}</figcaption></figure>"


def _rows(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    texts = [(str(t["text"]), t) for t in document["texts"]]
    return texts + ([("all texts", document)] if len(texts) > 1 else [])


def _promise(document: Mapping[str, Any]) -> str:
    kind, sentence = verdict(document)
    dense, s = document["dense_bytes_per_step"], document["summary"]
    p99 = document["bytes_per_step_p99"]
    target = s["target_agreement"]
    promise = (
        f"Promised: at {100 * target:g} % of all steps, on text that it was never calibrated on, the head returns the very token that the dense head returns."
        if target is not None
        else "No share of steps was promised when this head was made; what follows is what was measured."
    )
    figures = [
        ("agreement, lowest text", percent(s["lowest_agreement"]), f"95 % interval {interval(s['lowest_agreement_interval'])}"),
        ("bytes read a step", percent(document["bytes_share"]), f"{megabytes(document['bytes_per_step'])} of {megabytes(dense)}"),
        ("99 of 100 steps read at most", percent(p99 / dense), megabytes(p99)),
        ("positions measured", f"{document['positions']:,}", f"{s['texts']} text{'s' if s['texts'] != 1 else ''}"),
    ]
    cells = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in figures)
    return (
        f"<section class='verdict {kind}'><h2>The contract</h2><p><strong>{escape(sentence)}</strong></p><p>{escape(promise)} "
        "Where it differs, it returns the best of the tokens that it scored exactly: a plausible token, but not the dense head’s. "
        "Every token always has a finite logit, so temperature, penalties, masks and log-probabilities stay defined; "
        "those of tokens that were not scored are estimates.</p>"
        f"<dl class='figures'>{cells}</dl></section>"
    )


def _agreement(document: Mapping[str, Any]) -> str:
    everyone = [document, *document["rivals"]]
    names = [_name(r, i) for i, r in enumerate(everyone)]
    series = []
    for i, pooled in enumerate(everyone):
        points = []
        if len(document["texts"]) > 1:
            points += [_point(t if i == 0 else t["rivals"][i - 1], f"{names[i]}, {t['text']}", large=False, bar=i == 0) for t in document["texts"]]
        points.append(_point(pooled, names[i], large=True, bar=i == 0))
        series.append(plots.Series(names[i], points))
    plot = plots.agreement_plot(series, document["summary"]["target_agreement"])
    caption = (
        "Up and to the left is better. Both axes are logarithmic: from 99 to 99.9 % is as far as from 90 to 99 %. Large marks: all texts together"
        + ("; small ones: each text. " if len(document["texts"]) > 1 else ". ")
        + "Bars: 95 % intervals. A head that never missed stands where half a miss would put it."
    )
    rows = []
    for i, r in enumerate(everyone):
        each = [t["top1_agreement"] if i == 0 else t["rivals"][i - 1]["top1_agreement"] for t in document["texts"]]
        rows.append(
            [
                escape(names[i]),
                percent(r["top1_agreement"]),
                percent(min(each)),
                percent(r["coverage"]),
                megabytes(r["bytes_per_step"]),
                percent(r["bytes_share"]),
            ]
        )
    table = html_table("Heads", ["head", "agreement", "lowest text", "coverage", "a step reads", "of dense"], rows, 0)
    return f"<section><h2>Agreement against bytes</h2>{_figure(plot, plots.legend(names, True), caption)}{table}</section>"


def _name(record: Mapping[str, Any], i: int) -> str:
    return str(record["name"]) if i else f"this head ({record['name']})"


def _point(r: Mapping[str, Any], name: str, *, large: bool, bar: bool) -> plots.Point:
    floor = 0.5 / r["positions"]
    low, high = r["top1_agreement_interval"]
    ends = {"low": max(1 - low, floor), "high": max(1 - high, floor)} if bar else {}
    label = f"{name}: {percent(r['top1_agreement'])} at {percent(r['bytes_share'])} of the dense bytes"
    return plots.Point(r["bytes_share"], max(1 - r["top1_agreement"], floor), label, large=large, **ends)


def _texts(document: Mapping[str, Any]) -> str:
    rows = []
    for name, r in _rows(document):
        rows.append(
            [
                escape(name), f"{r['positions']:,}", percent(r["top1_agreement"]), interval(r["top1_agreement_interval"]), percent(r["coverage"]),
                percent(r["bytes_share"]), percent(r["bytes_per_step_p99"] / r["dense_bytes_per_step"]),
            ]
        )  # fmt: skip
    columns = ["text", "positions", "agreement", "95 % interval", "coverage", "bytes, of dense", "p99 of bytes"]
    note = "Agreement: the same token as the dense head. Coverage: the dense head’s token was among those scored exactly."
    return f"<section><h2>Text by text</h2>{html_table('Texts', columns, rows)}<p class='note-line'>{note}</p></section>"


def _reads(document: Mapping[str, Any]) -> str:
    texts, dense = document["texts"], document["dense_bytes_per_step"]
    names = [str(t["text"]) for t in texts]
    lines = [plots.Series(n, [plots.Point(b / dense, i / 100, "") for i, b in enumerate(t["bytes_percentiles"])]) for n, t in zip(names, texts)]

    def share(v: float) -> str:
        return f"{100 * v:.3g} %"

    parts = ["<h2>What a step reads</h2>"]
    opened, total = document["clusters_opened"], document["settings"].get("n_clusters")
    if opened and len(document["clusters_opened_histogram"]["steps"]) == 1:
        parts.append(f"<p>Every step opens {opened['p50']:,.0f} of {total:,} clusters.</p>")
    elif opened:
        h = document["clusters_opened_histogram"]
        marks = [(max(opened["p50"], 1), f"half of the steps: {opened['p50']:,.0f} or fewer"), (opened["p99"], f"99 of 100: {opened['p99']:,.0f} or fewer")]
        plot = plots.histogram_plot("clusters", "Clusters opened a step", h["edges"], h["steps"], marks, "clusters opened", lambda v: f"{v:,.0f}")
        parts.append(_figure(plot, "", f"Clusters opened, of {total:,}, all texts: easy steps open a handful, hard ones many."))
    edges = [e / dense for e in document["bytes_histogram"]["edges"]]
    mean, p99 = document["bytes_share"], document["bytes_per_step_p99"] / dense
    marks = [(mean, f"mean {percent(mean)}"), (p99, f"99 of 100: {percent(p99)} or less")]
    plot = plots.histogram_plot(
        "bytes", "Bytes read a step", edges, document["bytes_histogram"]["steps"], marks, "bytes read a step, of the dense head’s", share
    )
    parts.append(_figure(plot, "", "All texts, everything counted: rotation, centroids, codes, scales, own errors, token ids, exact rows."))
    plot = plots.cumulative_plot("cumulative", "Share of steps that read at most so many bytes", lines, "bytes read a step, of the dense head’s", share)
    parts.append(_figure(plot, plots.legend(names, False), "Text by text: where a line crosses 99 % is the size that 99 of 100 steps stay within."))
    codes = max(len(r["rows_scored"]) for _, r in _rows(document))
    rows = []
    for name, r in _rows(document):
        scored = [quantiles(s) for s in r["rows_scored"]] + [DASH] * (codes - len(r["rows_scored"]))
        capped = DASH if r["capped_steps"] is None else f"{r['capped_steps']:,} ({percent(r['capped_share'])})"
        rows.append([escape(name), quantiles(r["clusters_opened"]), *scored, quantiles(r["exact_rows"]), capped])
    columns = ["text", "clusters", *[f"rows by code {i + 1}" for i in range(codes)], "exact rows", "capped steps"]
    return f"<section>{''.join(parts)}{html_table('Counts', columns, rows)}<p class='note-line'>p50 / p90 / p99 over steps.</p></section>"


def _language(document: Mapping[str, Any]) -> str:
    rows = []
    for name, r in _rows(document):
        free = r["free_running"]
        rows.append(
            [
                escape(name),
                f"{number(r['perplexity'])} : {number(r['perplexity_dense'])}",
                f"{number(r['perplexity_covered'])} : {number(r['perplexity_covered_dense'])}",
                number(r["total_variation"], 4),
                number(r["total_variation_p99"], 4),
                number(r["total_variation_candidates"], 4),
                DASH if free is None else f"{free['mean']:.0f} ({free['median']:.0f}) of {free['tokens']}",
            ]
        )
    columns = ["text", "perplexity, this : dense", "of covered tokens", "TV, mean", "TV, p99", "TV, candidates only", "same greedy text"]
    note = (
        "TV: total variation between the two sampling distributions at temperature 1, 0 where they are equal, 1 where they share nothing. "
        "Same greedy text: tokens that free-running text stays identical to the dense head’s, mean (median)."
    )
    return f"<section><h2>As a language model</h2>{html_table('Language', columns, rows)}<p class='note-line'>{note}</p></section>"


def _worst(document: Mapping[str, Any]) -> str:
    worst = document["worst_tokens"]
    if not worst:
        return "<section><h2>Tokens missed most often</h2><p>None: the dense head’s token was returned at every step.</p></section>"
    rows = [
        [f"<code>{escape(visible(w['text']))}</code>", f"{w['id']:,}", f"{w['missed']:,}", f"{w['of']:,}", percent(w["missed"] / w["of"], 1)] for w in worst
    ]
    columns = ["the dense head’s token", "id", "missed", "times it was the winner", "share missed"]
    return f"<section><h2>Tokens missed most often</h2>{html_table('Worst tokens', columns, rows)}</section>"


def _how(document: Mapping[str, Any]) -> str:
    lines = [
        "The judge is the dense head: the largest float32 logit from the weights as stored, vocabulary padding left out, the smaller id on ties.",
        f"Each text counts from its first token, in windows of {document['context']} tokens that know nothing of each other.",
        "Bytes of the dense head and of exact rows are counted at two bytes a weight.",
        "Perplexity and total variation are those of the final logits, after the model’s own scale and soft-cap.",
    ]
    texts = "; ".join(f"{t['text']} (SHA-256 {t['sha256'][:16]})" for t in document["texts"])
    made = f"{document['backend']} {document['backend_version']}, {document['device']}, {document['threads']} threads"
    command = f"<br><code>{escape(document['command'])}</code>" if document["command"] else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<section><h2>How it was measured</h2><ul class='plain'>{items}</ul></section><footer>{escape(texts)}<br>{escape(made)}{command}</footer>"
