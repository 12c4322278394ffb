"""Dense heads in the place of the clustered one, in steps of the CUDA backend: what it is measured against. numpy alone.

Two of them: the model's own rows in 16 bits (bench/dense_rows.cu), and random ones in 8 bits with a scale a row (plugins_trt/kernels/dense_head.cu), whose
time does not depend on what they hold.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import cut_for, graph_times
from flashhead_edge.errors import SettingsError

KINDS = ("16 bits", "8 bits")
ROWS = (1, 2, 4, 8)  # states that kernels of 16 bits are compiled for
THREADS, BLOCKS = 256, 4  # of a block; a multiprocessor
SHARED = 200 << 10  # that the states of a multiprocessor's blocks may have together
ROOM = 512  # bytes of either kernel's workspace


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
        self.columns = -(-m.head.hidden // 64) * 64  # dense_head.h: 8 bits, a scale a row
        self.codes = self.scales = None
        if kind == KINDS[1]:
            self.codes, self.scales = Memory(self.tiles * 16 * self.columns), Memory(2 * 16 * self.tiles)
            random = np.random.default_rng(0).integers(1, 255, 1 << 24, np.uint8)
            for at in range(0, self.codes.size, random.size):
                size = min(random.size, self.codes.size - at)
                call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.codes.pointer + at), random.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(size))
            call("cuMemsetD16_v2", ctypes.c_uint64(self.scales.pointer), ctypes.c_ushort(0x1400), ctypes.c_size_t(16 * self.tiles))  # 2^-10 each

    @property
    def bytes(self) -> int:
        """What a launch reads of the head."""
        return 2 * self.m.head.vocab * self.m.head.hidden if self.codes is None else self.tiles * 16 * (self.columns + 2)

    def put(self, rows: int) -> None:
        """Greedy tokens of the first rows' states, where the clustered head would write them."""
        m, head = self.m, self.m.head
        hidden, token, bf16 = m.value(head.node.inputs[0]), m.block("token"), int(m.program.precision == "bfloat16")
        if self.codes is not None and self.scales is not None:
            wide = next(n for n in (8, 16, 32) if n >= rows)
            numbers = (rows, head.hidden, head.vocab, bf16)
            pointers = (self.codes.pointer, self.scales.pointer, hidden, self.workspace.pointer, token, self.workspace.pointer + ROOM // 2 + 64)
            self._launch(f"flashhead_dense_int8_row_{wide}", m.limits.multiprocessors, 512, wide * 2 * (self.columns + 32), pointers, numbers)
            return
        wide = next((n for n in ROWS if n >= rows), 0)
        if not wide:
            raise SettingsError(f"dense head: {rows} rows, expected {ROWS[-1]} at most in 16 bits; time a smaller batch")
        weights = m.weight(head.node.attributes["rows"])
        shared = 4 * wide * head.hidden
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


def dense_steps(m: Any, rows: int, ours: float, body: float) -> dict[str, Any]:
    """A greedy step of some rows with each dense head.

    Args:
        ours: microseconds of the backend's own step; body: of the step without a head.
    Returns:
        By the kind of head: microseconds of the step with their spread, of the head alone, its ratio to ours, what ours saves, and as a share of what the
        dense head adds to a step. Empty where a batch is larger than the rivals take.
    """
    if rows > ROWS[-1]:
        return {}
    found: dict[str, Any] = {}
    for kind in KINDS:
        dense = DenseHead(m, kind)
        try:
            times, alone = graph_times(m, partial(put_dense_step, m, dense, rows)), float(np.median(graph_times(m, partial(dense.put, rows))))
            step = float(np.median(times))
            found[kind] = {
                "microseconds": round(step, 2), "spread": [round(float(times.min()), 2), round(float(times.max()), 2)], "head_alone": round(alone, 2),
                "terabytes_per_second": round(dense.bytes / alone / 1e6, 2), "ratio": round(step / ours, 3), "saved": round(step - ours, 1),
                "share_of_head_gone": round((step - ours) / (step - body), 3) if step > body else None,
            }  # fmt: skip
        finally:
            dense.close()
    return found


def put_dense_step(m: Any, head: DenseHead, rows: int) -> None:
    """A greedy decode step of the first rows with a dense head, otherwise as the backend's own."""
    from flashhead_edge.jetson.cuda_program import put_step

    with cut_for(m, rows):
        put_step(m, rows, False, ("FlashHead", "Advance"))
        head.put(rows)
        put_step(m, rows, False, put_nothing_but_the_end(m))


def put_nothing_but_the_end(m: Any) -> set[str]:
    """What a step leaves out of which only its end shall be left."""
    from flashhead_edge.program import fuse

    return {*(n.op for n in m.program.nodes), fuse.LINEAR, fuse.ATTENTION}
