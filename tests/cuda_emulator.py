"""A GPU for jetson.cuda_program in the host's memory: every launcher in numpy, over addresses, by what its header says. Tests of what the backend launches,
where it lets it read and write, and in which order; what kernels compute is for tests/gpu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_truth import CHUNK, ORIN, unpacked

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.jetson import cuda_library as native
from flashhead_edge.jetson import cuda_program as cuda
from flashhead_edge.jetson import cuda_session as session
from flashhead_edge.jetson.cuda_kernels import Readied
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.program.weights import rounded, widened

CANDIDATES = 40  # that the emulated head finds in each row
PRECISIONS = ("float16", "bfloat16")
FACTS = DeviceFacts("Emulated", ORIN.capability or 0, ORIN.multiprocessors, ORIN.shared_bytes, 1 << 30, 1 << 30, None, "13.0")


def at(address: int, dtype: Any, *shape: int) -> np.ndarray:
    """An array where an address says; writing to it writes there."""
    count = int(np.prod(shape))
    room = (ctypes.c_ubyte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(room, dtype).reshape(shape)


class Half:
    """16-bit floats at an address."""

    def __init__(self, dtype: int) -> None:
        self.precision = PRECISIONS[dtype]
        self.kind = np.uint16 if dtype else np.float16

    def read(self, address: int, *shape: int) -> np.ndarray:
        return widened(at(address, self.kind, *shape), self.precision)

    def write(self, address: int, values: np.ndarray) -> None:
        at(address, self.kind, *values.shape)[:] = rounded(values, self.precision, "emulated")

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return widened(rounded(values, self.precision, "emulated"), self.precision)


def fh_embedding(ids: int, rows: int, scale: float, y: int, n: int, vocab: int, d: int, dtype: int) -> None:
    half = Half(dtype)
    half.write(y, half.read(rows, vocab, d)[at(ids, np.int32, n)] * np.float32(scale))


def _normed(x: np.ndarray, weight: np.ndarray, offset: float, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + np.float32(epsilon)) * (np.float32(offset) + weight)


def fh_rms_norm(x: int, residual: int | None, total: int | None, weight: int, offset: float, epsilon: float, y: int, m: int, d: int, dtype: int) -> None:
    half = Half(dtype)
    h = half.read(x, m, d)
    assert (residual is None) == (total is None)
    if residual is not None and total is not None:
        h = half.rounded(h + half.read(residual, m, d))
        half.write(total, h)
    half.write(y, _normed(h, half.read(weight, d), offset, epsilon))


def fh_gated_product(x: int, y: int, m: int, f: int, activation: int, dtype: int) -> None:
    half = Half(dtype)
    gate, up = np.split(half.read(x, m, 2 * f).astype(np.float64), 2, -1)
    active = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) if activation else gate / (1 + np.exp(-gate))
    half.write(y, active * up)


def fh_combine(x: int, other: int, one_row: int, combination: int, y: int, m: int, d: int, dtype: int) -> None:
    half = Half(dtype)
    a, b = half.read(x, m, d), half.read(other, 1 if one_row else m, d)
    half.write(y, a * b if combination == native.MULTIPLY else a + b)


_matrices: dict[int, np.ndarray] = {}  # by the address of their codes, while one program is open


def fh_w4a16_linear(w: native.Linear, x: int, y: int, m: int) -> None:
    half, groups = Half(w.dtype), w.k // w.group
    if w.codes not in _matrices:
        row, group = np.meshgrid(np.arange(w.n), np.arange(groups), indexing="ij")
        place = row // 16, group, row % 16
        scales = half.read(w.scales, w.n // 16, groups, 16)[place]
        zeros = 8 if w.zeros is None else at(w.zeros, np.uint8, w.n // 16, groups, 16)[place].astype(np.float32).repeat(w.group, 1)
        codes = unpacked(at(w.codes, np.uint8, w.n * w.k // 2), w.n, w.k).astype(np.float32)
        _matrices[w.codes] = (codes - zeros) * scales.repeat(w.group, 1)
    half.write(y, half.read(x, m, w.k) @ _matrices[w.codes].T)


def fh_attention_rope_write(
    s: native.AttentionShape, qkv: int, rotations: int, q_norm: int | None, k_norm: int | None, offset: float, epsilon: float, lengths: int, q: int, k: int,
    v: int,
) -> None:  # fmt: skip
    half = Half(s.dtype)
    table = at(rotations, np.float32, s.max_length, s.head_size // 2, 2)
    parts = half.read(qkv, s.batch, s.queries, s.q_heads + 2 * s.kv_heads, s.head_size)
    queries, keys, values = np.split(parts, [s.q_heads, s.q_heads + s.kv_heads], 2)
    cache_k, cache_v = (at(c, half.kind, s.batch, s.kv_heads, s.max_length, s.head_size) for c in (k, v))
    turned_q = np.empty_like(queries)
    for b, length in enumerate(at(lengths, np.int32, s.batch)):
        positions = np.arange(length - s.queries, length)
        assert positions[0] >= 0 and length <= s.max_length
        for x, norm, keep in ((queries[b], q_norm, True), (keys[b], k_norm, False)):
            x = x if norm is None else _normed(x, half.read(norm, s.head_size), offset, epsilon)
            c, t = table[positions, None, :, 0], table[positions, None, :, 1]
            first, second = np.split(x, 2, -1)
            y = np.concatenate([first * c - second * t, second * c + first * t], -1)
            if keep:
                turned_q[b] = y
            else:
                cache_k[b, :, positions] = rounded(y, half.precision, "emulated")
        cache_v[b, :, positions] = rounded(values[b], half.precision, "emulated")
    half.write(q, turned_q)


def fh_attention_decode(
    s: native.AttentionShape, plan: native.AttentionPlan, q: int, k: int, v: int, lengths: int, out: int, workspace: int, arrivals: int
) -> None:  # fmt: skip
    half = Half(s.dtype)
    queries = half.read(q, s.batch, s.queries, s.q_heads, s.head_size)
    keys, values = (half.read(c, s.batch, s.kv_heads, s.max_length, s.head_size) for c in (k, v))
    found = np.empty_like(queries)
    share = s.q_heads // s.kv_heads
    for b, length in enumerate(at(lengths, np.int32, s.batch)):
        for i in range(s.queries):
            end = length - s.queries + i + 1
            seen = slice(max(0, end - s.window) if s.window else 0, end)
            scores = np.float32(s.scale) * np.einsum("hd,hpd->hp", queries[b, i], keys[b, :, seen].repeat(share, 0))
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            found[b, i] = np.einsum("hp,hpd->hd", shares / shares.sum(-1, keepdims=True), values[b, :, seen].repeat(share, 0))
    assert not at(arrivals, np.uint32, plan.items).any()
    at(workspace, np.uint8, plan.workspace_bytes)[:] = 0xFF  # NaN to whoever lies there
    half.write(out, found)


def fh_w4a16_fused(w: native.Linear, f: native.Fusion, x: int, y: int, m: int) -> None:
    """By the launches that it stands for; x and residual are read to the end, so that they must not lie where sum and y do."""
    dtype, kept = w.dtype, [x, *filter(None, [f.residual])]
    assert m <= 8 and (f.residual is None) == (f.sum is None) and (f.norm is not None or not f.gated)
    before = [bytes(at(address, np.uint8, 2 * m * w.k)) for address in kept]
    made, both, given = (np.zeros(2 * m * width, np.uint8) for width in (w.k, w.n, w.k))
    ctypes.memmove(given.ctypes.data, x, given.size)
    if f.first_norm is not None:
        fh_rms_norm(given.ctypes.data, None, None, f.first_norm, f.weight_offset, f.epsilon, given.ctypes.data, m, w.k, dtype)
    if f.norm is None:
        made[:] = given
    else:
        fh_rms_norm(given.ctypes.data, f.residual, f.sum, f.norm, f.weight_offset, f.epsilon, made.ctypes.data, m, w.k, dtype)
    fh_w4a16_linear(w, made.ctypes.data, both.ctypes.data if f.gated else y, m)
    if f.gated:
        fh_gated_product(both.ctypes.data, y, m, w.n // 2, f.activation, dtype)
    assert before == [bytes(at(address, np.uint8, 2 * m * w.k)) for address in kept]


def fh_attention_rope_decode(
    s: native.AttentionShape, plan: native.AttentionPlan, f: native.AttentionFusion, k: int, v: int, lengths: int, out: int, workspace: int, arrivals: int
) -> None:  # fmt: skip
    assert s.queries <= 8
    q = np.zeros(2 * s.batch * s.queries * s.q_heads * s.head_size, np.uint8)
    before = bytes(at(f.qkv, np.uint8, 2 * s.batch * s.queries * (s.q_heads + 2 * s.kv_heads) * s.head_size))
    fh_attention_rope_write(s, f.qkv, f.rotations, f.q_norm, f.k_norm, f.norm_offset, f.epsilon, lengths, q.ctypes.data, k, v)
    fh_attention_decode(s, plan, q.ctypes.data, k, v, lengths, out, workspace, arrivals)
    assert before == bytes(at(f.qkv, np.uint8, len(before)))


def fh_head_step(a: Any) -> None:
    """The best rows of all, found by multiplying with every one."""
    half, l = Half(a.weight_bf16), a.layout
    assert l.blocks and not a.hidden % 16
    logits = half.read(a.hidden, a.rows, l.hidden_size) @ half.read(a.weight, l.vocab_size, l.hidden_size).T
    best = np.argsort(-logits, 1, kind="stable")[:, :CANDIDATES]
    ids, values = at(a.ids, np.int64, a.rows, l.candidates), at(a.logits, np.float32, a.rows, l.candidates)
    counts = at(a.counts, np.int64, a.rows, 2 + l.stages)
    at(a.workspace, np.uint8, a.rows * l.row_bytes)
    ids[:, :CANDIDATES], values[:, :CANDIDATES] = best, np.take_along_axis(logits, best, 1)
    counts[:], at(a.token, np.int64, a.rows)[:], at(a.capped, np.uint8, a.rows)[:] = CANDIDATES, best[:, 0], 0
    if a.wide:
        at(a.wide, np.float32, a.rows, a.wide_stride)[:, : l.vocab_size] = logits


def fh_head_widen(_: Any) -> None:
    """The step wrote all of them."""


def fh_dense_rows(rows: int, bias: int | None, hidden: int, logits: int, n: int, d: int, vocab: int, dtype: int) -> None:
    half = Half(dtype)
    assert 1 <= n <= native.DENSE_STATES
    found = half.read(hidden, n, d) @ half.read(rows, vocab, d).T
    at(logits, np.float32, n, vocab)[:] = found if bias is None else found + half.read(bias, vocab)


def fh_draw_settings(s: native.DrawSettings) -> None:
    for name, dtype in (("temperature", np.float32), ("top_p", np.float32), ("min_p", np.float32), ("top_k", np.int32), ("step", np.int32)):
        wide = np.float64 if dtype is np.float32 else np.int64
        at(getattr(s, f"wide_{name}"), wide, s.rows)[:] = at(getattr(s, name), dtype, s.rows)
    assert s.logits is None  # made programs have no scale


def fh_decode(d: Any) -> None:
    for row in range(d.rows):
        n = int(at(d.count + 8 * row * d.count_stride, np.int64, 1)[0])
        ids, logits = at(d.ids + 8 * row * d.width, np.int64, 1, n), at(d.logits + 4 * row * d.width, np.float32, 1, n)
        one = {name: at(getattr(d, name) + 8 * row, kind, 1)[0].item() for name, kind in (
            ("temperature", np.float64), ("top_p", np.float64), ("min_p", np.float64), ("top_k", np.int64), ("seed", np.uint64))}  # fmt: skip
        step = int(at(d.step + 8 * row, np.int64, 1)[0])
        token = choose(ids, logits, Sampling(**one), [step], None, None, 1.0, None)[0]
        at(d.token + 8 * row, np.int64, 1)[:], at(d.logprob + 4 * row, np.float32, 1)[:] = token, -1.5


def fh_advance(a: native.Advance) -> None:
    number = at(a.number, np.uint32, 1)
    number += 1
    slot = at(a.mail + 4 * a.slot_words * int(number[0] % a.slots), np.uint32, a.slot_words)
    width = native.MAIL_ROW + a.counted
    for row in range(a.rows):
        mine = slot[native.MAIL_HEAD + row * width :][:width]
        token = int(at(a.token + 8 * row, np.int64, 1)[0])
        mine[0], mine[1] = token, at(a.capped + row, np.uint8, 1)[0]
        mine[2] = 0 if a.logprob is None else at(a.logprob + 4 * row, np.uint32, 1)[0]
        mine[native.MAIL_ROW :] = at(a.counts + 8 * row * a.counted, np.int64, a.counted)
        at(a.ids + 4 * row, np.int32, 1)[:] = token
        for grown in (a.lengths, a.step):
            at(grown + 4 * row, np.int32, 1)[:] += 1
    slot[0] = number[0]


class HostStream:
    """Copies are done at once."""

    handle = 0

    def to_device(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    to_host = on_device = to_device

    def wait(self) -> None: ...

    finish = wait

    def done(self) -> bool:
        return True

    def close(self) -> None: ...


def host_bytes(size: int) -> Any:
    """What Pinned and Mailbox are: bytes under an address."""
    array = np.zeros(size, np.uint8)
    return SimpleNamespace(array=array, pointer=array.ctypes.data, device=array.ctypes.data, size=size, close=lambda: None)


@contextmanager
def emulated(program: Any, chunk: int = CHUNK, fuses: bool = True) -> Iterator[tuple[cuda.Model, list[str]]]:
    """A program that is open in the host's memory, and the launchers that have been called."""
    head, limits = cuda.head_of(program), native.limits_of(FACTS)
    dtype = PRECISIONS.index(program.precision)
    m = cuda.Model(program, head, FACTS, limits, cuda.memory_plan(program, head, limits, chunk, dtype), chunk, fuses)
    memory = np.full(m.plan.size + 256, 0xFF, np.uint8)  # NaN in whatever nobody has written
    m.base = -(-memory.ctypes.data // 256) * 256
    start = m.base - memory.ctypes.data
    values = min(m.plan.values.values())
    memory[start + m.plan.weight_bytes : start + values] = 0
    data = np.fromfile(program.weights, np.uint8)
    for name, (offset, size) in program.places.items():
        ctypes.memmove(m.base + m.plan.weights[name], data.ctypes.data + offset, size)
    m.stream, m.memory = HostStream(), SimpleNamespace(virtual=True, close=lambda: None)  # type: ignore[assignment]
    m.device = SimpleNamespace(open=True, use=lambda: None, close=lambda: None)  # type: ignore[assignment]
    m.readied = Readied(0, 0, 0.0, "13.0")
    m.mail = host_bytes(4 * cuda.SLOTS * cuda.slot_words(m))
    m.mail_address = m.mail.device
    m.settings = host_bytes(session.settings_bytes(m))
    m.prompts = host_bytes(4 * program.batch * (program.context + -(-program.context // chunk) + 1))
    m.results = host_bytes(session.results_extent(m)[1] + 2 * head.hidden * head.rows)
    session.setting(m, "top_p")[:] = 1
    called: list[str] = []

    def launch(function: str, *arguments: Any, device: Any, stream: int) -> None:
        # w4a16_fused.h: attention reads lengths, which fh_advance writes, when all before the last launch that is no fused product has ended.
        if function == "fh_attention_rope_decode":
            assert next(c for c in reversed(called) if c != "fh_w4a16_fused") != "fh_advance"
        called.append(function)
        assert len(arguments) == len(native.LAUNCHERS[function]) and device is m.limits and stream == 0
        globals()[function](*arguments)

    def step_graph(m: cuda.Model, rows: int, drawn: bool) -> Any:
        return SimpleNamespace(launch=lambda _: cuda.put_step(m, rows, drawn))

    _matrices.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launch", launch)
        patch.setattr(session, "step_graph", step_graph)
        patch.setattr(session, "run_draft", cuda.put_draft)
        yield m, called
    del memory
