"""What `flashhead bench vllm` measured: a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_serving(document: Mapping[str, Any], console: Console) -> None:
    """One row a head, batch, runner and model: GPU time of a decode step and its parts, host time of the head, tokens a second."""
    table = Table(title="a decode step in vLLM, microseconds", title_justify="left")
    for name in ("model", "runner", "batch", "head", "GPU, step", "head", "sampler", "host, head", "tokens a second (lowest to highest)"):
        table.add_column(name, justify="left" if name in ("model", "runner") else "right")
    for r in document["records"]:
        gpu, (low, high) = r["gpu_microseconds"], r["tokens_per_second_spread"]
        times = [f"{t:,.1f}" for t in (gpu["total"], gpu["head"], gpu["sampler"], r["host_microseconds"]["head"])]
        rate = f"{r['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
        table.add_row(r["model"], r["settings"]["runner"], str(r["batch"]), r["head"], *times, rate)
    console.print(table)
