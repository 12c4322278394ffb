"""What a board does now: clocks, load, temperatures, power, throttling, memory. Standard library only; NVML where no rail is found.

`sample` looks once, `samples` again and again, `recorded` beside a run in a thread of its own; `joules` is what the rails gave between
two points of time, so that a run divides it by its tokens.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flashhead_edge.jetson.board_files import Files

GPU_FOLDERS = (
    "/sys/class/devfreq/17000000.gpu",
    "/sys/class/devfreq/17000000.ga10b",
    "/sys/class/devfreq/gpu-gpc-0",
    "/sys/devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu",
)
GPU_LOADS = ("/sys/devices/platform/bus@0/17000000.gpu/load", "/sys/devices/platform/17000000.gpu/load", "/sys/devices/platform/gpu.0/load")
INA3221 = "/sys/bus/i2c/drivers/ina3221"
EVENTS = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}  # of soctherm_oc
# What the whole draws: the first of these whose rails are all there.
TOTALS = (
    (("VIN",), "the board's input"),
    (("VDD_IN",), "the whole module"),
    (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "the sum of the module's three rails"),  # VDDQ_VDD2_1V8AO is part of VIN_SYS_5V0
    (("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), "the sum of the module's three rails"),
)
DESKTOPS = ("Xorg", "gnome-shell", "Xwayland", "gdm-x-session", "weston", "kwin_wayland", "plasmashell", "xfce4-session", "lxsession")
MANAGERS = ("gdm", "gdm3", "lightdm", "sddm", "display-manager")
BIG = 4 << 20  # bytes: blocks of this size and more are what large allocations are made of


@dataclass(frozen=True)
class Clock:
    """A clock in MHz and the bounds between which its governor moves it."""

    now: float | None
    least: float | None
    most: float | None

    @property
    def locked(self) -> bool | None:
        """Whether it cannot move; None where the bounds are not known."""
        return None if self.least is None or self.most is None else self.least >= self.most


@dataclass(frozen=True)
class Sample:
    """One look. What cannot be read is None or absent, and `unread` says why."""

    at: float  # seconds of a clock that never jumps
    cpu_load: float | None  # share of all CPUs since the sample before; None in the first one
    cpu_clocks: tuple[Clock, ...]  # one a policy
    gpu_load: float | None  # share
    gpu_clock: Clock | None
    memory_clock: Clock | None
    temperatures: dict[str, float]  # degrees Celsius by zone
    rails: dict[str, float]  # watts by label
    power: float | None  # watts of the whole
    power_scope: str | None  # what that whole is
    energy: float | None  # joules that it has drawn, from a beginning of its own; None where only the power is known
    alarms: tuple[str, ...]  # over-current alarms that are on now
    events: dict[str, int]  # since boot, by kind
    throttled: tuple[str, ...]  # cooling devices that hold something back now
    memory_total: int | None  # bytes, as all below
    memory_available: int | None
    own: int | None  # of the process that was named: resident, and what it has in nvmap where that can be read
    nvmap: int | None  # of all processes
    swap_total: int | None
    swap_used: int | None
    big_blocks: int | None  # free memory in blocks of 4 MiB and more
    largest_block: tuple[int, int] | None  # how many, and their size
    gpus: tuple[dict[str, object], ...] = ()  # by NVML
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def locked(self) -> bool | None:
        """Whether the GPU's and all CPUs' clocks are locked (jetson_clocks)."""
        known = [c.locked for c in (*self.cpu_clocks, *([self.gpu_clock] if self.gpu_clock else [])) if c.locked is not None]
        return all(known) if known else None


def sample(root: str | Path = "/", pid: int | None = None, before: CpuTimes | None = None, nvml: bool | None = None) -> Sample:
    """Look once.

    Args:
        root: the file system looked at.
        pid: the process whose share of the memory is asked; None: this one.
        before: the CPUs' times at the sample before.
        nvml: ask NVML too; None: where `root` is this machine's and no GPU was found in its files.
    """
    files = Files(Path(root))
    gpu = next((folder for folder in GPU_FOLDERS if files.exists(folder)), None)
    tegra = gpu is not None or "tegra" in (files.text("/proc/device-tree/compatible", said=False) or "")
    rails = _rails(files) if tegra else {}
    power, scope = total_power(rails)
    energy: float | None = None
    sizes = _meminfo(files)
    gpus: list[dict[str, object]] = []
    if nvml or (nvml is None and str(root) == "/" and (gpu is None or power is None)):
        from flashhead_edge.jetson.board_nvml import read_gpus

        gpus = read_gpus(files.unread)
        if power is None:
            power, energy, scope = _drawn(gpus)
    blocks = _blocks(files)
    return Sample(
        at=time.monotonic(),
        cpu_load=cpu_times(root).since(before) if before is not None else None,
        cpu_clocks=_cpu_clocks(files),
        gpu_load=_gpu_load(files, gpu) if tegra else None,
        gpu_clock=_devfreq(files, gpu) if gpu else None,
        memory_clock=_memory_clock(files) if tegra else None,
        temperatures=_temperatures(files),
        rails=rails,
        power=power,
        power_scope=scope,
        energy=energy,
        alarms=_alarms(files) if tegra else (),
        events=_events(files) if tegra else {},
        throttled=_throttled(files),
        memory_total=sizes.get("MemTotal"),
        memory_available=sizes.get("MemAvailable"),
        own=_own(files, os.getpid() if pid is None else pid),
        nvmap=sizes.get("NvMapMemUsed"),
        swap_total=sizes.get("SwapTotal"),
        swap_used=sizes["SwapTotal"] - sizes["SwapFree"] if {"SwapTotal", "SwapFree"} <= sizes.keys() else None,
        big_blocks=None if blocks is None else sum(n * size for size, n in blocks.items() if size >= BIG),
        largest_block=None if not blocks else (blocks[max(blocks)], max(blocks)),
        gpus=tuple(gpus),
        unread=files.unread,
    )


def samples(root: str | Path = "/", interval: float = 1.0, pid: int | None = None, wait: Callable[[float], object] = time.sleep) -> Iterator[Sample]:
    """Looks for ever, one each `interval` seconds; a look that takes longer delays the next and is not caught up."""
    before, due = None, time.monotonic()
    while True:
        now = cpu_times(root)
        yield sample(root, pid, before)
        before, due = now, max(due + interval, time.monotonic())
        wait(max(0.0, due - time.monotonic()))


@contextmanager
def recorded(root: str | Path = "/", interval: float = 0.2) -> Iterator[list[Sample]]:
    """Samples of what happens inside, taken by a thread: one at the start, one at the end, and one each `interval` seconds."""
    taken: list[Sample] = []
    done = threading.Event()

    def take() -> None:
        for one in samples(root, interval, wait=done.wait):
            taken.append(one)
            if done.is_set():
                return

    taken.append(sample(root))
    thread = threading.Thread(target=take, name="board samples", daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


def joules(taken: Sequence[Sample], start: float, end: float) -> float | None:
    """What was drawn between two points of time (`time.monotonic`): by the counter of energy where there is one, else the power integrated.

    Between samples the lines are straight. NVML's power is a mean over up to a second: of a short run only the counter tells.
    None where nothing tells the power, or samples do not reach from one point to the other.
    """
    counted = [(s.at, s.energy) for s in taken if s.energy is not None]
    if len(counted) >= 2 and counted[0][0] <= start <= end <= counted[-1][0]:
        return _at(counted, end) - _at(counted, start)
    known = [(s.at, s.power) for s in taken if s.power is not None]
    if len(known) < 2 or start > end or known[0][0] > start or known[-1][0] < end:
        return None
    total = 0.0
    for (t0, p0), (t1, p1) in zip(known, known[1:]):
        low, high = max(t0, start), min(t1, end)
        if high > low:
            slope = (p1 - p0) / (t1 - t0)
            total += (high - low) * (p0 + slope * ((low + high) / 2 - t0))
    return total


def _at(points: Sequence[tuple[float, float]], when: float) -> float:
    """The value at a time, on straight lines between points that reach from before it to after it."""
    (t0, v0), (t1, v1) = next((a, b) for a, b in zip(points, points[1:]) if b[0] >= when)
    return v0 + (v1 - v0) * (when - t0) / (t1 - t0) if t1 > t0 else v1


# ---- processor


@dataclass(frozen=True)
class CpuTimes:
    """Ticks of all CPUs since boot."""

    busy: int | None
    all: int | None

    def since(self, before: CpuTimes) -> float | None:
        """Share that was busy since then."""
        if self.busy is None or self.all is None or before.busy is None or before.all is None or self.all <= before.all:
            return None
        return min(1.0, max(0.0, (self.busy - before.busy) / (self.all - before.all)))


def cpu_times(root: str | Path = "/") -> CpuTimes:
    text = Files(Path(root)).text("/proc/stat") or ""
    found = re.search(r"^cpu\s+([\d ]+)$", text, re.MULTILINE)
    ticks = [int(x) for x in found[1].split()][:8] if found else []
    return CpuTimes(sum(ticks) - ticks[3] - ticks[4], sum(ticks)) if len(ticks) >= 5 else CpuTimes(None, None)


def _cpu_clocks(files: Files) -> tuple[Clock, ...]:
    folders = files.names("/sys/devices/system/cpu/cpufreq", "policy*")
    return tuple(
        Clock(*(_scaled(files.number(f"{folder}/scaling_{which}_freq"), 1e3) for which in ("cur", "min", "max"))) for folder in folders
    )  # fmt: skip


def _scaled(value: int | None, by: float) -> float | None:
    return None if value is None else value / by


# ---- GPU and memory clocks


def _devfreq(files: Files, folder: str) -> Clock:
    return Clock(*(_scaled(files.number(f"{folder}/{which}_freq"), 1e6) for which in ("cur", "min", "max")))


def _memory_clock(files: Files) -> Clock | None:
    if files.exists("/sys/class/devfreq/bwmgr"):
        return _devfreq(files, "/sys/class/devfreq/bwmgr")
    rate = files.number("/sys/kernel/debug/bpmp/debug/clk/emc/rate", said=False)  # root only, on Orin
    return None if rate is None else Clock(rate / 1e6, None, None)


def _gpu_load(files: Files, gpu: str | None) -> float | None:
    places = [*([f"{gpu}/device/load"] if gpu else []), *GPU_LOADS]
    for path in places:
        if files.exists(path):
            found = files.number(path)
            return None if found is None else min(1.0, max(0.0, found / 1000))
    files.lost(places[0], "no such file; on Thor NVML has it", True)
    return None


# ---- temperatures, power


def _temperatures(files: Files) -> dict[str, float]:
    found = {}
    for folder in files.names("/sys/class/thermal", "thermal_zone*"):
        name, value = files.text(f"{folder}/type"), files.number(f"{folder}/temp")
        if name is None or value is None:
            continue
        if value <= -200_000 or value == -256:
            files.lost(f"{folder}/temp", f"{value} is no temperature: the zone has no power", True)
            continue
        found[name.removesuffix("-thermal")] = value / 1000
    return found


def _power_chips(files: Files) -> list[str]:
    return files.names(INA3221, "*/hwmon/hwmon*") or [h for h in _hwmon(files) if files.text(f"{h}/name", said=False) == "ina3221"]


def _hwmon(files: Files) -> list[str]:
    return files.names("/sys/class/hwmon", "hwmon*")


def _rails(files: Files) -> dict[str, float]:
    """Watts of each rail: volts times amperes of an INA3221, or what an INA238 says itself."""
    found = {}
    for folder in _power_chips(files):
        for path in files.names(folder, "in*_label"):
            channel = re.search(r"in(\d+)_label$", path)
            label = files.text(path)
            if channel is None or label is None or label == "NC" or "sum" in label:  # not connected; the sum of shunt voltages
                continue
            volts, amperes = files.number(f"{folder}/in{channel[1]}_input"), files.number(f"{folder}/curr{channel[1]}_input")
            if volts is not None and amperes is not None:
                found[label] = volts * amperes / 1e6
    for folder in _hwmon(files):
        if files.text(f"{folder}/name", said=False) == "ina238":
            drawn = files.number(f"{folder}/power1_input")
            if drawn is not None:
                found[files.text(f"{folder}/label", said=False) or "VIN"] = drawn / 1e6
    if not found:
        files.lost(INA3221, "no rail can be read", True)
    return found


def _drawn(gpus: Sequence[Mapping[str, object]]) -> tuple[float | None, float | None, str | None]:
    """Watts and joules of the GPUs that NVML sees, together, and what that is: which of several a process runs on NVML's order does not tell."""
    power, energy = ([value for g in gpus if isinstance(value := g[what], float)] for what in ("power", "energy"))
    if not power:
        return None, None, None
    scope = "the GPU alone, by NVML" if len(gpus) == 1 else f"all {len(gpus)} GPUs, by NVML"
    return sum(power), sum(energy) if len(energy) == len(power) else None, scope


