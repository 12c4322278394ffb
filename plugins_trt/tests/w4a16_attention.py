"""Checks the W4A16, attention and elementwise kernels against float64, and with --time times them.

Needs an NVIDIA GPU of capability 9.0, torch, and an installed flashhead_edge.

python plugins_trt/tests/w4a16_attention.py --build build/w4a16     # nvcc, once; --arch compute_87 builds and checks the code of an Orin
python plugins_trt/tests/w4a16_attention.py --library build/w4a16/libkernels.so [--arch compute_87] [--time] [--json figures.json]
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_edge.kernels.build import capability_of

HERE = Path(__file__).resolve().parent
SOURCES = [*(HERE.parent / "kernels" / f"{name}.cu" for name in ("w4a16", "attention", "elementwise")), HERE / "empty.cu"]
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative error of one rounding to nearest
FP32 = 2.0**-23  # of one float32 addition; tensor cores truncate, so a whole unit in the last place


class Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("capability", "multiprocessors", "shared_bytes", "overlap")]


class Weight(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")] + [(name, ctypes.c_int) for name in ("N", "K", "group_size", "dtype")]


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("batch", "queries", "q_heads", "kv_heads", "head_size", "max_length", "window")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("splits", "cluster", "rows", "row_blocks", "threads")),
        ("workspace_bytes", ctypes.c_size_t),
        ("items", ctypes.c_int),
    ]


class Kernels:
    """The C launchers, on torch's current stream; a launcher's sentence becomes a RuntimeError."""

    def __init__(self, library: Path, device: Device):
        self.c, self.device = ctypes.CDLL(str(library.resolve())), device

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self.c, name)
        function.restype = ctypes.c_char_p
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_void_p(None) if a is None else a for a in arguments]
        if name != "fh_attention_make_plan":
            values += [ctypes.byref(self.device), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)]
        if error := function(*values):
            raise RuntimeError(error.decode())

    def on(self, **facts: int) -> Kernels:
        """The same kernels with other facts of the device, for another board's plan."""
        other = Kernels.__new__(Kernels)
        other.c = self.c
        other.device = Device(**({name: getattr(self.device, name) for name, _ in Device._fields_} | facts))
        return other


