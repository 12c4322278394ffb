"""What board this is: its model, module, L4T, JetPack and power mode, and what is known of each module. Standard library only.

All comes from the device's own files (`board_files`); what changes while it runs is in `board_telemetry`, what it means for the
speed in `board_advice`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flashhead_edge.errors import SettingsError
from flashhead_edge.jetson.board_files import Files

MIB = 1 << 20
UNMEASURED_SHARE = 0.93  # of a module's memory that is MemTotal, where nobody measured it: the least of the measured shares


@dataclass(frozen=True)
class Module:
    """A module, as far as public recordings tell."""

    key: str  # how a person names it: flashhead plan --memory orin-nano-8gb
    title: str
    parts: tuple[str, ...]  # part numbers in /proc/device-tree/compatible
    nominal_gb: int  # GiB that it is sold with
    memory_total: int | None  # MemTotal in bytes, as measured; None: not found in any recording
    source: str  # of memory_total
    bandwidth: float  # GB/s of its memory, as specified
    capability: int  # of its GPU, 87 for 8.7
    multiprocessors: int  # that it has; slow power modes switch some off, two at a time

    @property
    def total(self) -> int:
        """MemTotal in bytes: measured, else predicted from the nominal size."""
        return self.memory_total if self.memory_total is not None else int(UNMEASURED_SHARE * (self.nominal_gb << 30))

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have, opt-in limit."""
        return SHARED_BYTES[self.capability]

    @property
    def cuda(self) -> int:
        """The oldest major version of CUDA that its system brings."""
        return 12 if self.capability == 87 else 13  # Orin: JetPack 6 has CUDA 12, JetPack 7 CUDA 13


NOT_MEASURED = f"not measured: {100 * UNMEASURED_SHARE:.0f} % of its memory, as the Orin Nano 8 GB has"
MODULES = (
    Module("orin-nano-4gb", "Jetson Orin Nano 4 GB", ("p3767-0004",), 4, None, NOT_MEASURED, 34, 87, 4),
    Module("orin-nano-8gb", "Jetson Orin Nano 8 GB", ("p3767-0003", "p3767-0005"), 8, 7620 * MIB,
           "7,620 MB by tegrastats (public logs; 7,607 on L4T 36.5)", 68, 87, 8),
    Module("orin-nx-8gb", "Jetson Orin NX 8 GB", ("p3767-0001",), 8, None, NOT_MEASURED, 102, 87, 8),
    Module("orin-nx-16gb", "Jetson Orin NX 16 GB", ("p3767-0000",), 16, 15656 * MIB, "15,656 MB by tegrastats (logikos33/Recognition)", 102, 87, 8),
    Module("agx-orin-32gb", "Jetson AGX Orin 32 GB", ("p3701-0004",), 32, None, NOT_MEASURED, 205, 87, 14),
    Module("agx-orin-64gb", "Jetson AGX Orin 64 GB", ("p3701-0005",), 64, 62841 * MIB, "62,841 MB by tegrastats (osmosishk/driveragent-agx)", 205, 87, 16),
    Module("agx-thor", "Jetson AGX Thor", ("p3834-0008",), 128, 125772 * MIB, "125,772 MB by tegrastats (public logs of developer kits)", 273, 110, 20),
    Module("dgx-spark", "DGX Spark", (), 128, int(121.6 * (1 << 30)), "121.6 GiB usable (public logs)", 273, 121, 48),
)  # fmt: skip

# Shared memory that a block may have (opt-in), in bytes by capability: CUDA's programming guide, technical specifications.
SHARED_BYTES = {87: 163 << 10, 110: 227 << 10, 121: 99 << 10}

ALSO = {
    "orinnano": "orinnano8gb", "orinnanosuper": "orinnano8gb", "nano": "orinnano8gb", "orinnx": "orinnx16gb", "agxorin": "agxorin64gb", "thor": "agxthor",
}  # fmt: skip

# L4T to JetPack: the longest prefix wins.
JETPACKS = {
    "35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1.1", "35.4": "5.1.2", "35.5": "5.1.3", "35.6": "5.1.4 or newer",
    "36.2": "6.0 (preview)", "36.3": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5": "6.2.2 or newer",
    "38.2": "7.0", "38.4": "7.1", "39": "7.2 or newer",
}  # fmt: skip


