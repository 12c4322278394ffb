"""Times of the W4A16, attention and elementwise kernels, in one run beside torch's own. Called by w4a16_attention.py --time.

Times are of CUDA graphs with the L2 defeated: launches rotate over copies of what they read, together more than twice the L2. "serial" is the same
graph with every launch waiting for the end of the one before it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from w4a16_attention import DTYPES, Cache, Kernels, Matrix, Shape, attend, random_cache, random_matrix

from flashhead_edge.bench.timing import copy_bandwidth, timed

Launch = Callable[[], Any]
LAYERS = {
    "Llama-3.2-1B q+k+v": (3072, 2048),
    "Llama-3.2-1B k": (512, 2048),
    "Llama-3.2-1B o": (2048, 2048),
    "Llama-3.2-1B gate+up": (16384, 2048),
    "Llama-3.2-1B down": (2048, 8192),
    "Qwen3-1.7B q+k+v": (4096, 2048),
    "Qwen3-1.7B gate+up": (12288, 2048),
    "Qwen3-1.7B down": (2048, 6144),
}
OTHER_FORMS = ((torch.float16, 128, False, 1), (torch.float16, 32, True, 1), (torch.float16, 128, False, 8))  # of three of the layers
ATTENTION = (
    ("Llama-3.2-1B", 32, 8, 64, 0),
    ("Qwen3-1.7B", 16, 8, 128, 0),
    ("Gemma-3-1B global", 4, 1, 256, 0),
    ("Gemma-3-1B window 512", 4, 1, 256, 512),
)
PREFILL = ((16384, 2048), (2048, 8192), (3072, 2048), (2048, 2048))


def time_graph(launches: Sequence[Launch], samples: int = 60) -> tuple[float, float]:
    """Microseconds of one launch in a graph of all of them, at least 48 in a row: median and 99th percentile over samples."""
    times = timed([*launches] * max(1, math.ceil(48 / len(launches))), samples)
    return float(np.median(times)), float(np.percentile(times, 99))


class Table:
    """Rows of figures, printed as they come. A floor is the bytes over the copy's bandwidth."""

    def __init__(self) -> None:
        self.bandwidth = copy_bandwidth()
        self.rows: list[dict[str, Any]] = []
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, torch {torch.__version__}: copy {self.bandwidth / 1e12:.2f} TB/s, L2 {properties.L2_cache_size / 2**20:.0f} MiB")
        print(f"{'kernel':58s} {'MB':>7s} {'floor':>7s} {'us':>7s} {'p99':>7s} {'ratio':>6s} {'of bw':>5s} {'serial':>7s}")

    def add(self, name: str, moved: float, launches: Sequence[Launch], serial: Sequence[Launch] = (), note: str = "") -> float:
        median, p99 = time_graph(launches)
        apart = time_graph(serial)[0] if serial else None
        floor = moved / self.bandwidth * 1e6
        self.rows.append({"kernel": name, "bytes": moved, "floor_us": floor, "median_us": median, "p99_us": p99, "serial_us": apart, "note": note})
        ratio = f"{median / floor:6.2f} {floor / median:5.0%}" if floor else " " * 12
        print(f"{name:58s} {moved / 1e6:7.2f} {floor:7.2f} {median:7.2f} {p99:7.2f} {ratio} {'' if apart is None else f'{apart:.2f}':>7s} {note}", flush=True)
        return median