def build(folder: Path, arch: str) -> None:
    """Compiles the launchers and kernels into folder/libkernels.so; a virtual architecture's code is assembled for capability 9.0."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "sm_90a" if arch.startswith("compute") else arch
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-gencode", f"arch={arch.replace('sm', 'compute')},code={code}"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(["nvcc", *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    subprocess.run(["nvcc", "-shared", *flags, *objects, "-o", str(folder / "libkernels.so")], check=True)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[], None]]:
    """A poisoned tensor inside a larger one, and a check that a kernel wrote all of it and nothing else."""
    count, margin = math.prod(shape), 512
    whole = torch.full((count + 2 * margin,), float("nan"), dtype=dtype, device="cuda")
    whole[:margin] = whole[-margin:] = 7.0

    def check() -> None:
        assert bool((whole[:margin] == 7).all() and (whole[-margin:] == 7).all()), "written outside the output"
        assert not bool(whole[margin:-margin].isnan().any()), "an element was not written, or is not a number"

    return whole[margin:-margin].view(shape), check


# --- W4A16 ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """A random quantised matrix: neutral arrays, packed arrays, and its float64 value."""

    c: Weight
    value: Tensor
    neutral: tuple[Tensor, Tensor, Tensor | None]
    packed: tuple[Tensor, Tensor, Tensor | None]


def random_matrix(k: Kernels, N: int, K: int, group: int, asymmetric: bool, dtype: torch.dtype, value: bool = True) -> Matrix:
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(N, K // group, device="cuda") * 0.02 + 0.001).to(dtype)
    zeros = torch.randint(0, 256, (N, K // group), dtype=torch.uint8, device="cuda") if asymmetric else None
    packed = (torch.empty_like(codes), torch.empty_like(scales), None if zeros is None else torch.empty_like(zeros))
    c = Weight(*(None if p is None else p.data_ptr() for p in packed), N, K, group, DTYPES[dtype])
    k("fh_w4a16_repack", codes, scales, zeros, ctypes.byref(c))
    w = torch.empty(0)
    if value:
        q = torch.stack([codes & 15, codes >> 4], dim=-1).view(N, K // group, group).double()
        w = ((q - (8.0 if zeros is None else ((zeros % 16).double() + (zeros // 16).double() / 16)[..., None])) * scales.double()[..., None]).view(N, K)
    return Matrix(c, w, (codes, scales, zeros), packed)


def check_repack(k: Kernels) -> None:
    """Every code, scale and zero point lies where w4a16.h says."""
    N, K, group = 48, 192, 32
    m = random_matrix(k, N, K, group, True, torch.float16)
    codes = torch.stack([m.neutral[0] & 15, m.neutral[0] >> 4], dim=-1).view(N, K)
    words = m.packed[0].view(torch.int32).view(N // 16, K // 64, 8, 4, 2, 2)  # tile, chunk, g, t, half, odd row
    n, j = torch.arange(N, device="cuda")[:, None], torch.arange(K, device="cuda")[None]
    word = words[n // 16, j // 64, n % 16 // 2, j % 32 // 8, j % 64 // 32, n % 2]
    nibble = j % 8 // 2 + j % 2 * 4
    assert bool(((word >> (4 * nibble)) & 15 == codes).all())
    for neutral, packed in zip(m.neutral[1:], m.packed[1:]):
        assert neutral is not None and packed is not None
        assert bool((packed.view(N // 16, K // group, 16).transpose(1, 2).reshape(N, K // group) == neutral).all())


def check_linear(k: Kernels) -> float:
    """Against float64; returns the largest error found, as a share of the bound.

    The bound: one rounding of the result, K float32 additions, and for prefill one rounding of each weight.
    """
    worst = 0.0
    decode_shapes = [(16, 64), (48, 128), (320, 640), (2048, 8192), (3072, 2048), (1152, 6912), (16384, 2048), (64, 14336), (2048, 6144)]
    prefill_shapes = [(16, 64), (144, 640), (2048, 2048), (512, 8192), (6144, 1152)]
    for dtype, group, asymmetric in itertools.product(DTYPES, (32, 64, 128), (False, True)):
        cases = [(s, (1, 2, 3, 5, 8)) for s in decode_shapes] + [(s, (9, 64, 130, 512)) for s in prefill_shapes]
        for (N, K), rows in cases:
            if K % group:
                continue
            m = random_matrix(k, N, K, group, asymmetric, dtype)
            for M in rows:
                x = torch.randn(M, K, device="cuda").to(dtype)
                y, written = guarded(M, N, dtype=dtype)
                k("fh_w4a16_linear", ctypes.byref(m.c), x, y, M)
                written()
                want, size = x.double() @ m.value.T, x.double().abs() @ m.value.abs().T
                bound = UNIT[dtype] * want.abs() + (K * FP32 + (UNIT[dtype] if M > 8 else 0)) * size
                share = float(((y.double() - want).abs() / bound).max())
                assert share <= 1, f"linear {N} x {K}, group {group}, {dtype}, zeros {asymmetric}, M {M}: {share:.2f} of the bound"
                worst = max(worst, share)
                for board in ({"multiprocessors": 8}, {"multiprocessors": 16, "overlap": 0}):
                    again, _ = guarded(M, N, dtype=dtype)
                    k.on(**board)("fh_w4a16_linear", ctypes.byref(m.c), x, again, M)
                    same = torch.equal(again, y) if M <= 8 else bool(((again.double() - want).abs() <= bound).all())
                    assert same, f"linear {N} x {K}, M {M}: the plan for {board} changes the result"
                if M == 8:
                    alone, _ = guarded(1, N, dtype=dtype)
                    k("fh_w4a16_linear", ctypes.byref(m.c), x[5:6].contiguous(), alone, 1)
                    assert torch.equal(alone[0], y[5]), f"linear {N} x {K}: a row's neighbours change its bits"
    return worst


def check_refusals(k: Kernels) -> None:
    """The sentence a caller reads."""
    x = torch.zeros(64, dtype=torch.float16, device="cuda")
    for weight, text in (
        (Weight(x.data_ptr(), x.data_ptr(), None, 16, 64, 48, 0), "group_size is 48, expected 32, 64 or 128"),
        (Weight(x.data_ptr(), x.data_ptr(), None, 24, 64, 32, 0), "the matrix is [24, 64] in groups of 32, expected N % 16 == 0"),
    ):
        assert text in refusal(k, weight, x)


def refusal(k: Kernels, weight: Weight, x: Tensor) -> str:
    try:
        k("fh_w4a16_linear", ctypes.byref(weight), x, x, 1)
    except RuntimeError as error:
        return str(error)
    return "accepted"


# --- attention -----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    shape: Shape
    plan: Plan
    keys: Tensor
    values: Tensor
    lengths: Tensor
    workspace: Tensor


def random_cache(k: Kernels, shape: Shape, lengths: list[int], dtype: torch.dtype) -> Cache:
    """Random up to each length, not a number beyond it: what lies there must never reach a sum."""
    size = (shape.batch, shape.kv_heads, shape.max_length, shape.head_size)
    keys, values = (torch.randn(size, device="cuda").to(dtype) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, :, length:] = values[b, :, length:] = float("nan")
    plan = Plan()
    k("fh_attention_make_plan", ctypes.byref(shape), ctypes.byref(k.device), ctypes.byref(plan))
    return Cache(
        shape, plan, keys, values, torch.tensor(lengths, dtype=torch.int32, device="cuda"), torch.zeros(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    )


def attend(k: Kernels, cache: Cache, q: Tensor, out: Tensor) -> None:
    arguments = (q, cache.keys, cache.values, cache.lengths, out, cache.workspace, None)
    k("fh_attention_decode", ctypes.byref(cache.shape), ctypes.byref(cache.plan), *arguments)


def attention_reference(cache: Cache, q: Tensor) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound of the kernel's error.

    A score's float32 error is d additions of |q||k| and the scale's rounding; a weight's relative error is that of its score, of the exponential
    (2 units) and of the merges (16 roundings are more than any plan has per weight); numerator and denominator both carry it. In the numerator each
    weight is rounded once more to the cache's type.
    """
    s = cache.shape
    tiny = 2.0**-25 * s.max_length if q.dtype == torch.float16 else 0.0  # fp16 weights under 2^-14 of the largest round absolutely
    out = torch.empty(q.shape, dtype=torch.float64, device="cuda")
    bound = torch.empty_like(out)
    heads = s.q_heads // s.kv_heads
    for b in range(s.batch):
        length = int(cache.lengths[b])
        keys = cache.keys[b, :, :length].double().repeat_interleave(heads, 0)
        values = cache.values[b, :, :length].double().repeat_interleave(heads, 0)
        at = torch.arange(length, device="cuda")
        for i in range(s.queries):
            position = length - s.queries + i
            visible = (at <= position) & ((at > position - s.window) if s.window else True)
            query = q[b, i].double()[:, :, None] * s.scale
            score = (keys @ query)[..., 0].masked_fill(~visible, -torch.inf)
            weight = score.softmax(-1)[:, None]
            out[b, i] = (weight @ values)[:, 0]
            score_error = (s.head_size + 2) * FP32 * (keys.abs() @ query.abs())[..., 0].masked_fill(~visible, 0).amax(-1, keepdim=True)
            relative = 2 * (score_error + (18 + length) * FP32)
            bound[b, i] = UNIT[q.dtype] * out[b, i].abs() + (relative + UNIT[q.dtype]) * (weight @ values.abs())[:, 0] + tiny * values.abs().amax(1)
    return out, bound


