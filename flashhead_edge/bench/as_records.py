"""What each bench's own document says, as records: one converter a bench, and a sentence for whatever has no baseline in its run."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashhead_edge.bench.provenance import commit, processor
from flashhead_edge.records.folder import KEY
from flashhead_edge.records.form import baseline, document, figure, record, run_name

Own = Mapping[str, Any]
FLASH = {
    "fitted": "FlashHead",
    "fitted, at the cap": "FlashHead, at the cap",
    "fitted, fewest bytes": "FlashHead, fewest bytes",
    "fitted, full-width logits": "FlashHead, full-width logits",
    "flash": "FlashHead",
    "flash, logits": "FlashHead, full-width logits",
    "auto": "FlashHead or dense",
}
ONNX_PARTS = {"head": "head", "models": "step", "engines": "text"}
FP32, INT4, GENAI_INT8 = "dense fp32", "dense int4, blocks of 32", "GenAI, int8 head"  # what the parts of `bench onnx` are compared with
ONNX_BASELINES = {"head": FP32, "models": INT4, "engines": GENAI_INT8}
ON_A_CPU = ("onnx", "evaluate")  # benches that may run on a GPU too say nothing of it
SEEDS = {"head": [0], "decode": [0], "tensorrt": [0], "vllm": [0], "onnx": [0, 2]}  # of made weights and states; a real model's steps draw nothing
GPU_TIME = "GPU time from a trace: median over its steps, no spread kept"


def with_records(bench: str, own: Own, command: str, moment: datetime.datetime | None = None) -> dict[str, Any]:
    """A bench's document with its records beside it, under `benchmark`.

    Args:
        bench: head, decode, vllm, onnx, tensorrt or evaluate.
        command: the command line that made it.
        moment: when it was begun, UTC; None is now.
    """
    moment = moment or datetime.datetime.now(datetime.timezone.utc)
    records, left_out = as_records(bench, own, command, moment)
    return {**own, KEY: document(records, left_out)}


def as_records(bench: str, own: Own, command: str, moment: datetime.datetime) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a bench's document, and sentences on what it measured that is none."""
    date = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = {"bench": bench, "run": run_name(bench, command, date, platform.node()), "date": date, "command": command, **machine(bench not in ON_A_CPU)}
    return CONVERTERS[bench](own, facts)


def machine(on_gpu: bool) -> dict[str, Any]:
    """Driver and power mode, where the system tells them: a board's mode by name, another GPU's limit; a driver is of work on a GPU."""
    from flashhead_edge.jetson.board import read_board
    from flashhead_edge.jetson.driver import driver_version

    mode = read_board().power_mode
    if mode is not None:
        power = mode.name or f"mode {mode.number}"
    else:
        power = power_limit() if on_gpu else None
    return {"driver": driver_version() if on_gpu else None, "power_mode": power}


def power_limit() -> str | None:
    """What the GPU may draw, as `limit 700 W`; None where NVML does not tell, or GPUs differ: which of them a process runs on its order does not tell."""
    from flashhead_edge.jetson.board_nvml import read_gpus

    limits = {gpu["power_limit"] for gpu in read_gpus({})}
    (only,) = limits if len(limits) == 1 else (None,)
    return f"limit {only:.0f} W" if isinstance(only, float) else None


def times(own: Own, samples: int | None = None) -> Any:
    """The figure of a step: a range where the bench keeps two ends, the median absolute deviation where it keeps one number."""
    us, spread = own.get("microseconds"), own.get("spread")
    if us is None:
        return None
    if isinstance(spread, Sequence):
        return figure(us, spread[0], spread[1], "range", samples)
    return figure(us, samples=samples) if spread is None else figure(us, max(0.0, us - spread), us + spread, "mad", samples)


def joules(own: Own) -> Any:
    """What a token draws: the median of the windows between their ends."""
    each = own.get("joules_rounds") or ()
    return figure(own["joules_per_token"], min(each), max(each), "range", len(each)) if each else figure(own.get("joules_per_token"))


def quotient(top: Any, bottom: Any) -> Any:
    """How many times `top` is `bottom`: of medians, and at worst and best of their spreads; None where one is not known."""
    if top is None or bottom is None or not bottom["median"]:
        return None
    low = None if top["low"] is None or not bottom["high"] else top["low"] / bottom["high"]
    high = None if top["high"] is None or not bottom["low"] else top["high"] / bottom["low"]
    same = top["spread"] if top["spread"] == bottom["spread"] else None
    return figure(top["median"] / bottom["median"], low, high, same)


