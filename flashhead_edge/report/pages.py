"""Tables of records inside pages that people write: Markdown between two markers, and the rest of the page as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_edge.errors import SettingsError
from flashhead_edge.records.compare import Ends, pooled
from flashhead_edge.records.folder import Entry
from flashhead_edge.records.form import subject
from flashhead_edge.report.explorer import bytes_share, primary
from flashhead_edge.report.words import DASH, percent, short

Record = Mapping[str, Any]
COLUMNS = ("model", "weights", "batch, threads", "device, backend", "baseline", "FlashHead", "times as fast", "from")
AGREEMENT_COLUMNS = ("model", "text", "target", "agreement", "of the dense head's bytes", "from")
PARTS = (("head", "A step of the head alone"), ("step", "A decode step of the whole model"), ("text", "Whole texts"))
UNITS = {"microseconds": "us", "tokens_per_second": "tokens/s"}


@dataclass(frozen=True)
class Headline:
    """A row of the README's table: what it is about, in words, and the fields of the record that it shows."""

    words: str
    fields: Mapping[str, Any]


HEADLINES = (
    Headline(
        "The head's step, Llama-3.2-1B's shape, batch 1, H100", {"bench": "head", "part": "head", "model": "Llama-3.2-1B", "batch": 1, "kind": "measured"}
    ),
    Headline("A decode step in TensorRT, Llama-3.2-1B's shape in W4A16, H100", {"bench": "tensorrt", "part": "step", "model": "Llama-3.2-1B", "batch": 1}),
    Headline("vLLM, Llama-3.2-3B's shape in bf16, batch 1, H100", {"bench": "vllm", "part": "text", "model": "Llama-3.2-3B", "batch": 1}),
    Headline(
        "vLLM, Llama-3.2-1B's shape in W4A16, batch 1, H100", {"bench": "vllm", "part": "text", "model": "Llama-3.2-1B", "precision": "w4a16", "batch": 1}
    ),
    Headline(
        "SmolLM2-135M on one core of an EPYC, against ONNX Runtime GenAI",
        {"bench": "onnx", "part": "text", "model": "SmolLM2-135M-Instruct", "threads": 1},
    ),
)


def with_block(page: str, name: str, block: str) -> str:
    """A page with what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->` replaced.

    Raises:
        SettingsError: the page has not both markers, once and in this order.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}:[^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    found = pattern.findall(page)
    if len(found) != 1:
        raise SettingsError(f"page: {len(found)} blocks named {name}, expected one between its two markers; restore the markers")
    return pattern.sub(lambda m: f"{m[1]}\n{block.strip()}\n\n{m[2]}", page)


def benchmarks_block(entries: Sequence[Entry]) -> str:
    """FlashHead's records, a table a part, predictions in a table of their own."""
    ours = [e for e in entries if e.record["head"] == "FlashHead"]
    measured = [e for e in ours if e.record["kind"] == "measured"]
    parts = []
    for part, title in PARTS:
        if groups := _groups(e for e in measured if e.record["part"] == part):
            parts += [f"**{title}**", markdown(COLUMNS, [_row(g) for g in groups])]
    if groups := _groups(e for e in measured if e.record["part"] == "agreement"):
        parts += ["**Agreement with the dense head**", markdown(AGREEMENT_COLUMNS, [_agreement_row(g) for g in groups])]
    if predicted := _groups(e for e in ours if e.record["kind"] == "predicted"):
        parts += ["**Predicted, measured by nobody**", markdown(COLUMNS, [[f"*{cell}*" if cell else "" for cell in _row(g)] for g in predicted])]
    return "\n\n".join(parts)


def headline_block(entries: Sequence[Entry], folder: str) -> str:
    """The README's table.

    Args:
        folder: of the records, as the README links to it.
    Raises:
        SettingsError: a headline has no record, or records of more than one subject.
    """
    rows = []
    for line in HEADLINES:
        groups = _groups(e for e in entries if e.record["head"] == "FlashHead" and all(e.record[k] == v for k, v in line.fields.items()))
        if len(groups) != 1:
            raise SettingsError(f"headline '{line.words}': {len(groups)} subjects of records, expected one; correct report.pages.HEADLINES or the records")
        cells = _row(groups[0])
        rows.append([line.words, cells[4], cells[5], cells[6], f"[{groups[0][0].file}]({folder}/{groups[0][0].file})"])
    return markdown(("measured", "baseline", "FlashHead", "times as fast", "record"), rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what would end a cell or open a tag is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell if cell == "---" else _cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def _groups(entries: Any) -> list[list[Entry]]:
    """Entries by subject: several runs of one are one row."""
    found: dict[str, list[Entry]] = {}
    for e in entries:
        found.setdefault(subject(e.record), []).append(e)
    order = ("backend", "model", "precision", "batch", "threads")
    return sorted(found.values(), key=lambda group: [(group[0].record[n] is None, group[0].record[n] or 0) for n in order])


def _row(group: Sequence[Entry]) -> list[str]:
    r, records = group[0].record, [e.record for e in group]
    name, _, _ = primary(r)
    bases = [x["baseline"] for x in records if x["baseline"] is not None]
    base = pooled(bases, name) if bases else None
    threads = "" if r["threads"] is None else f", {r['threads']} thread{'' if r['threads'] == 1 else 's'}"
    weights = {True: "real", False: "random", None: DASH}[r["real_weights"]]
    rival = r["baseline"]["head"] if r["baseline"] else DASH
    return [
        r["model"], f"{r['precision'] or DASH}, {weights}", f"{DASH if r['batch'] is None else r['batch']}{threads}",
        f"{r['device']}, {r['backend']} {r['backend_version'] or ''}".strip(), rival if base is None else f"{rival}: {_figure(base, UNITS[name])}",
        _figure(pooled(records, name), UNITS[name]), _ratio(pooled(records, "times_as_fast")), group[0].file,
    ]  # fmt: skip


def _agreement_row(group: Sequence[Entry]) -> list[str]:
    r = group[0].record
    share, read = pooled([e.record for e in group], "top1_agreement"), bytes_share(r)
    text = r["settings"].get("text")
    target = DASH if r["target_agreement"] is None else percent(r["target_agreement"], 1)
    return [
        r["model"], "all together" if text is None else str(text), target, DASH if share is None else percent(share.median),
        DASH if read is None else percent(read), group[0].file,
    ]  # fmt: skip


def _ratio(ends: Ends | None) -> str:
    if ends is None:
        return DASH
    return f"{ends.median:.2f}" + ("" if ends.low == ends.high else f" ({ends.low:.2f} to {ends.high:.2f})")


def _figure(ends: Ends | None, unit: str) -> str:
    if ends is None:
        return DASH
    spread = "" if ends.low == ends.high else f" ({short(ends.low)} to {short(ends.high)})"
    return f"{short(ends.median)} {unit}{spread}"
