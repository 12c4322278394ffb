"""The kernels of a decoder layer as torch operators: W4A16 products, RMSNorm, gated activation, rotary embedding with cache write, attention.

Each has a fake for tracing and is captured by CUDA graphs after one call outside of it. Layouts, roundings and determinism are
those of the C headers in plugins_trt/kernels; the launch plans are those of their launchers (a test compares them).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.kernels.build import architecture_of, capability_of, instance, launch

ELEMENTS = {torch.float16: "fh::Fp16", torch.bfloat16: "fh::Bf16"}
GROUPS, HEAD_SIZES, ACTIVATIONS = (32, 64, 128), (64, 96, 128, 256), ("silu", "gelu_tanh")
DECODE_ROWS = 8  # w4a16.h: up to so many rows the decode kernel runs
WIDE_FORMS = ((256, 128, 83), (128, 128, 50), (128, 64, 41))  # w4a16.cu: outputs and tokens of a block of wgmma, and what a chunk takes it
MOST_ROWS, MOST_CLUSTER, STEP = 8, 8, 16  # attention.cu: query rows of a block, blocks of a cluster, positions a warp takes at once
ATTENTION_THREADS = 256  # attention.cu: of a block
FUSED_QUERIES = 8  # attention.h: new tokens of a sequence that attention rotates itself
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Facts:
    """What a launch plan must know of a device: the one found, or a smaller one whose plan and code shall be run."""

    architecture: str  # that the kernels are compiled for, such as ``sm_90`` or ``compute_87``
    multiprocessors: int
    shared_bytes: int  # shared memory that a block may have
    overlap: bool = False  # launches begin while the one before them ends (capability 9.0 and up): it must not write weights

    @property
    def capability(self) -> int:
        return capability_of(self.architecture)


def facts_of(device: torch.device, overlap: bool = False) -> Facts:
    """The facts of a device that torch sees."""
    p = torch.cuda.get_device_properties(device)
    return Facts(architecture_of(device), p.multi_processor_count, p.shared_memory_per_block_optin, overlap)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Grid:
    """One launch."""

    blocks: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    cluster: int = 1


def _want(ok: bool, operator: str, what: str, found: object, expected: str) -> None:
    if not ok:
        raise SettingsError(f"{operator}: {what} is {found}, expected {expected}; see flashhead_edge.kernels.layers.{operator}")


def _check(operator: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raise where a tensor is not contiguous, 16-byte aligned, on the first one's device, or the first is not of a kernel's type."""
    _want(first.dtype in ELEMENTS, operator, "dtype", first.dtype, "float16 or bfloat16")
    for name, tensor in ({"the first argument": first} | tensors).items():
        if tensor is None:
            continue
        aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        _want(aligned, operator, name, f"strides {tensor.stride()} at {tensor.data_ptr():#x}", "contiguous and 16-byte aligned")
        if tensor.device != first.device:
            raise DeviceError(f"{operator}: {name} is on {tensor.device}, expected {first.device}; move it there")


def _run(source: str, expression: str, grid: Grid, device: torch.device, architecture: str, overlap: bool, *arguments: Tensor | int | float | None) -> None:
    """Launch an instance on torch's current stream; a tensor or None becomes a pointer."""
    index = device.index
    values = tuple((0 if a is None else a.data_ptr()) if a is None or isinstance(a, Tensor) else a for a in arguments)
    types = tuple(ctypes.c_void_p if a is None or isinstance(a, Tensor) else ctypes.c_float if isinstance(a, float) else ctypes.c_int for a in arguments)
    with torch.cuda.device(index):
        handle = instance(source, expression, index, architecture)
        stream = torch.cuda.current_stream(index).cuda_stream
        launch(handle, grid.blocks, grid.threads, grid.shared_bytes, stream, (values, types), overlap=overlap, cluster=grid.cluster)


def _element(tensor: Tensor) -> str:
    return ELEMENTS[tensor.dtype]


# W4A16 products