def paired(theirs: Sequence[float], ours: Sequence[float]) -> Any:
    """The same from times of the same rounds."""
    each = sorted(a / b for a, b in zip(theirs, ours))
    middle = len(each) // 2
    median = each[middle] if len(each) % 2 else (each[middle - 1] + each[middle]) / 2
    return figure(median, each[0], each[-1], "range", len(each))


def common(own: Own, facts: Own, part: str, head: str) -> dict[str, Any]:
    """The fields that most benches name as a record does."""
    same = ("model", "shape", "real_weights", "backend", "backend_version", "threads", "batch", "context", "dense_bytes_per_step")
    real, device = own.get("real_weights"), own.get("device")
    return {
        **facts, "part": part, "head": head, **{name: own.get(name) for name in same}, "device": processor() if device == "cpu" else device,
        "seeds": [] if real else SEEDS.get(facts["bench"]) if real is False else None, "commit": own.get("commit") or commit(),
    }  # fmt: skip


def calibrated(own: Own) -> dict[str, Any]:
    """What a checkpoint's head was held to and what its calibration showed, where it is one's."""
    if not own["head"].startswith("FlashHead") and own["head"] not in FLASH:
        return {}
    return {"target_agreement": own.get("target_agreement"), "calibrated_agreement": own.get("agreement")}


def _no_dense(bench: str, names: Sequence[str], what: str) -> list[str]:
    names = list(dict.fromkeys(names))
    return [f"bench {bench}: {', '.join(names)}: no {what} in the same run, so that it is no record"] if names else []


def _no_power(bench: str, records: Sequence[Own]) -> list[str]:
    heads: dict[str, dict[str, None]] = {}
    for r in records:
        if r.get("power_unknown") and not r["head"].startswith("draw"):  # which is no record either
            heads.setdefault(r["power_unknown"], {})[FLASH.get(str(r["head"]), str(r["head"]))] = None
    return [f"bench {bench}: {', '.join(names)}: no joules a token: {reason}" for reason, names in heads.items()]


def head_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`bench head`: every head beside the dense one in 16 bits, at each batch."""
    from flashhead_edge.bench.timing import REPLAYS

    of = [r for r in own["records"] if r["head"] in ("dense bf16", "dense fp16")]
    dense = {(r["model"], r["batch"]): r for r in of}
    found, alone = [], []
    for r in own["records"]:
        base = dense.get((r["model"], r["batch"]))
        if r["head"] in ("dense bf16", "dense fp16") or r["head"] == "draw from the candidates":  # a draw has no dense counterpart
            continue
        if base is None:
            alone.append(f"{r['head']} on {r['model']}")
            continue
        ours, theirs = times(r, REPLAYS), times(base, REPLAYS)
        seen = {"counts": r["counts"]} if r.get("counts") else {}
        found.append(
            record(
                **common(r, facts, "head", FLASH.get(r["head"], r["head"])) | {"device": own["device"]},
                precision=base["head"].removeprefix("dense "),
                **calibrated(r),
                observed={**seen, **r.get("settings", {}), **_power_scope(r)},
                microseconds=ours,
                joules_per_token=joules(r),
                bytes_per_step=r["bytes_per_step"],
                times_as_fast=quotient(theirs, ours),
                baseline=baseline(
                    facts["run"],
                    base["head"],
                    base.get("backend"),
                    base.get("backend_version"),
                    microseconds=theirs,
                    joules_per_token=joules(base),
                    bytes_per_step=base["bytes_per_step"],
                ),
            )
        )
    return found, _no_dense("head", alone, "dense head") + _no_power("head", own["records"])


SEEN = (  # of what a step's own record says besides
    "graph_nodes", "engine_bytes", "dense_head_microseconds", "share_of_head_gone", "head_microseconds", "planned_bytes", "weight_bytes", "positions",
    "prompt", "power_scope",
)  # fmt: skip


def tensorrt_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`bench tensorrt`: the whole step with our head beside the one with TensorRT's own."""
    return step_records("tensorrt", own, facts, ("dense",), "engine with a dense head (flashhead export engines FOLDER --dense-head adds it)")


def decode_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`bench decode`: the whole step with our head and with a dense one in 8 bits, beside the one with the model's rows in 16 bits."""
    return step_records("decode", own, facts, ("dense fp16", "dense bf16"))