def total_power(rails: Mapping[str, float]) -> tuple[float | None, str | None]:
    """Watts of the whole, and what that whole is."""
    for labels, scope in TOTALS:
        if all(label in rails for label in labels):
            return sum(rails[label] for label in labels), scope
    return None, None


# ---- throttling


def _alarms(files: Files) -> tuple[str, ...]:
    found = []
    for folder in _power_chips(files):
        for path in files.names(folder, "curr*_alarm"):
            match = re.search(r"curr(\d+)_(\w+)_alarm$", path)
            if match and files.number(path):
                label = files.text(f"{folder}/in{match[1]}_label", said=False) or f"channel {match[1]}"
                found.append(f"{label} {match[2]}")
    return tuple(found)


def _events(files: Files) -> dict[str, int]:
    found = {}
    for folder in _hwmon(files):
        if files.text(f"{folder}/name", said=False) == "soctherm_oc":
            for number, name in EVENTS.items():
                count = files.number(f"{folder}/oc{number}_event_cnt", said=False)
                if count is not None:
                    found[name] = count
    return found


def _throttled(files: Files) -> tuple[str, ...]:
    found = []
    for folder in files.names("/sys/class/thermal", "cooling_device*"):
        kind = files.text(f"{folder}/type", said=False) or ""
        if "throttle" in kind and files.number(f"{folder}/cur_state", said=False):
            found.append(kind)
    return tuple(found)


