"""Records with invented figures: what the explorer, the comparison and the files are tested on."""

from __future__ import annotations

from typing import Any

from flashhead_edge.records.form import baseline, figure, record

MODELS, DEVICES = ("Llama-3.2-1B", "Qwen3-1.7B", "Gemma-3-270M"), ("NVIDIA H100 80GB HBM3", "Jetson Orin Nano")


def made(run: str = "run-1", us: float = 25.0, dense: float = 200.0, spread: float = 0.02, **fields: Any) -> dict[str, Any]:
    """A measured record of a head's step, `dense / us` times as fast as its baseline; the ends of both lie `spread` around the median."""

    def around(value: float) -> Any:
        return figure(value, value * (1 - spread), value * (1 + spread), "range", 7)

    common: dict[str, Any] = {
        "run": run, "bench": "head", "part": "head", "model": MODELS[0], "shape": [128_256, 2_048], "real_weights": False, "precision": "bf16",
        "head": "FlashHead", "backend": "cuda", "backend_version": "13.0", "device": DEVICES[0], "batch": 1, "dense_bytes_per_step": 525_336_576,
        "microseconds": around(us), "bytes_per_step": 9_500_000, "top1_agreement": 0.9955, "top1_agreement_interval": [0.994, 0.9965],
        "times_as_fast": figure(dense / us, dense / us * (1 - spread) ** 2, dense / us * (1 + spread) ** 2, "range"),
        "baseline": baseline(run, "dense bf16", "cuda", "13.0", microseconds=around(dense), bytes_per_step=525_336_576),
        "date": "2026-11-20", "commit": "abc1234", "command": "flashhead bench head",
    }  # fmt: skip
    return record(**common | fields)


def predicted(**fields: Any) -> dict[str, Any]:
    """A prediction: no spread, and where it comes from."""
    base = baseline("rule", "dense bf16", microseconds=figure(6_440.0))
    common = {"kind": "predicted", "run": "rule", "microseconds": figure(136.0), "times_as_fast": figure(47.4), "baseline": base, "source": "a rule"}
    return made(**common | {"top1_agreement": None, "top1_agreement_interval": None} | fields)


def many(count: int) -> list[dict[str, Any]]:
    """Records that differ in everything that can be filtered, a prediction every seventeenth."""
    found = []
    for i in range(count):
        fields: dict[str, Any] = {
            "model": MODELS[i % 3], "device": DEVICES[i // 3 % 2], "batch": (1, 4, 16)[i // 6 % 3], "precision": ("bf16", "w4a16")[i // 18 % 2],
            "backend": ("cuda", "tensorrt", "vllm")[i // 2 % 3], "head": ("FlashHead", "published", "dense int8")[i // 5 % 3], "settings": {"number": i},
            "real_weights": i % 2 == 0, "bytes_per_step": 4_000_000 + 90_000 * (i % 97), "command": f"flashhead bench head --number {i}",
        }  # fmt: skip
        if i % 17 == 16:
            found.append(predicted(**fields))
        else:
            agreement = 1 - 0.05 / (1 + i % 41)
            fields |= {"top1_agreement": agreement, "top1_agreement_interval": [agreement - 0.001, min(1.0, agreement + 0.001)]}
            found.append(made(f"run-{i // 8}", us=20.0 + i * 7 % 113, dense=180.0 + i * 13 % 211, **fields))
    return found
