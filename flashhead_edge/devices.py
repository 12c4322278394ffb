"""What an item costs: bytes by default, else on a device (bandwidth, operations, launches) or in a runtime that unpacks codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashhead_edge.codes import Coded, row_bytes, table_bytes
from flashhead_edge.costs import ERROR_BYTES
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
    )
}


@dataclass(frozen=True)
class Runtime:
    """A runtime whose operators read a byte a column, whatever the code's width: nanoseconds of items and of their columns, measured.

    One matrix of all centroids is multiplied far faster than blocks that are gathered first, and those faster than rows:
    that is why clusters are small and codes few here, and why a code's columns are counted and not its bits.
    """

    name: str
    turned: float  # of a weight of the rotation, a column times an entry of a hidden state
    centroid: tuple[float, float]  # of a cluster, and of each of its columns
    first: tuple[float, float]  # of a slot in an opened cluster
    later: tuple[float, float]  # of a row that a later code scores
    exact: tuple[float, float]  # of a row that is scored exactly
    stage: float  # of the operators of one more code
    bandwidth: float = 1.0  # prices are in nanoseconds: a byte that takes one


RUNTIMES = {"onnxruntime": Runtime("onnxruntime", 0.05, (12, 0.05), (30, 0.25), (60, 0.35), (100, 0.6), 40e3)}  # docs/onnx.md
Priced = Device | Runtime | None


def device_named(name: str | None) -> Priced:
    """The device or runtime of that name; None is bytes alone."""
    if name is None:
        return None
    known = DEVICES | RUNTIMES
    if name not in known:
        raise SettingsError(f"device model {name}: not known, expected one of {', '.join(known)}; leave --device out to count bytes alone")
    return known[name]


def prices(rotation: Coded, centroids: Coded, rows: Sequence[Coded], row_size: int, priced: Priced) -> tuple[float, list[float]]:
    """What a step costs whatever opens, and what a slot of each code and an exact row cost: in bytes, or a runtime's nanoseconds.

    Args:
        row_size: bytes of an exact row, its token id included.
    """
    if isinstance(priced, Runtime):
        d = rotation.n

        def item(price: tuple[float, float], columns: int) -> float:
            return price[0] + price[1] * columns

        fixed = priced.turned * d * rotation.columns + centroids.n * item(priced.centroid, centroids.columns) + priced.stage * len(rows)
        return fixed, [item(priced.later if i else priced.first, code.columns) for i, code in enumerate(rows)] + [item(priced.exact, d)]
    fixed = 4 * rotation.n + rotation.n * row_price(rotation, priced) + centroids.n * (row_price(centroids, priced) + ERROR_BYTES)
    fixed += sum(table_price(c, priced) for c in (rotation, centroids, *rows))
    return fixed, [row_price(c, priced) + ERROR_BYTES for c in rows] + [float(row_size)]


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