# ---- memory


def _meminfo(files: Files) -> dict[str, int]:
    """Sizes in bytes."""
    text = files.text("/proc/meminfo") or ""
    found = {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s*(\d+) kB", text, re.MULTILINE)}
    if text and "MemTotal" not in found:
        files.lost("/proc/meminfo", "it names no MemTotal", True)
    return found


def _own(files: Files, pid: int) -> int | None:
    status = files.text(f"/proc/{pid}/status", said=False)
    resident = re.search(r"^VmRSS:\s*(\d+) kB", status or "", re.MULTILINE)
    if resident is None:
        return None
    table = files.text("/sys/kernel/debug/nvmap/iovmm/clients", said=False) or ""  # root only
    mapped = re.search(rf"^\S+\s+\S+\s+{pid}\s+(\d+)([KMG]?)", table, re.MULTILINE)
    extra = int(mapped[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[mapped[2]] if mapped else 0
    return (int(resident[1]) << 10) + extra


def _blocks(files: Files) -> dict[int, int] | None:
    """Free blocks of memory by their size in bytes; sizes without any are left out."""
    text = files.text("/proc/buddyinfo")
    if text is None:
        return None
    page, found = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096, dict[int, int]()
    for counts in re.findall(r"^Node\s+\d+,\s+zone\s+\S+\s+([\d ]+)$", text, re.MULTILINE):
        for order, n in enumerate(map(int, counts.split())):
            if n:
                found[page << order] = found.get(page << order, 0) + n
    if not found:
        files.lost("/proc/buddyinfo", "it names no free block", True)
        return None
    return found


# ---- the desktop


def desktop(root: str | Path = "/") -> str | None:
    """What of a desktop session runs, or None."""
    files = Files(Path(root))
    running = {files.text(path, said=False) for path in files.names("/proc", "[0-9]*/comm")}
    found = [name for name in DESKTOPS if name in running]
    found += [f"{m}.service" for m in MANAGERS if files.exists(f"/sys/fs/cgroup/system.slice/{m}.service")]
    return ", ".join(found) or None
