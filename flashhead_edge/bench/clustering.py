"""Time equal-size clustering, and compare its objective with that of ten times the iterations.

    python -m flashhead_edge.bench.clustering --shape 49152x576 --size 16 --compare
    python -m flashhead_edge.bench.clustering --model HuggingFaceTB/SmolLM2-135M-Instruct --size 16 --json

Timed: `cluster` alone, rows in memory on the device to results in numpy. Not timed: making or reading the rows.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from typing import Any

import click
import torch
from torch import Tensor

from flashhead_edge.bench.provenance import command, commit
from flashhead_edge.clustering import ITERATIONS, Clusters, cluster
from flashhead_edge.errors import FlashHeadError, SettingsError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@click.command(help="Time equal-size clustering of made rows (--shape) or of a model's head (--model).")
@click.option("--shape", default="49152x576", show_default=True, help="Rows and columns of the made rows, VxD.")
@click.option("--model", help="Cluster the head of this model (folder, .gguf file or hub name) instead of made rows.")
@click.option("--size", default=16, show_default=True, type=click.IntRange(1), help="Slots of a cluster.")
@click.option("--iterations", default=ITERATIONS, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--euclidean", is_flag=True, help="Squared distance instead of cosine.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float16", show_default=True, type=click.Choice(list(DTYPES)), help="Of the made rows.")
@click.option("--compare", is_flag=True, help="Run ten times the iterations as well and print the ratio of the objectives.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(shape: str, model: str | None, size: int, iterations: int, seed: int, euclidean: bool, device: str, dtype: str, compare: bool, as_json: bool) -> None:
    try:
        if model is None:
            rows = made_rows(*_parse(shape), DTYPES[dtype], seed)
        else:
            from flashhead_edge.checkpoint import open_source, read_head

            head = read_head(open_source(model))
            rows = head.weight[: head.vocab_size]
        rows = rows.to(device)
        record = measure(rows, size, iterations, seed, not euclidean)
        if compare:
            longer = measure(rows, size, 10 * iterations, seed, not euclidean)
            record["ten_times"] = {k: longer[k] for k in ("iterations", "seconds", "objective", "imbalance")}
            record["ratio_to_ten_times"] = record["objective"] / longer["objective"] if longer["objective"] else None
    except FlashHeadError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    record = {"model": model, "shape": [*rows.shape], "real_weights": model is not None, **record, "commit": commit(), "command": command("clustering")}
    if as_json:
        click.echo(json.dumps(record))
    else:
        for name, value in record.items():
            click.echo(f"{name:>20}  {value}")


def measure(rows: Tensor, size: int, iterations: int, seed: int, spherical: bool) -> dict[str, Any]:
    """Cluster once; times in seconds, memory in bytes, the objective, and the largest free cluster over `size`."""
    on_gpu = rows.device.type == "cuda"
    imbalance = [1.0]

    def show(iteration: int, total: int, objective: float, now: float) -> None:
        imbalance[0] = now
        click.echo(f"iteration {iteration} of {total}: objective {objective:.5f}, imbalance {now:.2f}, {time.perf_counter() - start:.1f} s", err=True)

    if on_gpu:
        torch.ones(1, device=rows.device).sum().item()  # the context and the first launch
        torch.cuda.reset_peak_memory_stats(rows.device)
    cpu = time.process_time()
    start = time.perf_counter()
    clusters: Clusters = cluster(rows, size, iterations=iterations, seed=seed, spherical=spherical, progress=show)
    seconds = time.perf_counter() - start
    return {
        "settings": {"size": size, "seed": seed, "spherical": spherical, "dtype": str(rows.dtype).removeprefix("torch.")},
        "clusters": len(clusters.token_table),
        "iterations": iterations,
        "objective": clusters.objective,
        "imbalance": imbalance[0],
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_bytes": _peak_memory(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(rows.device) if on_gpu else None,
        "backend": "torch",
        "backend_version": torch.__version__,
        "device": torch.cuda.get_device_name(rows.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }


def made_rows(n_rows: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows like a head's: a direction common to all, topics of unequal size, noise, and 1 % of identical rows; [V, d] on the CPU."""
    random = torch.Generator().manual_seed(seed)
    topics = torch.randn(max(1, n_rows // 24), d, generator=random)
    topic = (len(topics) * torch.rand(n_rows, generator=random) ** 1.5).long().clamp(max=len(topics) - 1)
    common = torch.randn(d, generator=random)
    rows = torch.empty(n_rows, d, dtype=dtype)
    for i in range(0, n_rows, 4096):
        part = topics[topic[i : i + 4096]]
        rows[i : i + 4096] = 0.8 * common + part + torch.randn(part.shape, generator=random)
    unused = torch.randperm(n_rows, generator=random)[: n_rows // 100]
    if len(unused):
        rows[unused] = rows[unused[0]].clone()
    return rows


def _parse(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise SettingsError(f"--shape is {shape!r}, expected rows and columns such as 49152x576; give two numbers of at least 1")
    return int(found[1]), int(found[2])


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