def check_attention(k: Kernels) -> float:
    worst = 0.0
    heads = {64: (32, 8), 96: (6, 6), 128: (16, 8), 256: (4, 1)}
    cases = [
        (batch, queries, lengths, window)
        for batch, queries, lengths, window in (
            (1, 1, [1], 0),
            (1, 1, [37], 0),
            (1, 1, [4096], 0),
            (1, 1, [4095], 512),
            (1, 1, [300], 512),
            (3, 1, [5, 1000, 2049], 0),
            (1, 5, [5], 0),
            (1, 7, [1500], 0),
            (2, 4, [700, 4096], 100),
        )
    ]
    for dtype, size, (batch, queries, lengths, window) in itertools.product(DTYPES, heads, cases):
        for q_heads, kv_heads in (heads[size], (8, 1)):
            s = Shape(batch, queries, q_heads, kv_heads, size, 4096, window, size**-0.5, DTYPES[dtype])
            cache = random_cache(k, s, lengths, dtype)
            q = (torch.randn(batch, queries, q_heads, size, device="cuda") * 2).to(dtype)
            out, written = guarded(*q.shape, dtype=dtype)
            attend(k, cache, q, out)
            written()
            want, bound = attention_reference(cache, q)
            share = float(((out.double() - want).abs() / bound).max())
            assert share <= 1, f"attention {size}, heads {q_heads}/{kv_heads}, {dtype}, lengths {lengths}, window {window}: {share:.2f} of the bound"
            worst = max(worst, share)
            again, _ = guarded(*q.shape, dtype=dtype)
            attend(k, cache, q, again)
            assert torch.equal(again, out), "a second launch differs: the counters were not set back, or the order of sums moved"
            for facts in ({"multiprocessors": 8, "overlap": 0}, {"capability": 87}):
                board = k.on(**facts)
                other = random_cache(board, s, lengths, dtype)
                other.keys, other.values = cache.keys, cache.values
                for _ in range(2):
                    again, written = guarded(*q.shape, dtype=dtype)
                    attend(board, other, q, again)
                    written()
                    assert float(((again.double() - want).abs() / bound).max()) <= 1, f"attention {size}: the plan for {facts} is wrong"
    return worst


