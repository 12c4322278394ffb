"""Dense heads in the place of the clustered one, in steps of the CUDA backend: what it is measured against. numpy alone.

Two of them: the model's own rows in 16 bits (bench/dense_rows.cu), and random ones in 8 bits with a scale a row (plugins_trt/kernels/dense_head.cu), whose
time does not depend on what they hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import CACHED, rewind
from flashhead_edge.errors import DeviceError, SettingsError

KINDS = ("16 bits", "8 bits")
ROWS, CODED_ROWS = (1, 2, 4, 8), (8, 16, 32)  # states that kernels of 16 bits are compiled for, and of 8
THREADS, BLOCKS = 256, 4  # of a block; a multiprocessor
SHARED = 200 << 10  # that the states of a multiprocessor's blocks may have together
ROOM = 512  # bytes of either kernel's workspace


def most_rows(m: Any) -> int:
    """States that both kinds take on an open program's device, whose blocks must hold them in shared memory; 0 where one is too many."""
    fitting = (n for n in reversed(ROWS) if max(shared_bytes(kind, n, m.head.hidden) for kind in KINDS) <= m.limits.shared_bytes)
    return next(fitting, 0)


def shared_bytes(kind: str, rows: int, hidden: int) -> int:
    """Shared memory of a block of either kind's kernel."""
    if kind == KINDS[0]:
        return 4 * _wide(ROWS, rows) * hidden
    return _wide(CODED_ROWS, rows) * 2 * (_columns(hidden) + 32)


def _wide(known: Sequence[int], rows: int) -> int:
    """The states of the kernel that takes so many."""
    found = next((n for n in known if n >= rows), 0)
    if not found:
        raise SettingsError(f"dense head: {rows} rows, expected {known[-1]} at most; time a smaller batch")
    return found


