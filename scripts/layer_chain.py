"""A decoder's body in W4A16 by launches of one step each and by five fused launches a layer: equal bits, and times side by side.

    python scripts/layer_chain.py [--models NAME ...] [--quick] [--no-checks] [--no-times] [--json figures.json]

Made weights of five models' shapes, distinct for each layer and together more than three times the L2 cache, 512 cached positions, CUDA graphs of whole
bodies. A check that fails is said at the end, with exit status 1; times are taken all the same. Needs a GPU of capability 9.0 or newer for the overlap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.bench.timing import copy_bandwidth, timed
from flashhead_edge.errors import FlashHeadError
from flashhead_edge.kernels import build, layers
from flashhead_edge.kernels.layers import Facts, attention_plan, facts_of

CACHED, MAX_LENGTH = 512, 4096
PHASES = ("qkv", "attention", "o", "gate_up", "down")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    name: str
    d: int
    layers: int
    q_heads: int
    kv_heads: int
    head_size: int
    f: int
    group: int
    head_norms: bool = False  # of queries and keys
    gemma: bool = False  # norms behind attention and MLP, 1 + weight, gelu
    window: int = 0  # of five layers in six

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) in order of use."""
        return {
            "qkv": ((self.q_heads + 2 * self.kv_heads) * self.head_size, self.d),
            "o": (self.d, self.q_heads * self.head_size),
            "gate_up": (2 * self.f, self.d),
            "down": (self.d, self.f),
        }


