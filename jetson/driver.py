"""The GPU: device facts, memory, streams and graphs, over the driver's own C interface (libcuda) by ctypes. No package is needed.

All lies in the device's primary context, which torch, TensorRT and pycuda use as well: pointers, streams and arrays of theirs and
ours are good for each other. pycuda, where a user has it, can give its stream (`Stream(device, handle)`) and takes our memory
(`__cuda_array_interface__`); it has no graphs, so that a second way over pycuda would be half a way (docs/architecture.md).
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.errors import DeviceError

LIBRARY = "libcuda.so.1"
ATTRIBUTES = {"multiprocessors": 16, "major": 75, "minor": 76, "shared_bytes": 97}  # CUdevice_attribute
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NOT_READY = 600  # CUDA_ERROR_NOT_READY


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, initialised.

    Raises:
        DeviceError: there is none, or no GPU that it knows.
    """
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"GPU: {LIBRARY} cannot be loaded ({error}), expected NVIDIA's driver; run this on a machine with an NVIDIA GPU, or on another backend"
        ) from error
    code = found.cuInit(0)
    if code:
        raise DeviceError(f"GPU: the driver does not start ({name_of(found, code)}), expected a GPU that it knows; look at nvidia-smi or at the kernel's log")
    return found


def name_of(driver: ctypes.CDLL, code: int) -> str:
    """The driver's name of an error."""
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"