@dataclass(frozen=True, eq=False)
class W4A16:
    """A matrix of 4-bit weights, packed for the kernels (w4a16.h)."""

    codes: Tensor  # [N / 16, K / 64, 512] uint8
    scales: Tensor  # [N / 16, K / group, 16] float16 or bfloat16: the activations' type
    zeros: Tensor | None  # [N / 16, K / group, 16] uint8; None: symmetric, the zero point is 8
    group: int
    facts: Facts

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return 16 * self.codes.shape[0], 64 * self.codes.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., N] = x [..., K] W^T."""
        n, k = self.shape
        f = self.facts
        y = w4a16_linear(x.reshape(-1, k), self.codes, self.scales, self.zeros, self.group, f.architecture, f.multiprocessors, f.overlap)
        return y.reshape(*x.shape[:-1], n)


def w4a16(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, facts: Facts | None = None) -> W4A16:
    """Pack a matrix from the neutral layout: codes [N, K / 2] uint8, the low nibble first; scales [N, K / group]; zeros [N, K / group] uint8.

    W[n, k] = (codes[n, k] - zeros[n, k / group]) * scales[n, k / group], zeros 8 where there are none.

    Raises:
        SettingsError: a shape or type that has no kernel. DeviceError: a tensor is elsewhere, or a kernel call failed.
    """
    _check("w4a16", scales, codes=codes, zeros=zeros)
    n, k = codes.shape[0], 2 * codes.shape[1]
    group = k // scales.shape[1] if scales.ndim == 2 and scales.shape[1] else 0
    fits = codes.dtype == torch.uint8 and n % 16 == 0 and k % 64 == 0 and group in GROUPS and scales.shape == (n, k // group)
    found = f"codes {codes.dtype} {list(codes.shape)} and scales {list(scales.shape)}"
    _want(fits, "w4a16", "the matrix", found, f"uint8 [N, K / 2] and [N, K / group] with N % 16 == 0, K % 64 == 0 and groups of {GROUPS}")
    same = zeros is None or (zeros.dtype == torch.uint8 and zeros.shape == scales.shape)
    _want(same, "w4a16", "zeros", None if zeros is None else f"{zeros.dtype} {list(zeros.shape)}", f"uint8 {list(scales.shape)}")
    facts = facts or facts_of(scales.device)
    packed = [torch.empty_like(codes), torch.empty_like(scales), None if zeros is None else torch.empty_like(zeros)]
    jobs = [("fh::w4a16_repack_codes", codes, packed[0], n * k // 8, k)]
    jobs += [
        (f"fh::w4a16_repack_groups<unsigned {kind}>", tensor, out, scales.numel(), scales.shape[1])
        for kind, tensor, out in (("short", scales, packed[1]), ("char", zeros, packed[2]))
        if tensor is not None
    ]
    for expression, source, out, count, width in jobs:
        _run("w4a16.cu", expression, Grid((-(-count // 256), 1, 1), 256), scales.device, facts.architecture, False, source, out, n, width)
    assert packed[0] is not None and packed[1] is not None
    shape = (n // 16, k // group, 16)
    return W4A16(packed[0].view(n // 16, k // 64, 512), packed[1].view(shape), None if packed[2] is None else packed[2].view(shape), group, facts)


@dataclass(frozen=True)
class LinearPlan:
    """How a product of some rows is cut (`fh_w4a16_plan`)."""

    decode: bool
    wide: bool  # a prefill by wgmma, compiled for sm_90a
    outputs: int  # of a prefill's block
    tokens: int
    grid: Grid


def decode_pairs(n: int, k: int) -> int:
    """Pairs of chunks that a warp takes at once in decode, as w4a16_decode.cuh."""
    return 1 if k <= 2048 and n * k < 1 << 21 else 2


def decode_warps(n: int, k: int) -> int:
    """Warps that split K in decode, as w4a16_decode.cuh."""
    chunks, panel = k // 64, 2 * decode_pairs(n, k)
    panels = -(-chunks // (16 * panel))
    return -(-chunks // (panel * panels))


def w4a16_plan(n: int, k: int, group: int, rows: int, multiprocessors: int, capability: int) -> LinearPlan:
    """The plan of `fh_w4a16_make_plan`."""
    if rows <= DECODE_ROWS:
        warps = decode_warps(n, k)
        resident = multiprocessors * (1 if warps > 8 else 16 // warps)
        return LinearPlan(True, False, 0, 0, Grid((min(n // 16, resident), 1, 1), 32 * warps, 1024 * warps))
    groups = 2 if group == 32 else 1
    if capability == 90:
        cut = [(-(-rows // tokens), -(-n // outputs)) for outputs, tokens, _ in WIDE_FORMS]
        times = [-(-x * y // multiprocessors) * cost for (x, y), (*_, cost) in zip(cut, WIDE_FORMS)]
        best = times.index(min(times))
        outputs, tokens, _ = WIDE_FORMS[best]
        teams, stages = (1, 6) if tokens == 128 else (2, 8)
        stage = -(-(tokens * 128 + outputs * 32 + outputs * groups * 3) // 1024) * 1024
        threads = 2 * outputs * teams + (128 if outputs == 256 else 256)
        return LinearPlan(False, True, outputs, tokens, Grid((*cut[best], 1), threads, stages * stage + 1024))
    high = -(-n // 128)
    tokens = 128 if high * -(-rows // 128) >= 2 * multiprocessors else 64
    stage = 8 * 512 + tokens * 128 + 128 * groups * 3
    teams, stages = (1, 3) if tokens == 128 else (3, 2)
    return LinearPlan(False, False, 128, tokens, Grid((-(-rows // tokens), high, 1), 128 * teams, stages * teams * stage))


@torch.library.custom_op("flashhead::w4a16_linear", mutates_args=(), device_types="cuda")
def w4a16_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, architecture: str, multiprocessors: int, overlap: bool) -> Tensor:
    """y [M, N] = x [M, K] W^T of a packed matrix (`w4a16`), float32 sums.

    Args:
        x: [M, K] of the scales' type; decode (M up to 8) and prefill are different kernels.
        multiprocessors: of the launch plan; overlap: weights are read while the launch before this one ends.
    """
    n, k = 16 * codes.shape[0], 64 * codes.shape[1]
    _check("w4a16_linear", x, codes=codes, scales=scales, zeros=zeros)
    fits = x.ndim == 2 and x.shape[1] == k and x.dtype == scales.dtype
    _want(fits, "w4a16_linear", "x", f"{x.dtype} {list(x.shape)}", f"{scales.dtype} [M, {k}]")
    y = x.new_empty(len(x), n)
    if len(x):
        plan = w4a16_plan(n, k, group, len(x), multiprocessors, capability_of(architecture))
        form = f"{_element(x)}, {group}, {'false' if zeros is None else 'true'}"
        name = "w4a16_decode" if plan.decode else "w4a16_prefill_wide" if plan.wide else "w4a16_prefill"
        tile = f", {decode_pairs(n, k)}" if plan.decode else f", {plan.outputs}, {plan.tokens}" if plan.wide else f", {plan.tokens}"
        target = "sm_90a" if plan.wide else architecture
        _run("w4a16.cu", f"fh::{name}<{form}{tile}>", plan.grid, x.device, target, overlap, codes, scales, zeros, x, y, len(x), n, k)
    return y


@w4a16_linear.register_fake
def _(x, codes, scales, zeros, group, architecture, multiprocessors, overlap):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], 16 * codes.shape[0])


FUSED_WIDTH = 16384  # w4a16_fused.h: inputs of a product behind a norm


def w4a16_paired(n: int, k: int, multiprocessors: int) -> bool:
    """Whether a block multiplies a gate and its partner side by side, as `paired` in w4a16_fused.cu."""
    warps, pairs = decode_warps(n, k), n // 32
    if warps > 8:
        return False
    alone, both = multiprocessors * (16 // warps), multiprocessors * (8 // warps)
    return -(-pairs // both) * both < -(-pairs // alone) * alone


def w4a16_fused_plan(n: int, k: int, rows: int, norm: bool, gated: bool, multiprocessors: int) -> Grid:
    """The grid of `fh_w4a16_make_fused_plan`, rows up to 8."""
    grid = w4a16_plan(n, k, 128, rows, multiprocessors, 80).grid
    blocks, threads = grid.blocks[0], grid.threads
    if gated and w4a16_paired(n, k, multiprocessors):
        threads, blocks = 2 * threads, multiprocessors * (256 // threads)
    if gated:
        blocks = min(blocks, n // 32)
    return Grid((blocks, 1, 1), threads, grid.shared_bytes * (1 + gated) + norm * rows * (k + 32) * 2)


@torch.library.custom_op("flashhead::w4a16_fused", mutates_args={"total"}, device_types="cuda")
def w4a16_fused(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group: int,
    residual: Tensor | None,
    total: Tensor | None,
    first_norm: Tensor | None,
    norm: Tensor | None,
    weight_offset: float,
    epsilon: float,
    activation: str,
    architecture: str,
    multiprocessors: int,
    overlap: bool,
) -> Tensor:
    """A product of up to eight rows with the steps around it in one launch, with the bits of the operators that it replaces.

    a = x, or `rms_norm` of x by first_norm; h = a, or a + residual, written to total; y = `rms_norm` of h by norm, or x; then `w4a16_linear`; with an
    activation then `gated_product`, y [M, N / 2].

    Args:
        x: [M, K] of the scales' type, M at most 8; residual, total [M, K], total neither x nor residual; first_norm, norm [K]; weight_offset of both.
            Without norm there is neither residual nor first_norm nor activation.
        activation: "" or one of `gated_product`; the first half of W's rows are the gate's.
    """
    n, k = 16 * codes.shape[0], 64 * codes.shape[1]
    name = "w4a16_fused"
    _check(name, x, codes=codes, scales=scales, zeros=zeros, residual=residual, total=total, first_norm=first_norm, norm=norm)
    fits = x.ndim == 2 and 1 <= len(x) <= DECODE_ROWS and x.shape[1] == k and x.dtype == scales.dtype
    _want(fits, name, "x", f"{x.dtype} {list(x.shape)}", f"{scales.dtype} [1 to {DECODE_ROWS}, {k}]")
    for what, tensor, shape in (("residual", residual, x.shape), ("total", total, x.shape), ("first_norm", first_norm, (k,)), ("norm", norm, (k,))):
        right = tensor is None or (tensor.shape == shape and tensor.dtype == x.dtype)
        _want(right, name, what, None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}", f"{x.dtype} {list(shape)}")
    _want((residual is None) == (total is None), name, "one of residual and total", None, "both or neither")
    if total is not None and residual is not None:
        apart = total.data_ptr() not in (x.data_ptr(), residual.data_ptr())
        _want(apart, name, "total", "x or residual, which other blocks still read", "a third tensor")
    _want(activation in ("", *ACTIVATIONS), name, "activation", repr(activation), f"empty or one of {', '.join(ACTIVATIONS)}")
    alone = norm is not None or (residual is None and first_norm is None and not activation)
    _want(alone, name, "norm", None, "a tensor beside a residual, a first norm or an activation")
    _want(norm is None or k <= FUSED_WIDTH, name, "K", k, f"at most {FUSED_WIDTH} behind a norm")
    _want(not activation or n % 32 == 0, name, "N", n, "a multiple of 32 with an activation")
    y = x.new_empty(len(x), n // 2 if activation else n)
    grid = w4a16_fused_plan(n, k, len(x), norm is not None, bool(activation), multiprocessors)
    paired = activation and w4a16_paired(n, k, multiprocessors)
    flags = ", ".join("true" if flag else "false" for flag in (zeros is not None, norm is not None, activation, paired))
    expression = f"fh::w4a16_fused<{_element(x)}, {group}, {flags}, {decode_pairs(n, k)}>"
    _run("w4a16_fused.cu", expression, grid, x.device, architecture, overlap, codes, scales, zeros, x, y, len(x), n, k, residual, total, first_norm, norm,
         weight_offset, epsilon, int(activation == "gelu_tanh"))  # fmt: skip
    return y


@w4a16_fused.register_fake
def _(x, codes, scales, zeros, group, residual, total, first_norm, norm, weight_offset, epsilon, activation, *device):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], codes.shape[0] * (8 if activation else 16))


# Elementwise steps


@torch.library.custom_op("flashhead::rms_norm", mutates_args={"residual"}, device_types="cuda")
def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, weight_offset: float, epsilon: float, architecture: str, overlap: bool) -> Tensor:
    """h = x + residual, written back to residual; y = h / sqrt(mean(h^2) + epsilon) * (weight_offset + weight), [M, d].

    Args:
        x, residual: [M, d], d a multiple of 8 up to 16,384; weight [d] of the same type; weight_offset: 1 for Gemma, else 0.
    """
    _check("rms_norm", x, residual=residual, weight=weight)
    d = x.shape[-1]
    _want(x.ndim == 2 and d % 8 == 0 and d <= 16384, "rms_norm", "x", list(x.shape), "[M, d], d a multiple of 8 up to 16,384")
    _want(weight.shape == (d,) and weight.dtype == x.dtype, "rms_norm", "weight", f"{weight.dtype} {list(weight.shape)}", f"{x.dtype} [{d}]")
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    _want(same, "rms_norm", "residual", None if residual is None else f"{residual.dtype} {list(residual.shape)}", f"{x.dtype} {list(x.shape)}")
    y = torch.empty_like(x)
    if len(x):
        _run("elementwise.cu", f"fh::rms_norm<{_element(x)}>", Grid((len(x), 1, 1), norm_threads(d)), x.device, architecture, overlap,
             x, residual, residual, weight, weight_offset, epsilon, y, d)  # fmt: skip
    return y


@rms_norm.register_fake
def _(x, residual, weight, weight_offset, epsilon, architecture, overlap):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def norm_threads(d: int) -> int:
    """Threads of a row's block, as `fh_rms_norm`."""
    threads = (d // 8 + 31) // 32 * 32
    return threads if threads <= 1024 else (d // 16 + 31) // 32 * 32


@torch.library.custom_op("flashhead::gated_product", mutates_args=(), device_types="cuda")
def gated_product(x: Tensor, activation: str, architecture: str, overlap: bool) -> Tensor:
    """activation(x[:, :f]) * x[:, f:], [M, f]: x [M, 2 f] is the fused gate and up projection, f a multiple of 8; activation silu or gelu_tanh."""
    _check("gated_product", x)
    _want(activation in ACTIVATIONS, "gated_product", "activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    _want(x.ndim == 2 and x.shape[1] % 16 == 0 and len(x) <= 65535, "gated_product", "x", list(x.shape), "[M, 2 f], f a multiple of 8, M at most 65,535")
    y = x.new_empty(len(x), x.shape[1] // 2)
    if len(x):
        expression = f"fh::gated_product<{_element(x)}, {'true' if activation == 'gelu_tanh' else 'false'}>"
        grid = Grid((-(-y.shape[1] // 1024), len(x), 1), 128)
        _run("elementwise.cu", expression, grid, x.device, architecture, overlap, x, y, y.shape[1])
    return y


@gated_product.register_fake
def _(x, activation, architecture, overlap):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] // 2)


# Attention


@dataclass(frozen=True)
class AttentionPlan:
    """How a launch of attention is cut (attention.h); `splits` is part of the result's rounding."""

    splits: int
    cluster: int
    rows: int
    row_blocks: int
    threads: int
    workspace_bytes: int  # zero before the first launch, then one launch of this plan at a time

    def words(self) -> list[int]:
        """As the operator carries it."""
        return [self.splits, self.cluster, self.rows, self.row_blocks, self.threads]


def attention_plan(batch: int, queries: int, q_heads: int, kv_heads: int, head_size: int, max_length: int, window: int, facts: Facts) -> AttentionPlan:
    """The plan of `fh_attention_make_plan`.

    Raises:
        SettingsError: a shape without a kernel.
    """
    _want(head_size in HEAD_SIZES, "attention_plan", "head size", head_size, f"one of {HEAD_SIZES}")
    some = min(batch, queries, q_heads, kv_heads) >= 1 and q_heads % kv_heads == 0
    _want(some, "attention_plan", "batch, queries, heads", (batch, queries, q_heads, kv_heads), "at least 1 each, heads a multiple of key-value heads")
    _want(max_length >= queries and window >= 0, "attention_plan", "length and window", (max_length, window), f"at least {queries} and 0")
    count = queries * (q_heads // kv_heads)
    rows = min(count, MOST_ROWS)
    row_blocks = -(-count // rows)
    items = batch * kv_heads * row_blocks
    visible = min(window + queries - 1, max_length) if window > 0 else max_length
    splits = min(max(1, facts.multiprocessors // items), -(-visible // (ATTENTION_THREADS // 32 * STEP)))
    cluster = 1
    if facts.capability >= 90 and splits <= 4 * MOST_CLUSTER:
        cluster = splits = min(splits, MOST_CLUSTER)
    return AttentionPlan(splits, cluster, rows, row_blocks, ATTENTION_THREADS, _workspace_bytes(items, splits, cluster, rows, head_size))


def attention_shared_bytes(head_size: int, threads: int, rows: int, cluster: int, queries: int) -> int:
    """Of one block, as attention.cu's `shared_bytes`; queries: 0 without the rotary embedding in the launch."""
    inbox = (rows * head_size // 16 + cluster - 1) * 64 + cluster * rows * 8 if cluster > 1 else 0
    return 4 * (threads // 32) * rows * (head_size + 2) + inbox + ((rows + 2 * queries) * head_size * 2 if queries else 0)


def _workspace_bytes(items: int, splits: int, cluster: int, rows: int, head_size: int) -> int:
    """Of partial results and arrivals; a cluster needs none."""
    return 0 if cluster > 1 else 4 * items * (splits * rows * (head_size + 2) + 1)


@torch.library.custom_op("flashhead::attention_decode", mutates_args={"workspace"}, device_types="cuda")
def attention_decode(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    plan: Sequence[int],
    window: int,
    scale: float,
    architecture: str,
    overlap: bool,
) -> Tensor:
    """softmax(scale q k^T) v of new tokens over a cache, [batch, queries, q_heads, head_size].

    Args:
        q: [batch, queries, q_heads, head_size]; cache_k, cache_v [batch, kv_heads, max_length, head_size] of the same type.
        lengths: [batch] int32, tokens in the cache, the new ones included; read when the kernel runs, so a graph serves every step.
        workspace: [plan.workspace_bytes or more] uint8; plan: `attention_plan(...).words()`.
        window: the last positions that a query sees, 0 all; scale: of the scores, usually head_size ** -0.5.
    """
    _check("attention_decode", q, cache_k=cache_k, cache_v=cache_v, lengths=lengths, workspace=workspace)
    _check_cache("attention_decode", q, cache_k, cache_v, lengths)
    splits, cluster, rows, row_blocks, threads = plan
    batch, queries, q_heads, head_size = q.shape
    kv_heads, max_length = cache_k.shape[1:3]
    need = _workspace_bytes(batch * kv_heads * row_blocks, splits, cluster, rows, head_size)
    _want(workspace.numel() >= need, "attention_decode", "workspace", f"{workspace.numel()} bytes", f"{need} bytes")
    out = torch.empty_like(q)
    grid = Grid((splits, kv_heads * row_blocks, batch), threads, attention_shared_bytes(head_size, threads, rows, cluster, 0), cluster)
    expression = f"fh::attention_decode<{_element(q)}, {head_size}, {'true' if cluster > 1 else 'false'}>"
    _run("attention.cu", expression, grid, q.device, architecture, overlap, q, cache_k, cache_v, lengths, out, workspace, None,
         queries, q_heads // kv_heads, kv_heads, rows, row_blocks, max_length, window, scale * LOG2E)  # fmt: skip
    return out


@attention_decode.register_fake
def _(q, cache_k, cache_v, lengths, workspace, plan, window, scale, architecture, overlap):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@torch.library.custom_op("flashhead::attention_rope_write", mutates_args={"cache_k", "cache_v"}, device_types="cuda")
def attention_rope_write(
    qkv: Tensor,
    rotations: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_offset: float,
    epsilon: float,
    lengths: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    architecture: str,
    overlap: bool,
) -> Tensor:
    """Take the fused projection of new tokens apart: normalise and rotate queries and keys, write keys and values to the cache; returns the queries.

    Args:
        qkv: [batch, queries, q_heads + 2 kv_heads, head_size]; rotations [max_length, head_size / 2, 2] float32, cosine and sine of
            element i, which turns with element i + head_size / 2.
        q_norm, k_norm: [head_size] or None; a head is multiplied by (norm_offset + weight) / sqrt(mean square + epsilon).
        lengths, cache_k, cache_v: as in `attention_decode`.
    """
    _check("attention_rope_write", qkv, rotations=rotations, q_norm=q_norm, k_norm=k_norm, lengths=lengths, cache_k=cache_k, cache_v=cache_v)
    kv_heads, max_length, head_size = cache_k.shape[1:]
    batch, queries, heads = qkv.shape[:3]
    q = qkv.new_empty(batch, queries, heads - 2 * kv_heads, head_size)
    _check_cache("attention_rope_write", q, cache_k, cache_v, lengths)
    _check_rope("attention_rope_write", qkv, rotations, q_norm, k_norm, max_length, head_size)
    grid = Grid((-(-heads // 4), queries, batch), 128)
    _run("attention.cu", f"fh::attention_rope_write<{_element(qkv)}>", grid, qkv.device, architecture, overlap, qkv, rotations, q_norm, k_norm,
         norm_offset, epsilon, lengths, q, cache_k, cache_v, heads - 2 * kv_heads, kv_heads, head_size, max_length)  # fmt: skip
    return q


@attention_rope_write.register_fake
def _(qkv, rotations, q_norm, k_norm, norm_offset, epsilon, lengths, cache_k, cache_v, architecture, overlap):  # type: ignore[no-untyped-def]
    batch, queries, heads, head_size = qkv.shape
    return qkv.new_empty(batch, queries, heads - 2 * cache_k.shape[1], head_size)


@torch.library.custom_op("flashhead::attention_rope_decode", mutates_args={"cache_k", "cache_v", "workspace"}, device_types="cuda")
def attention_rope_decode(
    qkv: Tensor,
    rotations: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_offset: float,
    epsilon: float,
    lengths: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    workspace: Tensor,
    plan: Sequence[int],
    window: int,
    scale: float,
    architecture: str,
    overlap: bool,
) -> Tensor:
    """`attention_rope_write` and `attention_decode` in one launch, with their bits: [batch, queries, q_heads, head_size], queries at most 8.

    Args:
        As in those two.
    """
    name = "attention_rope_decode"
    _check(name, qkv, rotations=rotations, q_norm=q_norm, k_norm=k_norm, lengths=lengths, cache_k=cache_k, cache_v=cache_v, workspace=workspace)
    kv_heads, max_length, head_size = cache_k.shape[1:]
    batch, queries, heads = qkv.shape[:3]
    q_heads = heads - 2 * kv_heads
    out = qkv.new_empty(batch, queries, q_heads, head_size)
    _check_cache(name, out, cache_k, cache_v, lengths)
    _check_rope(name, qkv, rotations, q_norm, k_norm, max_length, head_size)
    _want(queries <= FUSED_QUERIES, name, "queries", queries, f"at most {FUSED_QUERIES}")
    splits, cluster, rows, row_blocks, threads = plan
    need = _workspace_bytes(batch * kv_heads * row_blocks, splits, cluster, rows, head_size)
    _want(workspace.numel() >= need, name, "workspace", f"{workspace.numel()} bytes", f"{need} bytes")
    grid = Grid((splits, kv_heads * row_blocks, batch), threads, attention_shared_bytes(head_size, threads, rows, cluster, queries), cluster)
    expression = f"fh::attention_rope_decode<{_element(qkv)}, {head_size}, {'true' if cluster > 1 else 'false'}>"
    _run("attention.cu", expression, grid, qkv.device, architecture, overlap, qkv, rotations, q_norm, k_norm, norm_offset, epsilon, cache_k, cache_v,
         lengths, out, workspace, None, queries, q_heads // kv_heads, kv_heads, rows, row_blocks, max_length, window, scale * LOG2E)  # fmt: skip
    return out


@attention_rope_decode.register_fake
def _(qkv, rotations, q_norm, k_norm, norm_offset, epsilon, lengths, cache_k, *rest):  # type: ignore[no-untyped-def]
    batch, queries, heads, head_size = qkv.shape
    return qkv.new_empty(batch, queries, heads - 2 * cache_k.shape[1], head_size)


def _check_rope(operator: str, qkv: Tensor, rotations: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, max_length: int, head_size: int) -> None:
    fits = rotations.dtype == torch.float32 and rotations.shape == (max_length, head_size // 2, 2)
    found = f"{rotations.dtype} {list(rotations.shape)}"
    _want(fits, operator, "rotations", found, f"float32 [{max_length}, {head_size // 2}, 2]")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        right = norm is None or (norm.shape == (head_size,) and norm.dtype == qkv.dtype)
        _want(right, operator, name, None if norm is None else f"{norm.dtype} {list(norm.shape)}", f"{qkv.dtype} [{head_size}]")


def _check_cache(operator: str, q: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor) -> None:
    batch, queries, q_heads, head_size = q.shape
    fits = cache_k.shape == cache_v.shape and cache_k.ndim == 4 and cache_k.dtype == cache_v.dtype == q.dtype and head_size in HEAD_SIZES
    fits = fits and cache_k.shape[0] == batch and cache_k.shape[3] == head_size and q_heads >= 1 and q_heads % cache_k.shape[1] == 0
    fits = fits and cache_k.shape[2] >= queries
    found = f"{cache_k.dtype} {list(cache_k.shape)} and {cache_v.dtype} {list(cache_v.shape)}"
    expected = f"{q.dtype} [{batch}, kv_heads, {queries} or more, {head_size}] for {q_heads} heads of a size in {HEAD_SIZES}"
    _want(fits, operator, "the cache", found, expected)
    right = lengths.dtype == torch.int32 and lengths.shape == (batch,)
    _want(right, operator, "lengths", f"{lengths.dtype} {list(lengths.shape)}", f"int32 [{batch}]")