def time_linear(k: Kernels, table: Table, layer: str, dtype: torch.dtype, group: int, asymmetric: bool, M: int, cold: int) -> None:
    N, K = LAYERS[layer]
    weight_bytes = N * K // 2 + N * (K // group) * (3 if asymmetric else 2)
    matrices = [random_matrix(k, N, K, group, asymmetric, dtype, value=False) for _ in range(math.ceil(cold / weight_bytes))]
    x, y = torch.randn(M, K, device="cuda").to(dtype), torch.empty(M, N, dtype=dtype, device="cuda")

    def launches(kernels: Kernels) -> list[Launch]:
        return [partial(kernels, "fh_w4a16_linear", ctypes.byref(m.c), x, y, M) for m in matrices]

    name = f"{layer} {N}x{K} M{M} g{group} {'asym' if asymmetric else 'sym'} {str(dtype)[6:]}"
    table.add(name, weight_bytes + 2 * M * (N + K), launches(k), launches(k.on(overlap=0)))
    if dtype == torch.bfloat16 and M == 1:
        packed = [torch._convert_weight_to_int4pack(m.neutral[0], 8) for m in matrices]  # torch launches without overlap: compare it with "serial", too
        pairs = torch.randn(K // group, N, 2, device="cuda").to(dtype)
        table.add("  torch _weight_int4pack_mm", weight_bytes, [partial(torch._weight_int4pack_mm, x, p, group, pairs) for p in packed])


def time_attention(k: Kernels, table: Table, model: str, q_heads: int, kv_heads: int, size: int, window: int, cold: int) -> None:
    dtype, length, serial = torch.bfloat16, 4096, k.on(overlap=0)
    s = Shape(1, 1, q_heads, kv_heads, size, length, window, size**-0.5, DTYPES[dtype])
    moved = 4 * kv_heads * (window or length) * size
    count = min(64, math.ceil(cold / moved))
    caches = [random_cache(k, s, [length], dtype) for _ in range(count)]
    q, out = torch.randn(1, 1, q_heads, size, device="cuda").to(dtype), torch.empty(1, 1, q_heads, size, dtype=dtype, device="cuda")
    qkv, turns = torch.randn(q_heads + 2 * kv_heads, size, device="cuda").to(dtype), torch.rand(length, size // 2, 2, device="cuda")

    def attention(kernels: Kernels, caches: list[Cache] = caches) -> list[Launch]:
        return [partial(attend, kernels, c, q, out) for c in caches]

    def rope(kernels: Kernels) -> list[Launch]:
        none = ctypes.c_float(0)
        fixed = (ctypes.byref(s), qkv, turns, None, None, none, none)
        return [partial(kernels, "fh_attention_rope_write", *fixed, c.lengths, q, c.keys, c.values) for c in caches]

    def pairs(kernels: Kernels) -> list[Launch]:
        return [partial(lambda *both: [launch() for launch in both], *both) for both in zip(rope(kernels), attention(kernels))]

    plan = caches[0].plan
    table.add(
        f"attention {model} at {length}, {q_heads}/{kv_heads}/{size}", moved, attention(k), attention(serial), f"splits {plan.splits}, cluster {plan.cluster}"
    )
    alone = table.add("  rope_write", 4 * qkv.numel(), rope(k), rope(serial))
    both = table.add("  rope_write, attention", moved, pairs(k), pairs(serial))
    print(f"  attention behind rope_write, as in a model: {both - alone:.2f} us")
    older = k.on(capability=87)
    others = [random_cache(older, s, [length], dtype) for _ in range(count)]
    table.add("  without clusters", moved, attention(older, others), attention(older.on(overlap=0), others), f"splits {others[0].plan.splits}")


def time_prefill(k: Kernels, table: Table, N: int, K: int, M: int) -> None:
    dtype = torch.float16
    matrices: list[Matrix] = [random_matrix(k, N, K, 128, False, dtype, value=False) for _ in range(4)]
    dense: list[Tensor] = [torch.randn(N, K, device="cuda").to(dtype) for _ in range(4)]
    x, y = torch.randn(M, K, device="cuda").to(dtype), torch.empty(M, N, dtype=dtype, device="cuda")
    cublas, _ = time_graph([partial(torch.nn.functional.linear, x, w) for w in dense], 20)
    ours, p99 = time_graph([partial(k, "fh_w4a16_linear", ctypes.byref(m.c), x, y, M) for m in matrices], 20)
    rate = 2 * M * N * K / ours / 1e6
    table.rows.append({"kernel": f"prefill {N}x{K} M{M}", "median_us": ours, "p99_us": p99, "cublas_us": cublas, "tflops": rate})
    print(f"prefill {N}x{K} M{M}: {ours:8.2f} us ({rate:.0f} TFLOP/s), cuBLAS fp16 {cublas:8.2f} us, ratio {ours / cublas:.2f}", flush=True)


def time_kernels(k: Kernels) -> list[dict[str, Any]]:
    cold = 2 * torch.cuda.get_device_properties(0).L2_cache_size + 2**24
    table, serial = Table(), k.on(overlap=0)
    table.add("empty kernel", 0, [partial(k, "fh_test_empty")], [partial(serial, "fh_test_empty")])
    for layer in LAYERS:
        time_linear(k, table, layer, torch.bfloat16, 128, False, 1, cold)
    for layer, form in itertools.product(("Llama-3.2-1B o", "Llama-3.2-1B gate+up", "Llama-3.2-1B down"), OTHER_FORMS):
        time_linear(k, table, layer, *form, cold)
    for model in ATTENTION:
        time_attention(k, table, *model, cold)
    x, h, w = (torch.randn(2048, device="cuda").bfloat16() for _ in range(3))
    norm = ("fh_rms_norm", x, h, h, w, ctypes.c_float(0), ctypes.c_float(1e-5), torch.empty_like(x), 1, 2048, 1)
    table.add("rms_norm 2048 with residual", 2048 * 10, [partial(k, *norm)], [partial(serial, *norm)])
    gate = ("fh_gated_product", torch.randn(16384, device="cuda").bfloat16(), torch.empty(8192, dtype=torch.bfloat16, device="cuda"), 1, 8192, 0, 1)
    table.add("gated product 8192", 8192 * 6, [partial(k, *gate)], [partial(serial, *gate)])
    for (N, K), M in itertools.product(PREFILL, (64, 512, 4096)):
        time_prefill(k, table, N, K, M)
    return table.rows