def step_records(bench: str, own: Own, facts: Own, bases: Sequence[str], missing: str = "dense head") -> tuple[list[dict[str, Any]], list[str]]:
    """Whole steps beside the same step with one of the heads `bases`; steps without a head, and of a head alone, are no records."""

    def key(r: Own) -> tuple[Any, ...]:
        return r["model"], r["batch"]

    dense = {key(r): r for r in own["records"] if r["head"] in bases}
    found, alone = [], []
    for r in own["records"]:
        if r["head"] in (*bases, "FlashHead alone", "no head"):
            continue
        base = dense.get(key(r))
        if base is None:
            alone.append(f"{r['head']} on {r['model']}, batch {r['batch']}")
            continue
        ours, theirs = _step_measures(r), _step_measures(base)
        rounds = [of.get("microseconds_rounds") for of in (base, r)]
        first, ends = r.get("first_token_seconds"), r.get("first_token_spread")
        found.append(
            record(
                **common(r, facts, "step", r["head"]),
                precision=r["body"],
                **calibrated(r),
                settings={"activations": r["precision"]} | {n: r[n] for n in ("group", "layers") if r.get(n) is not None},
                observed={n: r[n] for n in SEEN if r.get(n) is not None},
                tokens_per_second=_rate(r),
                first_token_seconds=figure(first) if ends is None else figure(first, ends[0], ends[1], "range"),
                peak_bytes=r.get("real_bytes"),
                times_as_fast=paired(*rounds) if all(rounds) else quotient(theirs["microseconds"], ours["microseconds"]),
                **ours,
                baseline=baseline(facts["run"], base["head"], base["backend"], base["backend_version"], **theirs),
            )
        )
    return found, _no_dense(bench, alone, missing) + _no_power(bench, own["records"])


def _rate(r: Own) -> Any:
    low, high = r.get("tokens_per_second_spread") or (None, None)
    return figure(r.get("tokens_per_second"), low, high, None if low is None else "range", r.get("tokens_per_second_texts"))


def _step_measures(r: Own) -> dict[str, Any]:
    return {
        "microseconds": times(r, len(r.get("microseconds_rounds") or ()) or None),
        "joules_per_token": joules(r),
        "bytes_per_step": r.get("bytes_per_step"),
    }


def _power_scope(r: Own) -> dict[str, Any]:
    return {"power_scope": r["power_scope"]} if r.get("power_scope") else {}


def vllm_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`bench vllm`: whole texts, the GPU's time of a step, and of it the head's, beside the same engine's dense head."""
    from flashhead_edge.bench.vllm import ROUNDS, TOKENS

    def key(r: Own) -> tuple[Any, ...]:
        return r["model"], r["settings"]["runner"], r["settings"]["body"], r["batch"]

    def rate(r: Own) -> Any:
        low, high = r["tokens_per_second_spread"]
        return figure(r["tokens_per_second"], low, high, "range", ROUNDS)

    dense = {key(r): r for r in own["records"] if r["head"] == "dense"}
    found, alone = [], []
    for r in own["records"]:
        base = dense.get(key(r))
        if r["head"] == "dense":
            continue
        if base is None:
            alone.append(f"{r['head']} on {r['model']}")
            continue
        settings = {"runner": r["settings"]["runner"]}
        seen = {"crossovers": r["settings"]["crossovers"]}
        head, precision = FLASH.get(r["head"], r["head"]), r["settings"]["body"]
        said = base["backend"], base["backend_version"]
        found.append(
            record(
                **common(r, facts, "text", head),
                precision=precision,
                settings=settings,
                observed=seen,
                tokens=TOKENS,
                tokens_per_second=rate(r),
                times_as_fast=quotient(rate(r), rate(base)),
                baseline=baseline(facts["run"], "dense", *said, tokens_per_second=rate(base)),
            )
        )
        for part, name in (("step", "total"), ("head", "head")):
            ours, theirs = figure(r["gpu_microseconds"][name]), figure(base["gpu_microseconds"][name])
            found.append(
                record(
                    **common(r, facts, part, head),
                    precision=precision,
                    settings=settings,
                    observed=seen,
                    microseconds=ours,
                    times_as_fast=quotient(theirs, ours),
                    baseline=baseline(facts["run"], "dense", *said, microseconds=theirs),
                    note=GPU_TIME,
                )
            )
    unasked = ["bench vllm: no joules a token: it does not ask for the power"] if found else []
    return found, _no_dense("vllm", alone, "dense head") + unasked