SHAPES = (
    Shape("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128),
    Shape("Qwen3-1.7B", 2048, 28, 16, 8, 128, 6144, 128, head_norms=True),
    Shape("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 128, head_norms=True),
    Shape("Gemma-3-270M", 640, 18, 4, 1, 256, 2048, 128, head_norms=True, gemma=True, window=512),
    Shape("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 64),
)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int


@dataclass(frozen=True, eq=False)
class Layer:
    matrices: dict[str, Matrix]
    norms: dict[str, Tensor | None]
    cache_k: Tensor
    cache_v: Tensor
    window: int
    plan: list[int]


@dataclass(frozen=True, eq=False)
class Body:
    """A model without embedding and head, and the state of its rows."""

    shape: Shape
    facts: Facts
    stack: list[Layer]
    weights: Tensor  # all matrices, in order of use
    final: Tensor
    x: Tensor
    lengths: Tensor
    rotations: Tensor
    workspace: Tensor
    batch: int
    queries: int

    @property
    def offset(self) -> float:
        return float(self.shape.gemma)

    @property
    def activation(self) -> str:
        return "gelu_tanh" if self.shape.gemma else "silu"


def made_body(shape: Shape, dtype: torch.dtype, batch: int, queries: int, asymmetric: bool, facts: Facts, seed: int, max_length: int = MAX_LENGTH) -> Body:
    """Random weights that keep activations near 1."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda", generator=g) * scale).to(dtype)

    group, at, places = shape.group, 0, []
    for _ in range(shape.layers):
        for name, (n, k) in shape.matrices().items():
            parts = []
            for size in (n * k // 2, n * k // group * 2, n * k // group if asymmetric else 0):
                parts.append((at, size))
                at += -(-size // 256) * 256
            places.append((name, n, k, parts))
    weights = torch.randint(0, 256, (at,), dtype=torch.uint8, device="cuda", generator=g)
    stack: list[Layer] = []
    q, kv, size = shape.q_heads, shape.kv_heads, shape.head_size
    workspace = 16
    for i in range(shape.layers):
        matrices = {}
        for name, n, k, parts in places[4 * i : 4 * i + 4]:
            codes, scales, zeros = (weights[a : a + s] for a, s in parts)
            scales = scales.view(dtype).view(n // 16, k // group, 16)
            small = (0.2 if name in ("o", "down") else 1) / (4.6 * math.sqrt(k))
            scales.copy_((torch.rand(scales.shape, device="cuda", generator=g) + 0.5) * small)
            zero = (zeros.copy_(zeros % 16)).view(n // 16, k // group, 16) if asymmetric else None
            matrices[name] = Matrix(codes.view(n // 16, k // 64, 512), scales, zero, group)
        gains = {"first": shape.d, "second": shape.d}
        gains |= {"q": size, "k": size} if shape.head_norms else {}
        gains |= {"behind_attention": shape.d, "behind_mlp": shape.d} if shape.gemma else {}
        norms: dict[str, Tensor | None] = {name: normal(n, scale=0.1) + (not shape.gemma) for name, n in gains.items()}
        window = shape.window if i % 6 != 5 else 0
        plan = attention_plan(batch, queries, q, kv, size, max_length, window, facts)
        workspace = max(workspace, plan.workspace_bytes)
        keys, values = (normal(batch, kv, max_length, size) for _ in range(2))
        stack.append(Layer(matrices, norms, keys, values, window, plan.words()))
    angle = torch.arange(max_length, device="cuda")[:, None] * 10000.0 ** (-torch.arange(size // 2, device="cuda") / (size // 2))
    lengths = torch.tensor([CACHED + queries - 3 * i for i in range(batch)], dtype=torch.int32, device="cuda")
    return Body(
        shape, facts, stack, weights, normal(shape.d, scale=0.1) + (not shape.gemma), normal(batch * queries, shape.d), lengths,
        torch.stack([angle.cos(), angle.sin()], 2).float().contiguous(), torch.zeros(workspace, dtype=torch.uint8, device="cuda"), batch, queries,
    )  # fmt: skip


def unfused(body: Body, overlap: bool, only: Sequence[str] = PHASES) -> tuple[Tensor, Tensor]:
    """A launch a step: nine a layer, eleven with norms behind; returns what the head reads, and the residual sum. only: phases that are launched."""
    s, f = body.shape, body.facts
    norm = partial(layers.rms_norm, architecture=f.architecture, overlap=overlap)
    x, residual, offset = body.x, body.x.clone(), body.offset
    rows = len(x)
    qkv, attended, inner = (x.new_zeros(rows, n) for n in (s.matrices()["qkv"][0], s.matrices()["o"][1], s.f))

    def product(layer: Layer, name: str, x: Tensor) -> Tensor:
        m = layer.matrices[name]
        return layers.w4a16_linear(x, m.codes, m.scales, m.zeros, m.group, f.architecture, f.multiprocessors, overlap)

    behind = None  # the norm behind the MLP before
    for i, layer in enumerate(body.stack):
        if "qkv" in only:
            if behind is not None:
                x = norm(x, None, behind, offset, 1e-6)
            qkv = product(layer, "qkv", norm(x, residual if i else None, layer.norms["first"], offset, 1e-6))
        if "attention" in only:
            q = layers.attention_rope_write(
                qkv.view(body.batch, body.queries, -1, s.head_size), body.rotations, layer.norms.get("q"), layer.norms.get("k"), offset, 1e-6,
                body.lengths, layer.cache_k, layer.cache_v, f.architecture, overlap,
            )  # fmt: skip
            attended = layers.attention_decode(
                q, layer.cache_k, layer.cache_v, body.lengths, body.workspace, layer.plan, layer.window, s.head_size**-0.5, f.architecture, overlap
            ).view(rows, -1)
        if "o" in only:
            x = product(layer, "o", attended)
        if "gate_up" in only:
            if s.gemma:
                x = norm(x, None, layer.norms["behind_attention"], offset, 1e-6)
            both = product(layer, "gate_up", norm(x, residual, layer.norms["second"], offset, 1e-6))
            inner = layers.gated_product(both, body.activation, f.architecture, overlap)
        if "down" in only:
            x = product(layer, "down", inner)
        behind = layer.norms.get("behind_mlp")
    if behind is not None:
        x = norm(x, None, behind, offset, 1e-6)
    return norm(x, residual, body.final, offset, 1e-6), residual


def fused(body: Body, overlap: bool, only: Sequence[str] = PHASES) -> tuple[Tensor, Tensor]:
    """As `unfused`, in five launches a layer."""
    s, f = body.shape, body.facts
    x, residual, offset = body.x, body.x, body.offset
    rows = len(x)
    qkv, attended, inner = (x.new_zeros(rows, n) for n in (s.matrices()["qkv"][0], s.matrices()["o"][1], s.f))

    def product(
        i: int, name: str, x: Tensor, first: Tensor | None = None, norm: Tensor | None = None, add: Tensor | None = None, activation: str = ""
    ) -> tuple[Tensor, Tensor]:
        m, total = body.stack[i].matrices[name], None if add is None else torch.empty_like(add)
        y = layers.w4a16_fused(
            x, m.codes, m.scales, m.zeros, m.group, add, total, first, norm, offset, 1e-6, activation, f.architecture, f.multiprocessors, overlap
        )
        return y, x if total is None else total

    behind = None
    for i, layer in enumerate(body.stack):
        if "qkv" in only:
            qkv, residual = product(i, "qkv", x, behind, layer.norms["first"], residual if i else None)
        if "attention" in only:
            attended = layers.attention_rope_decode(
                qkv.view(body.batch, body.queries, -1, s.head_size), body.rotations, layer.norms.get("q"), layer.norms.get("k"), offset, 1e-6,
                body.lengths, layer.cache_k, layer.cache_v, body.workspace, layer.plan, layer.window, s.head_size**-0.5, f.architecture, overlap,
            ).view(rows, -1)  # fmt: skip
        if "o" in only:
            x, _ = product(i, "o", attended)
        if "gate_up" in only:
            inner, residual = product(i, "gate_up", x, layer.norms.get("behind_attention"), layer.norms["second"], residual, body.activation)
        if "down" in only:
            x, _ = product(i, "down", inner)
        behind = layer.norms.get("behind_mlp")
    if behind is not None:
        x = layers.rms_norm(x, None, behind, offset, 1e-6, f.architecture, overlap)
    residual = residual.clone()
    return layers.rms_norm(x, residual, body.final, offset, 1e-6, f.architecture, overlap), residual


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def check_body(body: Body, overlap: bool) -> str:
    """What differs between the fused and the unfused chain, or nothing."""
    places = [(layer.cache_k, layer.cache_v) for layer in body.stack]
    kept = [(k.clone(), v.clone()) for k, v in places]
    want = [t.clone() for t in unfused(body, False)]
    written = [(k.clone(), v.clone()) for k, v in places]
    for (k, v), (old_k, old_v) in zip(places, kept):
        k.copy_(old_k)
        v.copy_(old_v)
    found = [t.clone() for t in fused(body, overlap)]
    again = fused(body, overlap)
    torch.cuda.synchronize()
    wrong = []
    if not all(torch.isfinite(t).all() for t in want):
        wrong.append("the unfused chain is not finite")
    for name, a, b in (("output", want[0], found[0]), ("residual", want[1], found[1]), ("output again", found[0], again[0])):
        if not torch.equal(bits(a), bits(b)):
            wrong.append(f"{name} in {(bits(a) != bits(b)).sum().item()} of {a.numel()}")
    for i, ((k, v), (want_k, want_v)) in enumerate(zip(places, written)):
        wrong += [f"{name} of layer {i}" for name, a, b in (("keys", k, want_k), ("values", v, want_v)) if not torch.equal(bits(a), bits(b))]
    return ", ".join(wrong)


def check_cases(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, torch.dtype, int, int, bool]]:
    """Shapes of few layers by type, batch, new tokens, zero points, groups."""
    for shape, dtype, group, asymmetric in itertools.product(shapes, (torch.bfloat16, torch.float16), (128, 64, 32), (False, True)):
        if any(k % group for _, k in shape.matrices().values()):
            continue
        few = replace(shape, layers=2, group=group, window=64 if shape.window else 0)
        for batch, queries in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (2, 3)):
            yield few, dtype, batch, queries, asymmetric


def quick_cases(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, torch.dtype, int, int, bool]]:
    for shape, (batch, queries, asymmetric) in itertools.product(shapes, ((1, 1, False), (1, 1, True), (4, 1, False), (1, 4, False))):
        yield replace(shape, layers=3, window=64 if shape.window else 0), torch.bfloat16, batch, queries, asymmetric


def check_all(cases: Iterator[tuple[Shape, torch.dtype, int, int, bool]]) -> list[str]:
    wrong, count, facts = [], 0, facts_of(torch.device("cuda", 0))
    for shape, dtype, batch, queries, asymmetric in cases:
        name = f"{shape.name} {str(dtype)[6:]} groups of {shape.group} {'asymmetric' if asymmetric else 'symmetric'} batch {batch} queries {queries}"
        count += 1
        try:
            body = made_body(shape, dtype, batch, queries, asymmetric, facts, seed=count, max_length=1024)
            found = check_body(body, overlap=count % 4 != 0)
        except (FlashHeadError, RuntimeError) as error:  # one failure does not end the run
            found = f"{type(error).__name__}: {error}"
        if found:
            wrong.append(f"{name}: {found}")
            print(f"WRONG {wrong[-1]}", flush=True)
    print(f"checks: {count - len(wrong)} of {count} chains have equal bits", flush=True)
    return wrong


def spread(times: np.ndarray) -> str:
    low, mid, high = np.percentile(times, [5, 50, 95])
    return f"{mid:8.1f} ({low:.1f} to {high:.1f})"


def time_shape(shape: Shape, dtype: torch.dtype, figures: list[dict[str, Any]], bandwidth: float, quick: bool, phases: bool) -> None:
    facts = facts_of(torch.device("cuda", 0))
    cold = 3 * torch.cuda.get_device_properties(0).L2_cache_size
    one = made_body(shape, dtype, 1, 1, False, facts, 0)
    bodies = [one, *(made_body(shape, dtype, 1, 1, False, facts, i) for i in range(1, math.ceil(cold / one.weights.numel())))]
    cached = shape.layers * 4 * shape.kv_heads * shape.head_size * CACHED
    moved = one.weights.numel() + cached
    layer = one.weights.numel() / shape.layers
    print(f"\n{shape.name} {str(dtype)[6:]}: {moved / 1e6:.1f} MB a step, floor {moved / bandwidth * 1e6:.1f} us, {layer / 1e6:.2f} MB a layer", flush=True)

    def measure(name: str, chain: Callable[..., Any], overlap: bool, used: list[Body], only: Sequence[str] = PHASES) -> float:
        try:
            times = timed([partial(chain, b, overlap, only) for b in used], 40)
        except (FlashHeadError, RuntimeError) as error:  # as above
            print(f"  {name:44s} FAILED {type(error).__name__}: {error}", flush=True)
            return math.nan
        middle = float(np.median(times))
        figures.append({"model": shape.name, "variant": name, "us": middle, "p5": float(np.percentile(times, 5)), "p95": float(np.percentile(times, 95))})
        print(f"  {name:44s} {spread(times)}  {middle / shape.layers:6.2f} a layer", flush=True)
        return middle

    measure("unfused, overlap", unfused, True, bodies)
    if not quick:
        measure("unfused", unfused, False, bodies)
        measure("fused", fused, False, bodies)
    measure("fused, overlap", fused, True, bodies)
    if quick:
        return
    short = [made_body(shape, dtype, 1, 1, False, facts, i, max_length=1024) for i in range(len(bodies))]
    measure("fused, overlap, cache of 1,024", fused, True, short)
    del short
    if phases:
        for phase in PHASES:
            for name, chain in (("unfused", unfused), ("fused", fused)):
                measure(f"  {name}, overlap, all but {phase}", chain, True, bodies, [p for p in PHASES if p != phase])
                measure(f"  {name}, overlap, {phase} alone", chain, True, bodies, [phase])


def compile_all(shapes: Sequence[Shape], quick: bool) -> None:
    """All instances, side by side on the host's cores."""
    architecture = facts_of(torch.device("cuda", 0)).architecture
    jobs = set()
    groups = {s.group for s in shapes} if quick else {32, 64, 128}
    for e in ("fh::Bf16",) if quick else ("fh::Bf16", "fh::Fp16"):
        jobs |= {("elementwise.cu", f"fh::rms_norm<{e}>"), ("attention.cu", f"fh::attention_rope_write<{e}>")}
        jobs |= {("elementwise.cu", f"fh::gated_product<{e}, {flag}>") for flag in ("true", "false")}
        for group, zeros in itertools.product(groups, ("true", "false")):
            jobs |= {("w4a16.cu", f"fh::w4a16_decode<{e}, {group}, {zeros}, {pairs}>") for pairs in (1, 2)}
            forms = ("false, false, false", "true, false, false", "true, true, false", "true, true, true")
            jobs |= {("w4a16_fused.cu", f"fh::w4a16_fused<{e}, {group}, {zeros}, {form}, {pairs}>") for form in forms for pairs in (1, 2)}
        for size, cluster, kind in itertools.product({s.head_size for s in shapes}, ("true", "false"), ("", "rope_")):
            jobs.add(("attention.cu", f"fh::attention_{kind}decode<{e}, {size}, {cluster}>"))
    begun = time.perf_counter()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(build.instantiated, source, expression, architecture) for source, expression in sorted(jobs)]:
            job.result()
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few checks and times: half a minute")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = [s for s in SHAPES if s.name in options.models]
    compile_all(shapes, options.quick)
    wrong = [] if options.no_checks else check_all((quick_cases if options.quick else check_cases)(shapes))
    figures: list[dict[str, Any]] = []
    if not options.no_times:
        bandwidth = copy_bandwidth()
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
        for shape in shapes:
            time_shape(shape, torch.bfloat16, figures, bandwidth, options.quick, phases=not options.quick and shape.name in ("Llama-3.2-1B", "SmolLM2-135M"))
    if options.json:
        options.json.write_text(json.dumps({"wrong": wrong, "figures": figures}, indent=1))
    print("\n".join([f"\n{len(wrong)} chains differ", *wrong[:20]]) if wrong else "\nall chains equal", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
