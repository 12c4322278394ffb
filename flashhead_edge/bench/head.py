"""Time one step of the output head on a GPU: dense bf16, the published method at 256 probes, and the fitted head.

    python -m flashhead_edge.bench.head
    python -m flashhead_edge.bench.head --shape Llama-3.2-1B --batch 1 --batch 4 --json

Timed: steps one after the other in a CUDA graph, over copies of the head that together pass the L2 cache more than
twice, so every step reads from memory; the gap between two launches is in the figure. Checked first: each step against
the reference in float64. Not timed: making the index, Python's launch outside a graph. The heads are made, since random
codes cost what real ones cost; how many clusters open and how many rows each code scores are the means of SmolLM2-135M's
evaluation by share of the vocabulary, printed, and once more with every cap full ("at the cap").
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from flashhead_edge.bench.provenance import command, commit
from flashhead_edge.caps import with_gates
from flashhead_edge.cases import CAP_SHARES, PUBLISHED_CLUSTER_SIZE, PUBLISHED_PROBES, SHAPES, Case, made_index
from flashhead_edge.costs import bytes_per_step, dense_bytes
from flashhead_edge.errors import DeviceError, FlashHeadError
from flashhead_edge.index import HeadIndex
from flashhead_edge.kernels.head import CudaHead, cuda_head
from flashhead_edge.reference import coordinates, probe, run_stages, state_unit, torch_head

REPLAYS = 200
CHECKED = 8  # states of each head that are compared with the reference before it is timed
MOST_COPIES = 64


def with_shares(index: HeadIndex, weight: Tensor, states: Tensor, shares: Sequence[float], caps: Sequence[int] | None = None) -> HeadIndex:
    """The index with margins such that `states` open and keep these shares of the vocabulary on the average, before any cap.

    Args:
        shares: one a gate; 0 is a margin of 0, infinity an infinite one.
        caps: set afterwards, one a gate; None keeps those of the index.
    """
    gates = [index.probe, *(s.gate for s in index.stages)]
    open_caps, margins = [len(g.error) for g in gates], [0.0] * len(gates)
    for i, share in enumerate(shares):
        if not 0 < share < math.inf:
            margins[i] = share
            continue
        trial = [*margins[:i], math.inf, *[0.0] * (len(gates) - i - 1)]
        head = torch_head(with_gates(index, trial, open_caps), weight)
        if i == 0:
            z = coordinates(head, states)
            scores = probe(head, z)
            gap = (scores.amax(1, keepdim=True) - scores) / (head.probe.error * state_unit(head, z))
            wanted = share * index.vocab_size / index.cluster_size
        else:
            gap = _stage_gaps(index, margins, open_caps, weight, states, i)
            wanted = share * index.vocab_size
        total = gap.flatten()
        total = total[total.isfinite()].sort().values
        margins[i] = float(total[min(len(total) - 1, max(0, round(wanted * len(states)) - 1))]) * (1 + 1e-6)
    return with_gates(index, margins, list(caps) if caps is not None else [g.cap for g in gates])


def _stage_gaps(index: HeadIndex, margins: Sequence[float], caps: Sequence[int], weight: Tensor, states: Tensor, i: int) -> Tensor:
    """Gaps in own errors of the slots that code `i` (from 1) scores, one state after the other."""
    first = dataclasses.replace(with_gates(index, margins, caps), stages=index.stages[:i])
    first = with_gates(first, [*margins[:i], math.inf], caps[: i + 1])
    head = torch_head(first, weight)
    trail = run_stages(head, states)
    row, slot, score = trail.row[trail.exact], trail.slot[trail.exact], trail.score[trail.exact]
    best = score.new_full((len(states),), -math.inf).scatter_reduce(0, row, score, "amax")
    unit = state_unit(head, coordinates(head, states))[:, 0]
    return (best[row] - score) / (head.stages[-1][1].error[slot] * unit[row])


def check_head(head: CudaHead, states: Tensor) -> np.ndarray:
    """Counts of steps [N, 2 + stages], after each was compared with the reference.

    Raises:
        DeviceError: a token, a count or a set of candidates is not the reference's.
    """
    want, found = torch_head(head.index, head.weight, head.bias).step(states), head.step(states)
    wrong = int((want.token != found.token).sum())
    if wrong:
        raise DeviceError(f"head_step: {wrong} of {len(states)} tokens are not the reference's, expected none; do not use this kernel")
    # an item within rounding of a margin may fall on the other side
    off = float(((want.counts - found.counts).abs() / want.counts.clamp(min=100)).max())
    if off > 0.02:
        raise DeviceError(f"head_step: counts differ from the reference's by {off:.1%}, expected rounding at margins alone; do not use this kernel")
    return found.counts.cpu().numpy()


def timed(steps: Sequence[Callable[[], object]], replays: int = REPLAYS) -> np.ndarray:
    """Microseconds of a step, one figure a replay of the graph that holds all `steps` once."""
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return np.array([1e3 * a.elapsed_time(b) / len(steps) for a, b in zip(marks, marks[1:])])


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (float(np.median(timed([lambda: target.copy_(source)], 20))) * 1e-6)


def copies_of(bytes_read: float) -> int:
    """Copies of a head that together pass the L2 cache more than twice."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, max(2, math.ceil(2.2 * size / bytes_read)))


def twin(head: CudaHead) -> CudaHead:
    """The same head in other memory: its own image, the same matrix."""
    return dataclasses.replace(head, image=head.image.clone(), plans={})