def rotated(part: Tensor, norm: Tensor | None, turn: Tensor, offset: float, epsilon: float) -> Tensor:
    h = part.double()
    if norm is not None:
        h = h / (h.square().mean(-1, keepdim=True) + epsilon).sqrt() * (offset + norm.double())
    a, b = h.chunk(2, -1)
    return torch.cat([a * turn[..., 0] - b * turn[..., 1], b * turn[..., 0] + a * turn[..., 1]], -1)


def check_rope_write(k: Kernels) -> None:
    for dtype, size, normed in itertools.product(DTYPES, (64, 96, 128, 256), (False, True)):
        batch, queries, q_heads, kv_heads, length = 2, 3, 6, 2, 64
        lengths = torch.tensor([3, 41], dtype=torch.int32, device="cuda")
        s = Shape(batch, queries, q_heads, kv_heads, size, length, 0, 1.0, DTYPES[dtype])
        qkv = torch.randn(batch, queries, q_heads + 2 * kv_heads, size, device="cuda").to(dtype)
        angle = torch.arange(length, device="cuda")[:, None] * 500000.0 ** (-torch.arange(size // 2, device="cuda") / (size // 2))
        rotations = torch.stack([angle.cos(), angle.sin()], -1).float().contiguous()
        norms = [torch.randn(size, device="cuda").to(dtype) if normed else None for _ in range(2)]
        q, written = guarded(batch, queries, q_heads, size, dtype=dtype)
        keys, values = (torch.full((batch, kv_heads, length, size), 9.0, dtype=dtype, device="cuda") for _ in range(2))
        offset, epsilon = 1.0, 1e-6
        k("fh_attention_rope_write", ctypes.byref(s), qkv, rotations, *norms, ctypes.c_float(offset), ctypes.c_float(epsilon), lengths, q, keys, values)
        written()
        at = (lengths[:, None] - queries + torch.arange(queries, device="cuda")).long()
        turn = rotations.double()[at][:, :, None]
        got_keys, got_values = (torch.stack([cache[b, :, at[b]].transpose(0, 1) for b in range(batch)]) for cache in (keys, values))
        for got, part, norm in ((q, qkv[:, :, :q_heads], norms[0]), (got_keys, qkv[:, :, q_heads : q_heads + kv_heads], norms[1])):
            want = rotated(part, norm, turn, offset, epsilon)
            # one rounding, and float32 arithmetic on a pair whose two products may cancel
            bound = UNIT[dtype] * want.abs() + (size + 16) * FP32 * (want.abs() + want.roll(size // 2, -1).abs()) + 2.0**-25
            assert bool(((got.double() - want).abs() <= bound).all()), f"rope_write {size}, {dtype}, norm {normed}"
        assert torch.equal(got_values, qkv[:, :, q_heads + kv_heads :])
        untouched = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        for b in range(batch):
            untouched[b, at[b]] = False
        for cache in (keys, values):
            assert bool((cache.transpose(1, 2)[untouched] == 9).all()), "a position that is not new was written"


@dataclass
class Layer:
    """Attention's half of a decoder layer, as a model launches it."""

    shape: Shape
    into: Matrix
    back: Matrix
    gain: Tensor
    turns: Tensor

    def step(self, k: Kernels, cache: Cache, x: Tensor) -> list[Tensor]:
        s, d, none = self.shape, len(x), ctypes.c_float(0)
        qkv, q, out, y, h = (x.new_empty(n) for n in (self.into.c.N, s.q_heads * s.head_size, s.q_heads * s.head_size, d, d))
        k("fh_rms_norm", x, None, None, self.gain, none, ctypes.c_float(1e-5), h, 1, d, s.dtype)
        k("fh_w4a16_linear", ctypes.byref(self.into.c), h, qkv, 1)
        k("fh_attention_rope_write", ctypes.byref(s), qkv, self.turns, None, None, none, none, cache.lengths, q, cache.keys, cache.values)
        attend(k, cache, q, out)
        k("fh_w4a16_linear", ctypes.byref(self.back.c), out, y, 1)
        return [h, qkv, q, out, y]


def check_overlap(k: Kernels) -> None:
    """Layers whose every launch begins while the one before it runs give the bits of the same launches one after the other."""
    for dtype, (q_heads, kv_heads, size) in itertools.product(DTYPES, ((32, 8, 64), (16, 8, 128), (4, 1, 256))):
        d, length = 2048, 2048
        layer = Layer(
            Shape(1, 1, q_heads, kv_heads, size, length, 0, size**-0.5, DTYPES[dtype]),
            random_matrix(k, (q_heads + 2 * kv_heads) * size, d, 128, False, dtype, value=False),
            random_matrix(k, d, q_heads * size, 128, True, dtype, value=False),
            torch.ones(d, device="cuda").to(dtype),
            torch.rand(length, size // 2, 2, device="cuda"),
        )
        caches = [random_cache(k, layer.shape, [int(n)], dtype) for n in torch.randint(1, length, (8,))]
        copies = [dataclasses.replace(c, keys=c.keys.clone(), values=c.values.clone(), workspace=c.workspace.clone()) for c in caches]
        start = torch.randn(8, d, device="cuda").to(dtype)
        want = [t for c, x in zip(copies, start) for t in layer.step(k.on(overlap=0), c, x)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [t for c, x in zip(caches, start) for t in layer.step(k, c, x)]
        for _ in range(20):
            for tensor in got:
                tensor.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(got, want)), f"overlapping launches change the result, {q_heads}/{kv_heads}/{size}, {dtype}"


# --- elementwise ---------------------------------------------------------------------------------------------------------------------------------


def check_elementwise(k: Kernels) -> None:
    for dtype, M, d, with_residual, offset in itertools.product(DTYPES, (1, 3), (8, 640, 2048, 8192, 16384), (False, True), (0.0, 1.0)):
        x, weight = torch.randn(M, d, device="cuda").to(dtype), torch.randn(d, device="cuda").to(dtype)
        residual = torch.randn(M, d, device="cuda").to(dtype) if with_residual else None
        h = x if residual is None else (x.float() + residual.float()).to(dtype)
        y, written = guarded(M, d, dtype=dtype)
        k("fh_rms_norm", x, residual, residual, weight, ctypes.c_float(offset), ctypes.c_float(1e-5), y, M, d, DTYPES[dtype])
        written()
        want = h.double() / (h.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
        # the offset is added in float32: absolute error of one unit of (offset + |weight|)
        error = FP32 * 8 * h.double().abs() / h.double().square().mean(-1, keepdim=True).sqrt() * (offset + weight.double().abs())
        assert bool(((y.double() - want).abs() <= (UNIT[dtype] + d / 256 * FP32) * want.abs() + error + 2.0**-25).all()), f"rms_norm {dtype} {M} x {d}"
        assert residual is None or torch.equal(residual, h)
    for dtype, M, f, gelu in itertools.product(DTYPES, (1, 5), (8, 2048, 8200), (0, 1)):
        x = (torch.randn(M, 2 * f, device="cuda") * 3).to(dtype)
        y, written = guarded(M, f, dtype=dtype)
        k("fh_gated_product", x, y, M, f, gelu, DTYPES[dtype])
        written()
        gate, up = x.double().chunk(2, -1)
        activated = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        want = activated * up
        # exp in float32 of |2 u| up to 90: relative error 90 units; results under fp16's normal range round absolutely
        bound = (UNIT[dtype] + 200 * FP32) * want.abs() + 2.0**-25
        assert bool(((y.double() - want).abs() <= bound).all()), f"gated product {dtype} {M} x {f} gelu {gelu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="FOLDER", help="compile into FOLDER/libkernels.so, and stop")
    parser.add_argument("--arch", default="sm_90a", help="sm_NN, or compute_NN for the code of an older device on this one (default: %(default)s)")
    parser.add_argument("--library", type=Path, help="the library to check")
    parser.add_argument("--time", action="store_true", help="time the kernels after the checks")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.build:
        build(options.build, options.arch)
        return
    if not options.library:
        parser.error("name a --library, or --build one")
    torch.manual_seed(20261124)
    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    capability = capability_of(options.arch)  # of the code: an older architecture's has neither overlap nor clusters
    facts = (capability, properties.multi_processor_count, properties.shared_memory_per_block_optin, int(capability >= 90))
    k = Kernels(options.library, Device(*facts))
    failed = False
    for check in (check_refusals, check_repack, check_linear, check_attention, check_rope_write, check_overlap, check_elementwise):
        try:
            share = check(k)
            print(f"{check.__name__}: passed{'' if share is None else f', largest error {share:.2f} of its bound'}", flush=True)
        except AssertionError as error:
            failed = True
            print(f"{check.__name__}: FAILED: {error}", flush=True)
    table: list[dict[str, Any]] = []
    if options.time:
        from w4a16_attention_times import time_kernels

        table = time_kernels(k)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
