"""What an item costs on a device: bytes by default, else a model of the device's bandwidth, operations and launches."""

from __future__ import annotations

from dataclasses import dataclass

from flashhead_edge.codes import Coded, row_bytes, table_bytes
from flashhead_edge.errors import SettingsError


@dataclass(frozen=True)
class Device:
    """Specified figures of a device; prices are in bytes of its memory traffic."""

    name: str
    bandwidth: float  # GB/s
    operations: float  # useful operations that fit in the time of one byte
    launch: float  # microseconds of one more stage: of the exchange between all multiprocessors, in one kernel or between launches


DEVICES = {
    d.name: d
    for d in (
        Device("orin-nano", 68, 20, 6.0),
        Device("orin-nano-super", 102, 20, 6.0),
        Device("agx-orin", 205, 25, 5.0),
        Device("agx-thor", 273, 60, 4.0),
        Device("h100", 3000, 20, 4.0),  # launch: measured, docs/kernels.md
        Device("cpu", 20, 8, 1.0),
    )
}


def device_named(name: str | None) -> Device | None:
    """The device model of that name; None is bytes alone."""
    if name is None:
        return None
    if name not in DEVICES:
        raise SettingsError(f"device model {name}: not known, expected one of {', '.join(DEVICES)}; leave --device out to count bytes alone")
    return DEVICES[name]


def row_operations(coded: Coded) -> int:
    """Operations to decode one row and multiply it: a look-up and an addition a group, two or three a column else."""
    if coded.kind == "product":
        return 2 * coded.data.shape[1]
    return (2 if coded.kind == "float16" else 3) * coded.columns


def row_price(coded: Coded, device: Device | None) -> float:
    """Cost of one row, its own error not counted, in bytes."""
    size = row_bytes(coded)
    return float(size) if device is None else max(size, row_operations(coded) / device.operations)


def table_price(coded: Coded, device: Device | None) -> float:
    """Cost of a code's tables and of one more stage; the look-up table of a codebook is made once a step, by all multiprocessors together: a stage itself."""
    size = float(table_bytes(coded))
    if device is None:
        return size
    made = 2 * 256 * coded.columns / device.operations if coded.kind == "product" else 0.0
    return max(size, made) + (2 if coded.kind == "product" else 1) * device.launch * device.bandwidth * 1e3
