"""The operators of a decoder layer against float64: values, batches, graphs, tracing, the code and plans of an Orin."""

import pytest
import torch

from flashhead_edge.errors import SettingsError
from flashhead_edge.kernels.layers import (
    Facts,
    attention_decode,
    attention_plan,
    attention_rope_decode,
    attention_rope_write,
    facts_of,
    gated_product,
    rms_norm,
    w4a16,
    w4a16_fused,
)

pytestmark = pytest.mark.gpu

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of one rounding to nearest
FP32 = 2.0**-23  # of one float32 addition; tensor cores truncate, so a whole unit in the last place
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
BOARDS = {
    "found": None,
    "overlapping": None,
    "AGX Orin": Facts("compute_87", 16, 163 << 10),
    "Orin Nano": Facts("compute_87", 8, 163 << 10),
    "sm_86": Facts("compute_86", 84, 99 << 10),  # sm_120 gives a block as much
}
BOARD = pytest.mark.parametrize("board", BOARDS)


def facts(board):
    return BOARDS[board] or facts_of(torch.device("cuda", 0), overlap=board == "overlapping")


def random(*shape, dtype=torch.float16, seed=0, scale=1.0):
    return (torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) * scale).to(dtype)


def neutral(n, k, group, dtype, asymmetric, seed=1):
    g = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=g)
    scales = (torch.rand(n, k // group, device="cuda", generator=g) * 0.02 + 0.005).to(dtype)
    zeros = torch.randint(0, 256, (n, k // group), dtype=torch.uint8, device="cuda", generator=g) if asymmetric else None
    fields = torch.stack([codes & 15, codes >> 4], 2).view(n, k).double()
    zero = torch.full((n, k // group), 8.0, device="cuda", dtype=torch.float64) if zeros is None else (zeros % 16).double() + (zeros // 16).double() / 16
    return codes, scales, zeros, (fields - zero.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)


@BOARD
@DTYPES
@pytest.mark.parametrize(("n", "k", "group", "asymmetric"), [(256, 512, 128, False), (3072, 2048, 128, True), (48, 192, 64, True), (1024, 320, 32, False)])
def test_w4a16_is_the_product(n, k, group, asymmetric, dtype, board):
    codes, scales, zeros, dense = neutral(n, k, group, dtype, asymmetric)
    matrix = w4a16(codes, scales, zeros, facts(board))
    assert matrix.shape == (n, k)
    alone = []
    for m in (1, 3, 8, 9, 64, 200, *((513, 4096) if n == 256 else ())):
        x = random(m, k, dtype=dtype, seed=2)
        want, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
        y = matrix(x)
        assert y.dtype == dtype
        rounded = UNIT[dtype] if m > 8 else 0  # prefill rounds each weight to x's type
        assert ((y.double() - want).abs() <= UNIT[dtype] * want.abs() + (k * FP32 + rounded) * size).all(), m
        if m <= 8:
            alone.append(matrix(x[:1]))
            assert torch.equal(y[:1], alone[0])  # decode's bits depend on the matrix alone, not on M
    x = random(200, k, dtype=dtype, seed=3)
    assert torch.equal(matrix(x.view(10, 20, k)), matrix(x).view(10, 20, n))


@DTYPES
@pytest.mark.parametrize("d", [8, 576, 2048, 9000, 16384])
def test_rms_norm_adds_the_residual_first(d, dtype):
    f = facts("found")
    x, residual, weight = random(5, d, dtype=dtype), random(5, d, dtype=dtype, seed=1), random(d, dtype=dtype, seed=2)
    h = (x.double() + residual.double()).to(dtype)
    for kept, offset in ((residual.clone(), 1.0), (None, 0.0)):
        y = rms_norm(x, kept, weight, offset, 1e-6, f.architecture, f.overlap)
        base = x if kept is None else h
        want = base.double() / (base.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * (offset + weight.double())
        assert ((y.double() - want).abs() <= (UNIT[dtype] + d * FP32) * want.abs() + 1e-7).all()
        assert kept is None or torch.equal(kept, h)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_product(activation, dtype):
    f = facts("found")
    x = random(7, 2 * 1032, dtype=dtype, scale=3.0)
    gate, up = x.double().chunk(2, 1)
    active = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    want = active * up
    y = gated_product(x, activation, f.architecture, f.overlap)
    # exp is fast: 2^-21 of the sigmoid, which counts where the activation is small beside the gate
    assert ((y.double() - want).abs() <= UNIT[dtype] * want.abs() + 2.0**-19 * (gate * up).abs() + 1e-7).all()


def rotations_of(length, head_size):
    angle = torch.arange(length, device="cuda")[:, None] * 10000.0 ** (-torch.arange(head_size // 2, device="cuda") / (head_size // 2))
    return torch.stack([angle.cos(), angle.sin()], 2).float().contiguous()


@BOARD
@DTYPES
@pytest.mark.parametrize(
    ("batch", "queries", "q_heads", "kv_heads", "head_size", "window"),
    [(1, 1, 32, 8, 64, 0), (2, 3, 16, 8, 128, 0), (1, 1, 4, 1, 256, 100), (3, 2, 6, 3, 96, 37), (1, 64, 8, 2, 64, 0), (2, 33, 4, 1, 256, 100)],
)
def test_attention_over_what_rope_wrote(batch, queries, q_heads, kv_heads, head_size, window, dtype, board):
    f, length = facts(board), 600
    lengths = torch.tensor([length - 7 * i for i in range(batch)], dtype=torch.int32, device="cuda")
    cache_k, cache_v = (random(batch, kv_heads, length, head_size, dtype=dtype, seed=s) for s in (3, 4))
    qkv = random(batch, queries, q_heads + 2 * kv_heads, head_size, dtype=dtype, seed=5)
    q_norm, k_norm = random(head_size, dtype=dtype, seed=6), random(head_size, dtype=dtype, seed=7)
    turn = rotations_of(length, head_size)
    old = cache_k.clone()
    q = attention_rope_write(qkv, turn, q_norm, k_norm, 1.0, 1e-6, lengths, cache_k, cache_v, f.architecture, f.overlap)

    def turned(x, norm, at):  # [heads, head_size] of the token at a position
        x = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * (1 + norm.double())
        a, b = x.chunk(2, 1)
        cos, sin = turn[at].double().T
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

    for i in range(batch):
        for t in range(queries):
            at = int(lengths[i]) - queries + t
            parts = qkv[i, t].split([q_heads, kv_heads, kv_heads])
            for found, part, norm in ((q[i, t], parts[0], q_norm), (cache_k[i, :, at], parts[1], k_norm)):
                want = turned(part, norm, at)
                assert ((found.double() - want).abs() <= UNIT[dtype] * want.abs() + 1e-5).all()  # float32 of values about 1 to 10
            assert torch.equal(cache_v[i, :, at], parts[2])
        assert torch.equal(cache_k[i, :, : int(lengths[i]) - queries], old[i, :, : int(lengths[i]) - queries])
    plan = attention_plan(batch, queries, q_heads, kv_heads, head_size, length, window, f)
    workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
    arguments = (cache_k, cache_v, lengths, workspace, plan.words(), window, head_size**-0.5, f.architecture, f.overlap)
    out = attention_decode(q, *arguments)
    for i in range(batch):
        for t in range(queries):
            at = int(lengths[i]) - queries + t
            first = max(0, at + 1 - window) if window else 0
            keys, values = (c[i, :, first : at + 1].double().repeat_interleave(q_heads // kv_heads, 0) for c in (cache_k, cache_v))
            weight = ((q[i, t].double()[:, None] * keys).sum(2) * head_size**-0.5).softmax(1)
            want, size = (weight[:, None] @ values)[:, 0], (weight[:, None] @ values.abs())[:, 0]
            # the weights are rounded to the cache's type, sums are float32
            assert ((out[i, t].double() - want).abs() <= UNIT[dtype] * want.abs() + (2 * UNIT[dtype] + 2e-5) * size).all()
    for _ in range(3):
        assert torch.equal(attention_decode(q, *arguments), out)  # the workspace is left ready, the bits are the same


def fused(matrix, x, f, residual=None, total=None, first_norm=None, norm=None, activation=""):
    m = matrix
    return w4a16_fused(
        x, m.codes, m.scales, m.zeros, m.group, residual, total, first_norm, norm, 1.0, 1e-6, activation, f.architecture, f.multiprocessors, f.overlap
    )


@BOARD
@DTYPES
@pytest.mark.parametrize(
    ("n", "k", "group", "asymmetric"),
    # one to sixteen warps, one and several panels, more warps of a norm than of a product, blocks with several tiles, a pair of tiles in all
    [(32, 64, 32, True), (192, 576, 64, False), (8192, 2048, 128, True), (96, 5120, 128, False), (64, 8192, 64, True), (32, 16384, 128, False)],
)
def test_a_fused_product_has_the_bits_of_its_steps(n, k, group, asymmetric, dtype, board):
    f = facts(board)
    codes, scales, zeros, _ = neutral(n, k, group, dtype, asymmetric)
    matrix = w4a16(codes, (scales.float() / k**0.5).to(dtype), zeros, f)  # outputs about 1, where an activation bends
    first_norm, norm = random(k, dtype=dtype, seed=7), random(k, dtype=dtype, seed=8)
    for m in (1, 3, 8):
        if m * (k + 32) * 2 + 32768 > f.shared_bytes:
            continue  # refused by the launch; the steps are launched one by one
        x, residual = random(m, k, dtype=dtype, seed=m), random(m, k, dtype=dtype, seed=20 + m)
        assert torch.equal(fused(matrix, x, f), matrix(x))
        for first, added, activation in ((0, 0, ""), (0, 1, "silu"), (1, 1, "gelu_tanh"), (1, 0, "")):
            h, total = residual.clone(), torch.full_like(x, torch.nan)
            start = rms_norm(x, None, first_norm, 1.0, 1e-6, f.architecture, f.overlap) if first else x
            want = matrix(rms_norm(start, h if added else None, norm, 1.0, 1e-6, f.architecture, f.overlap))
            want = gated_product(want, activation, f.architecture, f.overlap) if activation else want
            assert want.isfinite().all()
            given = {"residual": residual, "total": total} if added else {}
            found = fused(matrix, x, f, first_norm=first_norm if first else None, norm=norm, activation=activation, **given)
            assert torch.equal(found, want), (m, first, added, activation)
            assert not added or torch.equal(total, h)


@BOARD
@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize(
    ("batch", "queries", "q_heads", "kv_heads", "head_size", "window"),
    [(1, 1, 32, 8, 64, 0), (2, 3, 16, 8, 128, 0), (1, 1, 4, 1, 256, 100), (3, 2, 6, 3, 96, 37), (1, 8, 8, 2, 64, 0), (8, 1, 9, 3, 64, 0)],
)
def test_attention_with_rope_has_the_bits_of_both(batch, queries, q_heads, kv_heads, head_size, window, normed, dtype, board):
    f, length = facts(board), 600
    # a full cache, one that ends at a warp's step and one a token later, the first tokens of all
    lengths = torch.tensor([(length, 513, 512, queries, 1)[i % 5] for i in range(batch)], dtype=torch.int32, device="cuda")
    qkv = random(batch, queries, q_heads + 2 * kv_heads, head_size, dtype=dtype, seed=5)
    q_norm, k_norm = (random(head_size, dtype=dtype, seed=s) if normed else None for s in (6, 7))
    plan = attention_plan(batch, queries, q_heads, kv_heads, head_size, length, window, f)
    found = []
    for apart in (True, False):
        cache_k, cache_v = (random(batch, kv_heads, length, head_size, dtype=dtype, seed=s) for s in (3, 4))
        workspace = torch.zeros(max(16, plan.workspace_bytes), dtype=torch.uint8, device="cuda")
        rope = (qkv, rotations_of(length, head_size), q_norm, k_norm, 1.0, 1e-6, lengths, cache_k, cache_v)
        seen = (plan.words(), window, head_size**-0.5)
        if apart:
            q = attention_rope_write(*rope, f.architecture, f.overlap)
            out = attention_decode(q, cache_k, cache_v, lengths, workspace, *seen, f.architecture, f.overlap)
        else:
            out = attention_rope_decode(*rope, workspace, *seen, f.architecture, f.overlap)
            assert torch.equal(attention_rope_decode(*rope, workspace, *seen, f.architecture, f.overlap), out)
        assert out.isfinite().all()
        found.append((out, cache_k, cache_v))
    for apart, together in zip(*found):
        assert torch.equal(apart, together)


def test_what_a_fused_launch_cannot_do_is_refused():
    f, dtype = facts("found"), torch.float16
    codes, scales, _, _ = neutral(48, 128, 128, dtype, False)
    matrix, x, norm = w4a16(codes, scales, None, f), random(2, 128), random(128)
    for change, said in (
        ({"residual": x, "total": x.clone()}, "w4a16_fused: norm is None"),
        ({"residual": x.clone(), "norm": norm}, "one of residual and total is None"),
        ({"residual": x.clone(), "total": x, "norm": norm}, "total is x or residual, which other blocks still read"),
        ({"activation": "silu", "norm": norm}, "N is 48, expected a multiple of 32"),
        ({"activation": "relu", "norm": norm}, "activation is 'relu'"),
        ({"norm": norm[:64].contiguous()}, r"norm is torch.float16 \[64\]"),
    ):
        with pytest.raises(SettingsError, match=said):
            fused(matrix, x, f, **change)
    with pytest.raises(SettingsError, match="expected torch.float16 .1 to 8, 128."):
        fused(matrix, random(9, 128), f)


def test_a_layer_is_captured_and_traced():
    f, dtype, d = facts("found"), torch.bfloat16, 512
    codes, scales, _, _ = neutral(2 * d, d, 128, dtype, False)
    up, weight = w4a16(codes, scales), random(d, dtype=dtype)

    def layer(x):
        return gated_product(up(rms_norm(x, None, weight, 0.0, 1e-6, f.architecture, False)), "silu", f.architecture, False)

    x = random(4, d, dtype=dtype, seed=9)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)
    x.copy_(random(4, d, dtype=dtype, seed=10))
    graph.replay()
    assert torch.equal(found, layer(x))
    arguments = (x, up.codes, up.scales, None, 128, None, None, None, weight, 0.0, 1e-6, "silu", f.architecture, f.multiprocessors, False)
    assert torch.equal(w4a16_fused(*arguments), layer(x))
    torch.library.opcheck(torch.ops.flashhead.w4a16_fused.default, arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = (x, up.codes, up.scales, None, 128, f.architecture, f.multiprocessors, False)
    torch.library.opcheck(torch.ops.flashhead.w4a16_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