def _columns(hidden: int) -> int:
    return -(-hidden // 64) * 64  # dense_head.h: 8 bits, a scale a row


class DenseHead:
    """A dense head over an open program (jetson.cuda_program.Model). `close` frees what it has on the device.

    Raises:
        SettingsError: no such kind. EngineError: a kernel does not compile. DeviceError: too little memory.
    """

    def __init__(self, m: Any, kind: str) -> None:
        from flashhead_edge.jetson.cuda_kernels import architecture_of
        from flashhead_edge.jetson.driver import Memory, call
        from flashhead_edge.jetson.nvrtc import find_nvrtc
        from flashhead_edge.jetson.plugin_build import sources

        if kind not in KINDS:
            raise SettingsError(f"dense head: {kind}, expected {' or '.join(KINDS)}; name one of them")
        self.m, self.kind = m, kind
        source = Path(__file__).parent / "dense_rows.cu" if kind == KINDS[0] else sources().kernels / "dense_head.cu"
        nvrtc = find_nvrtc(int(m.facts.cuda_version.split(".")[0]))
        self.code = nvrtc.cubin(source, [], architecture_of(m.facts.capability))[0]
        self.module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self.module), self.code)
        self.workspace = Memory(ROOM)
        self.tiles = -(-m.head.vocab // 16)
        self.columns = _columns(m.head.hidden)
        self.codes = self.scales = None
        if kind == KINDS[1]:
            self.codes, self.scales = Memory(self.tiles * 16 * self.columns), Memory(2 * 16 * self.tiles)
            random = np.random.default_rng(0).integers(1, 255, 1 << 24, np.uint8)
            for at in range(0, self.codes.size, random.size):
                size = min(random.size, self.codes.size - at)
                call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.codes.pointer + at), random.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(size))
            call("cuMemsetD16_v2", ctypes.c_uint64(self.scales.pointer), ctypes.c_ushort(0x1400), ctypes.c_size_t(16 * self.tiles))  # 2^-10 each

    @property
    def name(self) -> str:
        """As records name it."""
        if self.kind == KINDS[1]:
            return "dense int8, one scale a row"
        return "dense bf16" if self.m.program.precision == "bfloat16" else "dense fp16"

    @property
    def bytes(self) -> int:
        """What a launch reads of the head."""
        return 2 * self.m.head.vocab * self.m.head.hidden if self.codes is None else self.tiles * 16 * (self.columns + 2)

    def put(self, rows: int) -> None:
        """Greedy tokens of the first rows' states, where the clustered head would write them."""
        m, head = self.m, self.m.head
        hidden, token, bf16 = m.value(head.node.inputs[0]), m.block("token"), int(m.program.precision == "bfloat16")
        if self.codes is not None and self.scales is not None:
            wide = _wide(CODED_ROWS, rows)
            numbers = (rows, head.hidden, head.vocab, bf16)
            pointers = (self.codes.pointer, self.scales.pointer, hidden, self.workspace.pointer, token, self.workspace.pointer + ROOM // 2 + 64)
            self._launch(f"flashhead_dense_int8_row_{wide}", m.limits.multiprocessors, 512, shared_bytes(self.kind, rows, head.hidden), pointers, numbers)
            return
        wide = _wide(ROWS, rows)
        weights = m.weight(head.node.attributes["rows"])
        shared = shared_bytes(self.kind, rows, head.hidden)
        blocks = m.limits.multiprocessors * min(BLOCKS, max(1, SHARED // shared))
        name = f"dense_{'bf16' if bf16 else 'fp16'}_{wide}"
        self._launch(name, blocks, THREADS, shared, (weights, hidden, self.workspace.pointer), (head.hidden, head.vocab))
        self._launch("dense_token", 1, 32, 0, (self.workspace.pointer, token), (wide,))

    def _launch(self, name: str, blocks: int, threads: int, shared: int, pointers: tuple[Any, ...], numbers: tuple[int, ...]) -> None:
        from flashhead_edge.jetson.driver import call

        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
        if shared > 48 << 10:
            call("cuFuncSetAttribute", function, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        values = [*(ctypes.c_uint64(p) for p in pointers), *(ctypes.c_int(n) for n in numbers)]
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, shared, self.m.stream.value, packed, None)

    def close(self) -> None:
        from flashhead_edge.jetson.driver import library

        for held in (self.workspace, self.codes, self.scales):
            if held is not None:
                held.close()
        if self.module.value:
            library().cuModuleUnload(self.module)
            self.module = ctypes.c_void_p()


def check_dense(m: Any) -> None:
    """Hold the rival in 16 bits against numpy over the same rows, on the state behind a made prompt.

    Raises:
        DeviceError: its token is not the best one, up to the rounding of sums.
    """
    from flashhead_edge.jetson.cuda_backend import Cuda, export_settings
    from flashhead_edge.jetson.cuda_session import fetch
    from flashhead_edge.jetson.tensorrt_engine import to_half

    b = Cuda(m, export_settings(m.program, dict(m.program.settings), "bench"))
    hidden = b.body().feed([1, 2, 3, 4])
    rewind(m, CACHED)
    state = np.ascontiguousarray(to_half(hidden, m.program.precision)).view(np.uint8).reshape(-1)
    m.results.array[: state.size] = state
    m.stream.to_device(m.value(m.head.node.inputs[0]), m.results.pointer, state.size)
    dense = DenseHead(m, KINDS[0])
    try:
        dense.put(1)
        token = int(fetch(m, 1, None)["token"][0])
    finally:
        dense.close()
    logits = b.head.host_logits(hidden, np.arange(m.head.vocab))[0]
    if logits[token] < logits.max() - 1e-3 * np.abs(logits).max():  # 16-bit products summed in float32, in another order than numpy's
        raise DeviceError(
            f"dense head: it names token {token} with a logit of {logits[token]:.4f}, expected {int(logits.argmax())} with {logits.max():.4f}; "
            "do not use this rival, and report the card"
        )


def put_dense_step(m: Any, head: DenseHead, rows: int) -> None:
    """A greedy decode step of the first rows with a dense head, otherwise as the backend's own."""
    from flashhead_edge.jetson.cuda_program import put_step

    put_step(m, rows, False, ("FlashHead", "Advance"))
    head.put(rows)
    put_step(m, rows, False, put_nothing_but_the_end(m))


def put_nothing_but_the_end(m: Any) -> set[str]:
    """What a step leaves out of which only its end shall be left."""
    from flashhead_edge.program import fuse

    return {*(n.op for n in m.program.nodes), fuse.LINEAR, fuse.ATTENTION}