def onnx_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`bench onnx`: heads beside the dense one in float32, bodies beside the int4 head on the same body, engines beside GenAI's best export."""

    def key(r: Own) -> tuple[Any, ...]:
        return r["part"], r["model"], r["threads"]

    bases = {key(r): r for r in own["records"] if r["head"] == ONNX_BASELINES[r["part"]]}
    found, alone = [], []
    for r in own["records"]:
        base, part = bases.get(key(r)), ONNX_PARTS[r["part"]]
        if r["head"] in (ONNX_BASELINES[r["part"]], "no head"):
            continue
        if base is None:
            alone.append(f"{r['head']} on {r['model']}")
            continue

        ours, theirs = _onnx_measures(r), _onnx_measures(base)
        rounds = [of.get("microseconds_rounds") for of in (base, r)]
        fast = paired(*rounds) if all(rounds) else quotient(theirs["microseconds"], ours["microseconds"])
        names, said = ("body", "group", "prompt", "tokens"), r["settings"].get("agreement") or {}
        found.append(
            record(
                **common(r, facts, part, r["head"]) | {"device": own["device"]},
                precision={"head": "fp32"}.get(part, "int4"),
                **calibrated({"head": r["head"], "agreement": said.get("top1_agreement"), "target_agreement": said.get("target_agreement")}),
                tokens=r["settings"].get("tokens"),
                settings={n: r["settings"][n] for n in names if n in r["settings"]},
                observed={n: r["settings"][n] for n in ("equal_tokens",) if n in r["settings"]} | _power_scope(r),
                times_as_fast=fast,
                **ours,
                baseline=baseline(facts["run"], base["head"], base["backend"], base["backend_version"], **theirs),
            )
        )
    return found, _no_dense("onnx", alone, "baseline (" + ", ".join(f"{a}: {b}" for a, b in ONNX_BASELINES.items()) + ")") + _no_power("onnx", own["records"])


def _onnx_measures(of: Own) -> dict[str, Any]:
    """What `bench onnx` measures; tokens a second are of whole models and engines, a head alone makes none."""
    rounds = of.get("microseconds_rounds")
    us = times(of) if not rounds else figure(of["microseconds"], min(rounds), max(rounds), "range", len(rounds))
    ends = [None if us[end] is None else 1e6 / us[end] for end in ("high", "low")]
    return {
        "microseconds": us,
        "tokens_per_second": None if of["part"] == "head" else figure(of["tokens_per_second"], ends[0], ends[1], us["spread"], us["samples"]),
        "first_token_seconds": figure(of.get("first_token_seconds")),
        "joules_per_token": joules(of),
        **{name: of.get(name) for name in ("bytes_per_step", "peak_bytes", "top1_agreement", "top1_agreement_interval")},
    }


def evaluate_records(own: Own, facts: Own) -> tuple[list[dict[str, Any]], list[str]]:
    """`evaluate`: each head beside the dense one, all texts together and text by text; nothing is timed."""
    target = (own.get("summary") or {}).get("target_agreement")
    said = common({**own, "real_weights": True}, facts, "agreement", "") | {"precision": own.get("precision")}
    texts = [(None, own), *((str(t["text"]), t) for t in own.get("texts", ()))]
    found = []
    for text, pooled in texts:
        for i, one in enumerate((pooled, *pooled.get("rivals", ()))):
            ours = i == 0
            settings = {"head": one.get("settings") or {}, "positions": one.get("positions")} | ({} if text is None else {"text": text})
            measures = {name: one.get(name) for name in ("bytes_per_step", "bytes_per_step_p99", "top1_agreement", "top1_agreement_interval")}
            found.append(
                record(
                    **said | {"head": "FlashHead" if ours else str(one["name"]), "dense_bytes_per_step": one["dense_bytes_per_step"]},
                    settings=settings,
                    target_agreement=target if ours else None,
                    calibrated_agreement=(own.get("calibration") or {}).get("top1_agreement") if ours else None,
                    **measures,
                    baseline=baseline(
                        facts["run"], "dense", own.get("backend"), own.get("backend_version"), bytes_per_step=one["dense_bytes_per_step"], top1_agreement=1.0
                    ),
                )
            )
    return found, []


CONVERTERS: dict[str, Callable[[Own, Own], tuple[list[dict[str, Any]], list[str]]]] = {
    "head": head_records,
    "decode": decode_records,
    "vllm": vllm_records,
    "onnx": onnx_records,
    "tensorrt": tensorrt_records,
    "evaluate": evaluate_records,
}