def fitted_steps(head: CudaHead, states: Tensor, batch: int, bytes_read: float) -> list[Callable[[], object]]:
    """One step for each copy of a head, each on its own states."""
    heads = [twin(head) for _ in range(copies_of(bytes_read * batch))]
    parts = [states[(i * batch + torch.arange(batch)) % len(states)].contiguous() for i in range(len(heads))]
    for h, part in zip(heads, parts):
        h.launch(part)  # makes the plan and its workspace, which a capture may not
    return [lambda h=h, part=part: h.launch(part) for h, part in zip(heads, parts)]  # type: ignore[misc]


def measure_shape(name: str, batches: Sequence[int], bandwidth: float, seed: int = 0) -> list[dict[str, Any]]:
    """Records of all heads at one shape."""
    v, d = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.05
    states = torch.randn(max(64, max(batches) * 4), d, device="cuda", dtype=torch.bfloat16, generator=generator)
    out: list[dict[str, Any]] = []

    def record(head: str, batch: int, times: np.ndarray, bytes_read: float, counts: Sequence[float] | None, settings: dict[str, Any]) -> None:
        median, floor = float(np.median(times)), bytes_read / bandwidth * 1e6
        dense = next((r["microseconds"] for r in out if r["head"] == "dense bf16" and r["batch"] == batch), median)
        out.append(
            {
                **{"model": name, "shape": [v, d], "real_weights": False, "batch": batch, "context": None, "head": head, "settings": settings},
                **{"backend": "cuda", "backend_version": torch.version.cuda, "device": torch.cuda.get_device_name(), "threads": None},
                **{"microseconds": median, "microseconds_p99": float(np.percentile(times, 99)), "tokens_per_second": batch / median * 1e6},
                **{"bytes_per_step": bytes_read, "bytes_per_step_p99": None, "dense_bytes_per_step": dense_bytes(v, d), "floor_microseconds": floor},
                **{"top1_agreement": None, "top1_agreement_interval": None, "ratio_to_dense": median / dense},
                **{
                    "spread": float(np.median(np.abs(times - median))),
                    "bandwidth": bandwidth,
                    "counts": counts,
                    "commit": commit(),
                    "command": command("head"),
                },
            }
        )
        click.echo(row_text(out[-1]), err=True)

    for batch in batches:
        parts = [states[i * batch : (i + 1) * batch] for i in range(4)]
        steps = [lambda h=h: (h @ weight.T).argmax(1) for h in parts]
        record("dense bf16", batch, timed(steps, 50), dense_bytes(v, d), None, {})
    case = Case(name, v, d)
    made, shares = made_index(case, seed), list(case.shares)
    mean = with_shares(made, weight, states[:16], shares)
    caps = [mean.probe.cap, *(s.gate.cap for s in mean.stages)]
    full = with_shares(made, weight, states[:16], [min(1.2 * s, 0.99) for s in CAP_SHARES], caps)
    published = made_index(Case(name, v, d, PUBLISHED_CLUSTER_SIZE, (), "float16", (math.inf,), (1.0,), always=0, state_power=0.0), seed)
    published = with_gates(published, [math.inf], [PUBLISHED_PROBES])
    for label, index in (("published", published), ("fitted", mean), ("fitted, at the cap", full)):
        head = cuda_head(index, weight)
        counts = check_head(head, states[:CHECKED]).mean(0) if label != "fitted" else check_head(head, states[:16]).mean(0)
        one = float(bytes_per_step(index, np.round(counts)[None].astype(np.int64), 2 * d)[0])
        fixed = float(bytes_per_step(index, np.zeros((1, len(counts)), np.int64), 2 * d)[0])
        for batch in batches:
            read = fixed + batch * (one - fixed)
            record(label, batch, timed(fitted_steps(head, states, batch, one)), read, [round(float(c), 1) for c in counts], {"copies": copies_of(one * batch)})
        del head
        torch.cuda.empty_cache()
    return out


def row_text(r: dict[str, Any]) -> str:
    counts = "" if r["counts"] is None else "  " + " ".join(f"{c:g}" for c in r["counts"])
    us, floor = r["microseconds"], r["floor_microseconds"]
    return (
        f"{r['model']:13} {r['head']:19} N {r['batch']:>2} {r['bytes_per_step'] / 1e6:8.2f} MB {floor:7.2f} floor {us:7.2f} us "
        f"(p99 {r['microseconds_p99']:.2f}) {us / floor:6.2f}x floor {1 / r['ratio_to_dense']:6.2f}x dense{counts}"
    )


@click.command(help="Time one step of the output head: dense, the published method, and the fitted head, on made heads.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="One model's shape; repeat for more. All by default.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 32), help="Rows of a step; 1, 4, 16 and 32 by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(shapes: tuple[str, ...], batches: tuple[int, ...], as_json: bool) -> None:
    try:
        if not torch.cuda.is_available():
            raise DeviceError("bench head: no NVIDIA GPU was found, expected one; run it on a machine with a GPU")
        bandwidth = copy_bandwidth()
        click.echo(f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s", err=True)
        records = [r for name in shapes or SHAPES for r in measure_shape(name, batches or (1, 4, 16, 32), bandwidth)]
    except FlashHeadError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(json.dumps(records) if as_json else "\n".join(row_text(r) for r in records))


if __name__ == "__main__":
    main()
