"""What `bench quality` measured as records: one a task, measure and domain. Numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from flashhead_edge.intervals import wilson
from flashhead_edge.records.form import baseline, record, run_name

ASIDE = (
    "FlashHead's probabilities come from logits of three kinds: exact, of a short code, of a cluster. Rows that were scored exactly have the "
    "dense head's logits, all others, and with them the normalising sum, are near it. The figure says how near, not which head is better."
)
HARNESS = "lm-evaluation-harness"
LOWER = ("perplexity", "bits_per_byte", "loss")  # in the name of a measure of which less is better


def records_of(found: Mapping[str, Any], about: Mapping[str, Any], moment: str) -> list[dict[str, Any]]:
    """Every record of a run.

    Args:
        found: `tasks` and `texts`, as `bench_quality` returns them.
        about: what all records say alike: fields of `records.form.record`, of them `command` and `device`.
        moment: date and time, UTC, in the form's pattern.
    """
    run = run_name(about["command"], moment, about["device"])
    common = {**about, "run": run, "bench": "quality", "part": "quality", "batch": 1, "date": moment}
    tasks = (r for task in found["tasks"] for r in _task(task, common))
    return [*tasks, *(r for text in (found["texts"] or {"texts": []})["texts"] for r in _text(text, common))]


def quality(task: str, metric: str, value: float, samples: int, **known: Any) -> dict[str, Any]:
    """The form's `quality`: what is not given is null, more is better unless the measure's name says otherwise."""
    found = {"task": task, "metric": metric, "value": value, "interval": None, "samples": samples}
    lower = any(word in metric for word in LOWER)
    return {**found, "higher_is_better": not lower, "harness": None, "domain": None, "note": None, **known}


def _task(task: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    run, harness = common["run"], f"{HARNESS} {task['harness']}"
    for part in task["parts"]:
        name, n = part["task"], part["items"]
        settings = {**common["settings"], "shots": part["shots"], "items": n, "file": task["file"], "sha256": task["sha256"], "task_version": part["version"]}
        fields = {**common, "settings": settings}
        texts = {} if part["equal_texts"] is None else {"equal texts": part["equal_texts"]}
        answers = {named("equal answers", k): s for k, s in (part["equal_answers"] or {}).items()}
        for metric, s in {**texts, **answers}.items():
            said = quality(name, metric, s["share"], s["of"], interval=s["interval"], harness=harness)
            yield record(**fields, quality=said, baseline=baseline(run, "dense", quality=_own(said, 1.0)))
        note = None if part["kind"] == "generate_until" else ASIDE
        for m in part["metrics"]:
            if m["dense"] is None or m["flash"] is None:
                continue
            metric = named(m["metric"], m["filter"])
            both = [quality(name, metric, m[head], n, harness=harness, note=note) for head in ("flash", "dense")]
            yield record(**fields, quality=both[0], baseline=baseline(run, "dense", quality=both[1]))
    scored = task["scored"]
    if scored is not None:
        exact, loss = scored["exact_rows"], scored["loss"]["all"]
        said = quality(task["task"], "loss above the dense head's, nats a token", loss, scored["tokens"], harness=harness, note=ASIDE)
        yield record(**common, quality=said, baseline=baseline(run, "dense", quality=_own(said, 0.0)))
        said = quality(task["task"], "scored tokens with an exact row", exact["share"], exact["of"], interval=exact["interval"], harness=harness, note=ASIDE)
        yield record(**common, quality=said, baseline=baseline(run, "dense", quality=_own(said, 1.0)))


def _own(said: Mapping[str, Any], value: float) -> dict[str, Any]:
    """What the dense head has of a measure that compares with itself: nothing was asked for it."""
    return {**said, "value": value, "interval": None}


def _text(text: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    run, domain, n = common["run"], PurePath(text["text"]).stem, text["positions"]
    settings = {**common["settings"], "text": text["text"], "sha256": text["sha256"], "positions": n}
    share, ends = text["top1_agreement"], text["top1_agreement_interval"]
    fields = {**common, "settings": settings}
    measures = {
        "bytes_per_step": text["bytes_per_step"],
        "bytes_per_step_p99": text["bytes_per_step_p99"],
        "dense_bytes_per_step": text["dense_bytes_per_step"],
        "top1_agreement": share,
        "top1_agreement_interval": ends,
    }
    said = quality("text", "agreement", share, n, interval=ends, domain=domain)
    dense = baseline(run, "dense", bytes_per_step=text["dense_bytes_per_step"], top1_agreement=1.0, quality=_own(said, 1.0))
    yield record(**fields, **measures, quality=said, baseline=dense)
    if text["perplexity"] is not None:
        both = [quality("text", "perplexity of a token", text[name], n, domain=domain, note=ASIDE) for name in ("perplexity", "perplexity_dense")]
        yield record(**fields, quality=both[0], baseline=baseline(run, "dense", quality=both[1]))
    free = text["free_running"]
    if free is not None:
        same, prompts = round(free["whole"] * free["prompts"]), free["prompts"]
        said = quality("text", "equal greedy texts", same / prompts, prompts, interval=list(wilson(same, prompts)), domain=domain)
        yield record(
            **{**fields, "settings": {**settings, "prompts": prompts}},
            tokens=free["tokens"],
            quality=said,
            baseline=baseline(run, "dense", quality=_own(said, 1.0)),
        )


def named(metric: str, filtered: str) -> str:
    """A measure with the harness's filter, where it has one that says something."""
    return metric if filtered == "none" else f"{metric} ({filtered})"