@dataclass(frozen=True)
class PowerMode:
    """The power mode: by name, since numbers mean other modes on other boards."""

    number: int
    name: str | None  # None: the configuration has no such number
    modes: Mapping[int, str]  # all of this board

    @property
    def fastest(self) -> tuple[int, str] | None:
        """The mode without caps where there is one (MAXN_SUPER, MAXN), else the one of most watts."""
        ranked = sorted(self.modes.items(), key=lambda item: (_rank(item[1]), -item[0]))
        return ranked[-1] if ranked else None


def _rank(name: str) -> tuple[int, int]:
    watts = re.search(r"(\d+)\s*W", name)
    return (3 if "MAXN_SUPER" in name else 2 if "MAXN" in name else 1 if watts else 0), int(watts[1]) if watts else 0


@dataclass(frozen=True)
class Board:
    """What the device's files say of the board."""

    model: str | None
    compatible: tuple[str, ...]
    module: Module | None  # None: a board that nobody here knows
    tegra: str | None  # such as tegra234; None: no Jetson
    l4t: str | None  # such as 36.4.3
    jetpack: str | None
    power_mode: PowerMode | None
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For a person: the model, or the compatible string of a board that nobody knows."""
        if self.module is None and self.tegra:
            return f"{self.model or 'a Jetson'}: a board that this version does not know (compatible: {', '.join(self.compatible)})"
        return self.model or (self.module.title if self.module else "this machine (no Jetson)")


def read_board(root: str | Path = "/") -> Board:
    """Look at the board. On another machine `tegra` is None and nothing more is looked for."""
    files = Files(Path(root))
    compatible = files.text("/proc/device-tree/compatible", said=False)
    strings = tuple(s for s in re.split(r"[\0\n]+", compatible or "") if s)
    tegra = next((m[1] for s in strings if (m := re.search(r"nvidia,(tegra\d+)", s))), None)
    release = files.text("/etc/nv_tegra_release", said=tegra is not None)
    if tegra is None and release is None:
        return Board(None, strings, None, None, None, None, None)
    if compatible is None:
        files.text("/proc/device-tree/compatible")
    return Board(
        model=files.text("/proc/device-tree/model"),
        compatible=strings,
        module=module_of(strings),
        tegra=tegra or "tegra",
        l4t=(l4t := _l4t(files, release)),
        jetpack=jetpack_of(l4t),
        power_mode=_power_mode(files),
        unread=files.unread,
    )


def module_of(compatible: tuple[str, ...]) -> Module | None:
    """The module of a device tree's compatible strings."""
    parts = {part for text in compatible for part in re.findall(r"p\d{4}-\d{4}", text)}
    return next((m for m in MODULES if parts & set(m.parts)), None)


def module_named(key: str) -> Module | None:
    """The module of a name that a person gives, or None."""
    plain = re.sub(r"[^a-z0-9]", "", key.lower()).removeprefix("jetson")
    plain = ALSO.get(plain, plain)
    return next((m for m in MODULES if m.key.replace("-", "") == plain), None)


def board_named(name: str) -> Module:
    """The module of a name that a person gives, to write or to compile for it on another machine.

    Raises:
        SettingsError: the name is not known.
    """
    module = module_named(name)
    if module is None:
        raise SettingsError(f"board {name}: not known, expected one of {', '.join(m.key for m in MODULES)}; name one of them, or give its GPU's numbers")
    return module


def jetpack_of(l4t: str | None) -> str | None:
    """The JetPack that brings an L4T."""
    fits = [known for known in JETPACKS if l4t is not None and (l4t == known or l4t.startswith(known + "."))]
    return JETPACKS[max(fits, key=len)] if fits else None


def _l4t(files: Files, release: str | None) -> str | None:
    if release is None:
        return None
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", release)
    if found is None:
        files.lost("/etc/nv_tegra_release", f"{release[:40]!r} names no release", True)
        return None
    return f"{found[1]}.{found[2]}"


STATUS, MODES = "/var/lib/nvpmodel/status", "/etc/nvpmodel.conf"


def _power_mode(files: Files) -> PowerMode | None:
    status = files.text(STATUS)
    if status is None:
        return None
    found = re.search(r"pmode:\s*(\d+)", status)
    if found is None:
        files.lost(STATUS, f"{status[:40]!r} names no mode", True)
        return None
    modes = {}
    for line in re.findall(r"<\s*POWER_MODEL\s+([^>]*)>", files.text(MODES) or ""):
        entry = dict(re.findall(r"(\w+)\s*=\s*(\S+)", line))
        if entry.get("ID", "").isdigit() and "NAME" in entry:
            modes[int(entry["ID"])] = entry["NAME"]
    return PowerMode(int(found[1]), modes.get(int(found[1])), modes)
