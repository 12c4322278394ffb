"""Records inside pages that people write: tables and single figures between markers, and the rest of the page as it is."""

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
from flashhead_edge.report.words import DASH, megabytes, percent, short

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
    Headline(
        "A decode step by our kernels alone, Llama-3.2-1B's shape in W4A16, H100",
        {"bench": "decode", "part": "step", "model": "Llama-3.2-1B", "batch": 1, "device": "NVIDIA H100 80GB HBM3"},
    ),
    Headline("vLLM, Llama-3.2-3B's shape in bf16, batch 1, H100", {"bench": "vllm", "part": "text", "model": "Llama-3.2-3B", "batch": 1}),
    Headline(
        "vLLM, Llama-3.2-1B's shape in W4A16, batch 1, H100", {"bench": "vllm", "part": "text", "model": "Llama-3.2-1B", "precision": "w4a16", "batch": 1}
    ),
    Headline(
        "SmolLM2-135M on one core of an EPYC, against ONNX Runtime GenAI",
        {"bench": "onnx", "part": "text", "model": "SmolLM2-135M-Instruct", "threads": 1},
    ),
)


@dataclass(frozen=True)
class Cited:
    """A figure that a sentence gives: a measure of a record, of its baseline, or its bytes as a share of the dense head's."""

    fields: Mapping[str, Any]
    measure: str
    of_baseline: bool = False


def _vllm(model: str) -> Mapping[str, Any]:
    return {"bench": "vllm", "part": "text", "model": model, "precision": "bf16", "batch": 1, "head": "FlashHead"}


def _onnx(threads: int, head: str = "FlashHead") -> Mapping[str, Any]:
    return {"bench": "onnx", "part": "text", "model": "SmolLM2-135M-Instruct", "threads": threads, "head": head}


_TENSORRT = {"bench": "tensorrt", "part": "step", "model": "Llama-3.2-1B", "batch": 1, "head": "FlashHead"}
_RIVALS = {
    "int8-rows": "dense int8, one scale a row", "int8-groups": "dense int8, groups of 32", "int4": "dense int4, groups of 32",
    "published": "published, 256 probes",
}  # fmt: skip
CITED: Mapping[str, Cited] = {
    "vllm-3b": Cited(_vllm("Llama-3.2-3B"), "tokens_per_second"), "vllm-3b-dense": Cited(_vllm("Llama-3.2-3B"), "tokens_per_second", True),
    "vllm-1b": Cited(_vllm("Llama-3.2-1B"), "tokens_per_second"), "vllm-1b-dense": Cited(_vllm("Llama-3.2-1B"), "tokens_per_second", True),
    "onnx-1": Cited(_onnx(1), "tokens_per_second"), "onnx-2": Cited(_onnx(2), "tokens_per_second"),
    "onnx-1-fast": Cited(_onnx(1), "times_as_fast"), "onnx-2-fast": Cited(_onnx(2), "times_as_fast"),
    "onnx-first": Cited(_onnx(2), "first_token_seconds"), "onnx-bytes": Cited(_onnx(2), "peak_bytes"),
    "llama-cpp-1": Cited(_onnx(1, "llama.cpp"), "tokens_per_second"), "llama-cpp-2": Cited(_onnx(2, "llama.cpp"), "tokens_per_second"),
    "tensorrt": Cited(_TENSORRT, "microseconds"), "tensorrt-dense": Cited(_TENSORRT, "microseconds", True),
    **{f"{name}-{measure}": Cited({"bench": "evaluate", "head": head}, measure)
       for name, head in _RIVALS.items() for measure in ("top1_agreement", "bytes_share")},
}  # fmt: skip
FIGURE = re.compile(r"(<!-- figure ([\w-]+) -->)[^<]*(<!-- end -->)")


def with_figures(page: str, entries: Sequence[Entry]) -> str:
    """A page with what stands between each `<!-- figure NAME -->` and `<!-- end -->` replaced.

    Raises:
        SettingsError: a name is none of `CITED`, a figure has no record, or records of more than one subject.
    """
    return FIGURE.sub(lambda m: m[1] + cited(m[2], entries) + m[3], page)


def cited(name: str, entries: Sequence[Entry]) -> str:
    """A figure of `CITED` as its sentence gives it: the median between its ends, without a unit but for shares and bytes."""
    if name not in CITED:
        raise SettingsError(f"figure {name}: no such figure, expected one of {', '.join(CITED)}; correct the page or report.pages.CITED")
    asked = CITED[name]
    groups = _groups(e for e in entries if all(e.record[k] == v for k, v in asked.fields.items()))
    if len(groups) != 1:
        raise SettingsError(f"figure {name}: {len(groups)} subjects of records, expected one; correct report.pages.CITED or the records")
    records = [e.record["baseline"] if asked.of_baseline else e.record for e in groups[0]]
    if asked.measure == "bytes_share":
        return percent(bytes_share(records[0]), 1)
    found = pooled(records, asked.measure)
    if found is None:
        raise SettingsError(f"figure {name}: its record has no {asked.measure}, expected one; correct report.pages.CITED or the records")
    if asked.measure == "top1_agreement":
        return percent(found.median, 1)
    return megabytes(found.median) if asked.measure == "peak_bytes" else _figure(found, "")


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
    if predicted := _groups(e for e in ours if e.record["kind"] == "predicted" and e.record["part"] in dict(PARTS)):
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


FAITHFUL = ("text", "target 99.5 %: agreement at share of dense (p99 / mean)", "target 99.9 %")


def faithful_block(entries: Sequence[Entry]) -> str:
    """The README's table of agreement: a row a text, with the bytes of the dense head's and how far their 99th percentile stands above their mean.

    Raises:
        SettingsError: a text was not measured at both targets.
    """
    found: dict[tuple[str, float], Record] = {
        (str(e.record["settings"]["text"]), e.record["target_agreement"]): e.record
        for e in entries if e.record["bench"] == "evaluate" and e.record["head"] == "FlashHead" and e.record["settings"].get("text")
    }  # fmt: skip
    texts, targets = list(dict.fromkeys(text for text, _ in found)), (0.995, 0.999)
    if missing := [f"{text} at {percent(t, 1)}" for text in texts for t in targets if (text, t) not in found]:
        raise SettingsError(f"table of agreement: no record of {missing[0]}, expected both targets of each text; keep both runs, or neither")
    rows = [[text, *(_faithful(found[text, t]) for t in targets)] for text in texts]
    mean = ["mean"]
    for target in targets:
        of = [found[text, target] for text in texts]
        share, read = (sum(values) / len(of) for values in ([r["top1_agreement"] for r in of], [bytes_share(r) or 0.0 for r in of]))
        mean.append(f"{percent(share)} at **{percent(read)}**")
    return markdown(FAITHFUL, [*rows, mean])


def _faithful(r: Record) -> str:
    return f"{percent(r['top1_agreement'])} at {percent(bytes_share(r))} ({r['bytes_per_step_p99'] / r['bytes_per_step']:.1f})"


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
    order = ("backend", "model", "precision", "batch", "threads", "device")
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
    return f"{short(ends.median)} {unit}".rstrip() + spread
