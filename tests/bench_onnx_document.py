"""What a run of flashhead bench onnx returns, with invented figures."""

from __future__ import annotations

from typing import Any


def ratio(median: float, around: float) -> dict[str, float]:
    return {"median": median, "low": median - around, "high": median + around}


def document() -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    common = {
        "shape": [262_144, 640], "backend": "onnxruntime", "backend_version": "1.32.0", "settings": {}, "times_as_fast": {}, "wanted": {},
        "top1_agreement": None, "top1_agreement_interval": None, "command": "flashhead bench onnx",
    }  # fmt: skip
    for threads in (1, 2):
        for head, us, agreement in (("dense fp32", 13_000.0, 1.0), ("dense int4, blocks of 32", 2_000.0, 0.8335), ("FlashHead", 500.0, 0.9961)):
            r = common | {"part": "head", "model": "Gemma-3-270M", "head": head, "threads": threads, "microseconds": us / threads, "microseconds_p99": 2 * us}
            r |= {
                "bytes_per_step": 8.19e6,
                "top1_agreement": agreement,
                "top1_agreement_interval": [agreement - 0.001, agreement],
                "tokens_per_second": 1e6 / us,
            }
            if head == "FlashHead":
                r |= {"times_as_fast": {"dense fp32": ratio(26, 2), "dense int4, blocks of 32": ratio(4, 0.5)}}
                r |= {"wanted": {"dense fp32": 25, "dense int4, blocks of 32": 4.5}}
            records.append(r if threads == 1 else r | {"top1_agreement": None, "top1_agreement_interval": None})
    for head, ms in (("no head", 5.0), ("FlashHead", 6.0)):
        r = common | {"part": "models", "model": "Gemma-3-270M", "head": head, "threads": 1, "microseconds": 1e3 * ms, "tokens_per_second": 1e3 / ms}
        records.append(r | ({"settings": {"published": 1.69}} if head == "FlashHead" else {}))
    for head, rate in (("FlashHead", 130.0), ("GenAI, int8 head", 100.0)):
        r = common | {"part": "engines", "model": "SmolLM2", "head": head, "threads": 1, "microseconds": 1e6 / rate, "tokens_per_second": rate}
        r |= {"prompt_seconds": 0.25, "first_token_seconds": 1.5, "peak_bytes": 2e8, "model_bytes": 1e8, "shape": [49_152, 576]}
        r |= {"settings": {"equal_tokens": 128 if head == "FlashHead" else 3, "tokens": 128}}
        if head == "FlashHead":
            r |= {
                "times_as_fast": {"GenAI, int8 head": ratio(1.3, 0.1)},
                "prompt_times_as_fast": {"GenAI, int8 head": {"median": 0.99, "low": 0.9, "high": 1.1}},
            }
            r |= {"wanted": {"GenAI, int8 head": 1.25}}
        records.append(r)
    counts = {"mean": [1_566.7, 25_082.6, 320.9], "p90": [3_652.3, 58_451.5, 730.7]}
    return {
        "device": "AMD EPYC, 2 cores", "records": records, "skipped": ["llama.cpp is not installed: pip install llama-cpp-python"],
        "counts": [{"model": "Gemma-3-270M", "source": "drawn after a head", "clusters": 16_384, "counts": counts}],
    }  # fmt: skip
