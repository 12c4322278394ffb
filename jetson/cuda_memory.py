"""Device memory of a model as one range of addresses, and how a file gets there: pieces of physical memory behind one reservation, filled through two pinned
buffers, so that nothing is held twice and no single allocation is large.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashhead_edge.errors import CheckpointError, DeviceError
from flashhead_edge.jetson.driver import OUT_OF_MEMORY, Device, Pinned, Stream, call, library, name_of

VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
PINNED_TYPE, ON_DEVICE, READ_WRITE = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE
MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP
PIECE = 128 << 20  # bytes of physical memory asked for at once
BUFFER = 16 << 20  # bytes of each of the two pinned buffers
UNIT = 2 << 20  # bytes in which GPUs give physical memory; `Range` asks the one at hand
ALIGNMENT = 256  # bytes: where whatever lies in a range begins
U64 = ctypes.c_uint64


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Kind(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", Location), ("windows", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8),
    ]  # fmt: skip


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class Range:
    """Bytes of the device under consecutive addresses; what is in them is not said. Frees itself with `close` or with its last reference.

    Raises:
        DeviceError: there is not so much memory; nothing of it stays allocated.
    """

    def __init__(self, device: Device, size: int, piece: int = PIECE) -> None:
        self.pointer, self.size, self.reserved = 0, size, 0
        self.pieces: list[tuple[int, int]] = []  # handle and bytes of each
        supported = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(supported), VIRTUAL_MEMORY, device.handle)
        self.virtual = bool(supported.value)
        try:
            if self.virtual:
                self._reserve(device, piece)
            else:
                pointer = U64()
                call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
                self.pointer = int(pointer.value)
        except DeviceError:
            self.close()
            raise

    def _reserve(self, device: Device, piece: int) -> None:
        place = Location(ON_DEVICE, device.index)
        kind, unit, pointer = Kind(type=PINNED_TYPE, location=place), ctypes.c_size_t(), U64()
        call("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(kind), 0)
        whole = -(-max(1, self.size) // unit.value) * unit.value
        piece = max(unit.value, piece // unit.value * unit.value)
        call("cuMemAddressReserve", ctypes.byref(pointer), ctypes.c_size_t(whole), ctypes.c_size_t(0), U64(0), U64(0))
        self.pointer, self.reserved = int(pointer.value), whole
        for at in range(0, whole, piece):
            handle, bytes_ = U64(), min(piece, whole - at)
            call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(bytes_), ctypes.byref(kind), U64(0))
            try:
                call("cuMemMap", U64(self.pointer + at), ctypes.c_size_t(bytes_), ctypes.c_size_t(0), handle, U64(0))
            except DeviceError:
                library().cuMemRelease(handle)
                raise
            self.pieces.append((int(handle.value), bytes_))
        access = Access(place, READ_WRITE)
        call("cuMemSetAccess", U64(self.pointer), ctypes.c_size_t(whole), ctypes.byref(access), ctypes.c_size_t(1))

    def close(self) -> None:
        """Free the bytes; harmless when called twice."""
        if not self.pointer:
            return
        if self.virtual:
            at = self.pointer
            for handle, size in self.pieces:
                library().cuMemUnmap(U64(at), ctypes.c_size_t(size))
                library().cuMemRelease(U64(handle))
                at += size
            library().cuMemAddressFree(U64(self.pointer), ctypes.c_size_t(self.reserved))
        else:
            library().cuMemFree_v2(U64(self.pointer))
        self.pointer, self.pieces = 0, []

    def __del__(self) -> None:
        if getattr(self, "pointer", 0):
            self.close()


class Mailbox(Pinned):  # type: ignore[misc]
    """Pinned bytes of the host that the device writes under an address of its own, `device`; zero at first."""

    def __init__(self, size: int) -> None:
        pointer, theirs = ctypes.c_void_p(), U64()
        code = library().cuMemHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(max(1, size)), MAPPED)
        self.pointer = 0
        if code:
            hint = "free memory" if code == OUT_OF_MEMORY else "look at nvidia-smi"
            raise DeviceError(f"GPU: cuMemHostAlloc gives {name_of(library(), code)}, expected {size:,} bytes of the host that the GPU can write; {hint}")
        self._adopt(pointer.value or 0, size)
        try:
            call("cuMemHostGetDevicePointer_v2", ctypes.byref(theirs), pointer, 0)
        except DeviceError:
            self.close()
            raise
        self.device = int(theirs.value)


def device_bytes(size: int) -> int:
    """What a range of so many bytes takes of a device."""
    return -(-max(1, size) // UNIT) * UNIT


def laid_out(sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """Where things of these sizes lie one behind the other, and where the next one would."""
    found, at = {}, start
    for name, size in sizes.items():
        found[name] = at
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return found, at


def fill(stream: Stream, targets: Mapping[str, int], path: Path, places: Mapping[str, tuple[int, int]], buffer: int = BUFFER) -> None:
    """Copy tensors of a file to the device. Waits until they are there.

    Args:
        targets: addresses on the device.
        places: bytes before each tensor in the file, and of it.
    Raises:
        CheckpointError: the file ends before a tensor does.
    """
    halves: list[Pinned] = []
    fences: list[Fence] = []
    try:
        for _ in range(2):
            halves.append(Pinned(min(buffer, max((size for _, size in places.values()), default=1))))
            fences.append(Fence())
        with path.open("rb", buffering=0) as file:
            for number, (name, at, offset, size) in enumerate(_cut(places, halves[0].size)):
                half, fence = halves[number % 2], fences[number % 2]
                fence.wait()  # until the copy before last has left the buffer
                file.seek(offset)
                _read(file, half.array[:size], path, name)
                stream.to_device(targets[name] + at, half.pointer, size)
                fence.mark(stream)
        stream.wait()
    finally:
        for held in (*fences, *halves):
            held.close()


def _cut(places: Mapping[str, tuple[int, int]], most: int) -> Iterable[tuple[str, int, int, int]]:
    """Tensor, bytes into it, place in the file and bytes of each copy."""
    for name, (offset, size) in places.items():
        for at in range(0, size, most):
            yield name, at, offset + at, min(most, size - at)


def _read(file: Any, target: Any, path: Path, name: str) -> None:
    view, done = memoryview(target), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{path}: the file ends within {name}, expected {len(view) - done:,} bytes more; restore the file")
        done += count


class Fence:
    """A point of a stream that the host can wait for."""

    def __init__(self) -> None:
        self.event, self.marked = ctypes.c_void_p(), False
        call("cuEventCreate", ctypes.byref(self.event), 2)  # CU_EVENT_DISABLE_TIMING

    def mark(self, stream: Stream) -> None:
        call("cuEventRecord", self.event, stream.value)
        self.marked = True

    def wait(self) -> None:
        if self.marked:
            call("cuEventSynchronize", self.event)

    def close(self) -> None:
        if self.event.value:
            library().cuEventDestroy_v2(self.event)
            self.event = ctypes.c_void_p()