def call(function: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        DeviceError: it fails.
    """
    driver = library()
    if not hasattr(driver, function):
        raise DeviceError(f"GPU: the driver has no {function}, expected one for CUDA 12 or newer; install a newer driver")
    code = getattr(driver, function)(*arguments)
    if code:
        hint = "free memory of the GPU, or use a smaller context or batch" if code == OUT_OF_MEMORY else "look that nothing failed before, and at nvidia-smi"
        raise DeviceError(f"GPU: {function} gives {name_of(driver, code)}, expected success; {hint}")


@dataclass(frozen=True)
class DeviceFacts:
    """What plans, checks and measurements must know of a GPU."""

    name: str
    capability: int  # 87 for 8.7
    multiprocessors: int
    shared_bytes: int  # shared memory that a block may have, opt-in limit
    total_bytes: int
    free_bytes: int
    driver_version: str | None  # such as 580.159; None where the system does not tell
    cuda_version: str  # the newest that the driver runs, such as 13.0


def device_facts(index: int = 0) -> DeviceFacts:
    """The facts of a GPU.

    Raises:
        DeviceError: there is no driver or no such GPU.
    """
    driver = library()
    count, handle, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= index < count.value:
        raise DeviceError(f"GPU {index}: the driver sees {count.value}, expected one of that number; choose another, or look at CUDA_VISIBLE_DEVICES")
    call("cuDeviceGet", ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), handle)
    found = {}
    for what, number in ATTRIBUTES.items():
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        found[what] = value.value
    driver.cuDriverGetVersion(ctypes.byref(version))
    with Device(index) as device:
        free, total = device.memory()
    return DeviceFacts(
        name.value.decode(), 10 * found["major"] + found["minor"], found["multiprocessors"], found["shared_bytes"], total, free,
        driver_version(), f"{version.value // 1000}.{version.value % 1000 // 10}",
    )  # fmt: skip


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the kernel's driver, where the system tells it."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


class Device:
    """The primary context of a GPU, kept while this is open; current in the thread that opened it (`use` makes it current in another)."""

    def __init__(self, index: int = 0) -> None:
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        call("cuDeviceGet", ctypes.byref(handle), index)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.index, self.handle, self.context, self.open = index, handle, context, True
        self.use()

    def use(self) -> None:
        """Make the context current in this thread."""
        call("cuCtxSetCurrent", self.context)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes. On a board that shares its memory, see also MemAvailable."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def close(self) -> None:
        if self.open:
            self.open = False
            library().cuDevicePrimaryCtxRelease_v2(self.handle)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Memory:
    """Bytes on the device, zero at first. Frees itself with `close` or with its last reference."""

    def __init__(self, size: int) -> None:
        pointer = ctypes.c_uint64()
        self.pointer = 0
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        self.pointer, self.size = int(pointer.value), size
        call("cuMemsetD8_v2", ctypes.c_uint64(self.pointer), ctypes.c_ubyte(0), ctypes.c_size_t(max(1, size)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def close(self) -> None:
        if self.pointer:
            library().cuMemFree_v2(ctypes.c_uint64(self.pointer))
            self.pointer = 0

    def __del__(self) -> None:
        self.close()


class Pinned:
    """Bytes of the host that a copy reaches without a detour, as a numpy array of uint8, zero at first."""

    def __init__(self, size: int) -> None:
        pointer = ctypes.c_void_p()
        self.pointer = 0
        call("cuMemAllocHost_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        self._adopt(pointer.value or 0, size)

    def _adopt(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size
        self.array = np.frombuffer((ctypes.c_ubyte * max(1, size)).from_address(self.pointer), np.uint8)[:size]  # type: ignore[call-overload]
        self.array[:] = 0

    def close(self) -> None:
        """Free the bytes: nobody may look at `array` after this."""
        if self.pointer:
            self.array = np.empty(0, np.uint8)
            library().cuMemFreeHost(ctypes.c_void_p(self.pointer))
            self.pointer = 0

    def __del__(self) -> None:
        self.close()


class Stream:
    """A stream of ours, or with a handle somebody else's, such as pycuda's `Stream.handle`."""

    def __init__(self, handle: int | None = None) -> None:
        self.own, self.handle = handle is None, handle or 0
        if self.own:
            made = ctypes.c_void_p()
            call("cuStreamCreate", ctypes.byref(made), NON_BLOCKING)
            self.handle = made.value or 0

    @property
    def value(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.handle)

    def wait(self) -> None:
        """Until all work in it is done."""
        call("cuStreamSynchronize", self.value)

    def finish(self) -> None:
        """As `wait`, where it no longer matters whether the work failed."""
        library().cuStreamSynchronize(self.value)

    def done(self) -> bool:
        """Whether all work in it is done.

        Raises:
            DeviceError: some of it failed.
        """
        code = library().cuStreamQuery(self.value)
        if code not in (0, NOT_READY):
            raise DeviceError(f"GPU: cuStreamQuery gives {name_of(library(), code)}, expected work without errors; look at nvidia-smi, and report this")
        return code == 0

    def to_device(self, target: int, source: int, size: int) -> None:
        call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(size), self.value)

    def to_host(self, target: int, source: int, size: int) -> None:
        call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(target), ctypes.c_uint64(source), ctypes.c_size_t(size), self.value)

    def on_device(self, target: int, source: int, size: int) -> None:
        call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), self.value)

    def fill(self, target: int, size: int, byte: int = 0) -> None:
        call("cuMemsetD8Async", ctypes.c_uint64(target), ctypes.c_ubyte(byte), ctypes.c_size_t(size), self.value)

    @contextmanager
    def captured(self) -> Iterator[Graph]:
        """What is put into the stream in here becomes a graph and is not run. Where that fails, nothing stays half captured."""
        graph = Graph()
        call("cuStreamBeginCapture_v2", self.value, THREAD_LOCAL)
        try:
            yield graph
        except BaseException:
            half = self._end()
            if half is not None:
                library().cuGraphDestroy(half)
            raise
        made = self._end()
        if made is None:
            raise DeviceError("GPU: a capture was spoilt by work that a graph cannot hold, expected none; report this with the engine's versions")
        try:
            count, launch = ctypes.c_size_t(), ctypes.c_void_p()
            call("cuGraphGetNodes", made, None, ctypes.byref(count))
            call("cuGraphInstantiateWithFlags", ctypes.byref(launch), made, ctypes.c_uint64(0))
            graph.nodes, graph.handle = count.value, launch.value or 0
        finally:
            library().cuGraphDestroy(made)

    def _end(self) -> ctypes.c_void_p | None:
        made = ctypes.c_void_p()
        return made if library().cuStreamEndCapture(self.value, ctypes.byref(made)) == 0 and made.value else None

    def close(self) -> None:
        if self.own and self.handle:
            library().cuStreamDestroy_v2(self.value)
            self.handle = 0

    def __del__(self) -> None:
        self.close()


class Graph:
    """A captured piece of work."""

    def __init__(self) -> None:
        self.handle = 0
        self.nodes = 0

    def launch(self, stream: Stream) -> None:
        call("cuGraphLaunch", ctypes.c_void_p(self.handle), stream.value)

    def close(self) -> None:
        if self.handle:
            library().cuGraphExecDestroy(ctypes.c_void_p(self.handle))
            self.handle = 0

    def __del__(self) -> None:
        self.close()


class Timer:
    """Time between two points of a stream. Its events belong to the context, before whose end it is left."""

    def __init__(self) -> None:
        self.events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self.events:
            call("cuEventCreate", ctypes.byref(event), 0)

    def mark(self, stream: Stream, which: int) -> None:
        call("cuEventRecord", self.events[which], stream.value)

    def microseconds(self) -> float:
        """Between mark 0 and mark 1; waits for the second."""
        found = ctypes.c_float()
        call("cuEventSynchronize", self.events[1])
        call("cuEventElapsedTime", ctypes.byref(found), self.events[0], self.events[1])
        return 1e3 * found.value

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        for event in self.events:
            library().cuEventDestroy_v2(event)
