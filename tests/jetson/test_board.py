"""Boards from recorded trees (tests/jetson/boards, each with its SOURCE), and from trees in which a device file fails."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashhead_edge import doctor
from flashhead_edge.jetson.board import JETPACKS, MODULES, jetpack_of, module_named, read_board
from flashhead_edge.jetson.board_advice import held_back
from flashhead_edge.jetson.board_files import Files
from flashhead_edge.jetson.board_monitor import look, looks
from flashhead_edge.jetson.board_nvml import read_gpus
from flashhead_edge.jetson.board_telemetry import TOTALS, CpuTimes, Sample, cpu_times, desktop, joules, recorded, sample, samples, total_power

BOARDS = Path(__file__).parent / "boards"
NAMES = sorted(p.name for p in BOARDS.iterdir() if p.is_dir())
INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy of the Orin Nano's tree, to be damaged."""
    return Path(shutil.copytree(BOARDS / "orin-nano", tmp_path / "nano"))


def write(root: Path, path: str, text: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
    return root


def finding(root: Path, name: str):
    return next(f for f in held_back(root) if f.name == name)


# ---- what the trees say


@pytest.mark.parametrize("name", NAMES)
def test_every_tree_names_its_sources(name):
    source = (BOARDS / name / "SOURCE").read_text()
    assert all(line.count("/") >= 1 and " " in line for line in source.splitlines())
    assert "Left out" in (BOARDS / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "module", "l4t", "jetpack", "mode", "fastest"),
    [
        ("orin-nano", "orin-nano-8gb", "36.4.4", "6.2.1", "MAXN_SUPER", (2, "MAXN_SUPER")),
        ("orin-nx", "orin-nx-16gb", "36.5.0", "6.2.2 or newer", "40W", (0, "MAXN_SUPER")),
        ("agx-orin", "agx-orin-64gb", "36.4.7", "6.2.1", "MAXN", (0, "MAXN")),
        ("agx-thor", "agx-thor", "38.2.0", "7.0", "120W", (0, "MAXN")),
    ],
)
def test_boards_are_known_and_modes_are_named(name, module, l4t, jetpack, mode, fastest):
    board = read_board(BOARDS / name)
    assert board.module is not None and board.module.key == module
    assert (board.l4t, board.jetpack) == (l4t, jetpack)
    assert board.power_mode is not None
    assert (board.power_mode.name, board.power_mode.fastest) == (mode, fastest)
    assert board.unread == {}


@pytest.mark.parametrize(
    ("name", "power", "scope"),
    [
        ("orin-nano", 5.016 * 1.5, "the whole module"),
        ("orin-nx", 5.160 * 1.01, "the whole module"),
        ("agx-orin", 0.843 * 6.170 + 0.780 * 3.437 + 4.968 * 0.953, "the sum of the module's three rails"),  # VDDQ is part of VIN_SYS_5V0
        ("agx-thor", 20.986, "the board's input"),
    ],
)
def test_power_of_each_family(name, power, scope):
    found = sample(BOARDS / name)
    assert found.power == pytest.approx(power)
    assert found.power_scope == scope
    assert not {"NC", "sum of shunt voltages"} & found.rails.keys()


def test_samples_of_a_nano():
    found = sample(BOARDS / "orin-nano")
    assert found.gpu_clock is not None and (found.gpu_clock.now, found.gpu_clock.locked, found.locked) == (1020.0, True, True)
    assert [c.now for c in found.cpu_clocks] == [1728.0, 1728.0]
    assert found.temperatures == {"tj": 50.0}
    assert found.events == {"under-voltage": 0, "average over-current": 0, "instantaneous over-current": 27390}
    assert found.alarms == () == found.throttled
    assert found.rails == {"VDD_IN": pytest.approx(7.524)}
    assert found.unread["/sys/class/thermal/thermal_zone2/temp"] == "no such file"


def test_samples_of_the_others():
    nx, agx, thor = (sample(BOARDS / name) for name in ("orin-nx", "agx-orin", "agx-thor"))
    assert (nx.gpu_load, nx.locked, nx.memory_total) == (0.0, False, 15656 << 20)
    assert nx.memory_available == (15656 - 1224) << 20 and nx.swap_used == 0
    assert len(nx.temperatures) == 9 and nx.temperatures["cv0"] == 41.156
    assert agx.gpu_load == 0.0 and agx.locked is None and agx.gpu_clock is None
    assert desktop(BOARDS / "agx-orin") == "gdm.service" and desktop(BOARDS / "orin-nx") is None
    assert thor.gpu_clock is not None and (thor.gpu_clock.now, thor.gpu_clock.least, thor.gpu_clock.most) == (315.0, None, 1575.0)
    assert thor.gpu_load is None and "on Thor NVML has it" in thor.unread["/sys/class/devfreq/gpu-gpc-0/device/load"]


# ---- what holds a board back, and what to type


def test_what_holds_back_is_said_with_what_to_type():
    mode, clocks = finding(BOARDS / "orin-nx", "fastest power mode"), finding(BOARDS / "orin-nx", "clocks locked")
    assert (mode.good, mode.state, mode.detail) == (False, "40W", "the fastest of this board is MAXN_SUPER")
    assert "sudo nvpmodel -m 0" in mode.remedy
    assert (clocks.good, clocks.state) == (False, "not locked")
    assert "GPU 306 to 1,173 MHz, now 306" in clocks.detail and "sudo jetson_clocks" in clocks.remedy
    assert finding(BOARDS / "orin-nano", "clocks locked").state == "locked"
    assert finding(BOARDS / "agx-thor", "fastest power mode").remedy.startswith("it caps clocks and cores, and is kept over a reboot; type: sudo nvpmodel -m 0")
    assert finding(BOARDS / "agx-orin", "headless").detail == "gdm.service"


def test_the_number_of_the_fastest_mode_is_this_board_s_own(nano):
    """On an Orin Nano Super number 0 is the slow 15W: the number is never taken from another board."""
    write(nano, "var/lib/nvpmodel/status", "pmode:0000 fmode:quiet")
    mode = finding(nano, "fastest power mode")
    assert (mode.good, mode.state) == (False, "15W")
    assert "sudo nvpmodel -m 2 " in mode.remedy


def test_a_mode_without_a_name_is_not_guessed(nano):
    (nano / "etc/nvpmodel.conf").unlink()
    mode = finding(nano, "fastest power mode")
    assert (mode.good, mode.state) == (False, "number 2")
    assert "its name is not known: cannot be read: /etc/nvpmodel.conf: no such file" in mode.detail


@pytest.mark.parametrize(("modes", "fastest"), [("15W 30W 50W", "50W"), ("15W MAXN 50W", "MAXN"), ("MODE_15W_6CORE MODE_10W_2CORE", "MODE_15W_6CORE")])
def test_the_fastest_mode_is_found_by_name(nano, modes, fastest):
    write(nano, "etc/nvpmodel.conf", "\n".join(f"< POWER_MODEL ID={i} NAME={n} >" for i, n in enumerate(modes.split())))
    found = read_board(nano).power_mode
    assert found is not None and found.fastest is not None and found.fastest[1] == fastest


def test_fragments_swap_and_desktop_are_found(nano):
    """A made /proc: no source records one that is fragmented with its L4T."""
    write(nano, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.7, GCID: 1")
    write(nano, "proc/meminfo", "MemTotal: 7802736 kB\nMemAvailable: 6245596 kB\nSwapTotal: 3901344 kB\nSwapFree: 3608100 kB")
    write(nano, "proc/buddyinfo", "Node 0, zone      DMA  100 200 300 0 0 0 0 0 0 0 1\nNode 0, zone   Normal  9 8 7 6 5 4 3 2 1 0 2")
    write(nano, "proc/3189/comm", "Xorg")
    write(nano, "proc/3403/comm", "gnome-shell")
    pieces, swap = finding(nano, "memory in one piece"), finding(nano, "nothing swapped out")
    page = os.sysconf("SC_PAGE_SIZE")
    assert sample(nano).largest_block == (3, page << 10)
    assert (pieces.good, pieces.state) == (False, "fragmented")
    assert "drop_caches" in pieces.remedy and "on L4T 36.4.7 a large cudaMalloc then fails" in pieces.remedy
    assert (swap.good, swap.state) == (False, "286 MB")
    assert finding(nano, "headless").detail == "Xorg, gnome-shell"
    write(nano, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.4")
    assert "cudaMalloc" not in finding(nano, "memory in one piece").remedy


def test_throttling_is_told_apart(nano):
    assert (finding(nano, "unthrottled").good, finding(nano, "unthrottled").state) == (True, "short peaks")
    write(nano, "sys/class/hwmon/hwmon3/oc1_event_cnt", "4")
    assert finding(nano, "unthrottled").state == "since boot"
    write(nano, "sys/class/thermal/cooling_device9/type", "gpu-throttle-alert")
    write(nano, "sys/class/thermal/cooling_device9/cur_state", "1")
    write(nano, f"{INA}/curr1_crit_alarm", "1")
    found = finding(nano, "unthrottled")
    assert (found.good, found.state) == (False, "now")
    assert found.detail.startswith("gpu-throttle-alert, alarm VDD_IN crit; hottest tj 50 C")


def test_doctor_has_the_facts(nano):
    facts = doctor.board(nano)
    assert [f.name for f in facts] == [
        "fastest power mode",
        "clocks locked",
        "unthrottled",
        "memory in one piece",
        "nothing swapped out",
        "headless",
        "power rails",
    ]
    assert all(f.enables and f.detail for f in facts)
    assert doctor.board(nano / "etc") == []


# ---- device files that fail


FILES = sorted({p.relative_to(BOARDS / "orin-nx").as_posix() for p in (BOARDS / "orin-nx").rglob("*") if p.is_file()} - {"SOURCE", "README.md"})


@pytest.mark.parametrize("damage", ["missing", "empty", "odd", "folder", "binary"])
@pytest.mark.parametrize("path", FILES)
def test_a_device_file_that_fails_ends_nothing(tmp_path, path, damage):
    root = Path(shutil.copytree(BOARDS / "orin-nx", tmp_path / "nx"))
    file = root / path
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "odd": b"0x1g, or nothing\n", "binary": bytes(range(256))}[damage])
    read_board(root), list(held_back(root))
    document = look(read_board(root), sample(root), None)
    json.dumps(document, allow_nan=False)
    if path.endswith(("_freq", "_input", "load")) and damage in ("empty", "odd"):
        assert document["unread"]["/" + path] in ("the file is empty", "'0x1g, or nothing' is no whole number")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_is_denied_is_said(nano):
    (nano / "var/lib/nvpmodel/status").chmod(0)
    assert "permission denied" in finding(nano, "fastest power mode").detail


@pytest.mark.parametrize(
    ("number", "words"), [(13, "permission denied"), (11, "the device gives no value now (EAGAIN), as when it has no power"), (5, "Input/output error")]
)
def test_what_the_kernel_answers_is_said(nano, monkeypatch, number, words):
    """EACCES, EAGAIN and EIO, from the read itself."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    files = Files(nano)
    monkeypatch.setattr(os, "read", refuse)
    assert files.text("/etc/nvpmodel.conf") is None
    assert files.unread == {"/etc/nvpmodel.conf": words}
    assert files.why("/etc/nvpmodel.conf") == f"cannot be read: /etc/nvpmodel.conf: {words}"


def test_a_zone_without_power_is_no_temperature(nano):
    write(nano, "sys/class/thermal/thermal_zone2/temp", "-256000")
    found = sample(nano)
    assert found.temperatures == {"tj": 50.0}
    assert "the zone has no power" in found.unread["/sys/class/thermal/thermal_zone2/temp"]


def test_a_board_that_nobody_knows_is_said_with_its_compatible_string(nano):
    write(nano, "proc/device-tree/compatible", "nvidia,p9999-0000+p8888-0001\0nvidia,tegra999\0")
    board = read_board(nano)
    assert board.module is None
    assert "a board that this version does not know (compatible: nvidia,p9999-0000+p8888-0001, nvidia,tegra999)" in board.title
    assert "nvidia,tegra999" in (doctor.jetson(nano).detail or "")
    assert sample(nano).power == pytest.approx(7.524)  # what it has is read all the same


def test_another_machine_has_no_findings(tmp_path):
    write(tmp_path, "proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712")
    assert held_back(tmp_path) == []
    assert read_board(tmp_path).tegra is None


# ---- numbers


def test_jetpacks_and_names():
    assert [jetpack_of(x) for x in ("36.4.3", "36.4.7", "36.4.9", "39.2.1", None)] == ["6.2", "6.2.1", None, "7.2 or newer", None]
    assert all(k == str(k) and v for k, v in JETPACKS.items())
    assert {module_named(m.key) for m in MODULES} == set(MODULES)
    assert module_named("Orin Nano") is module_named("orin-nano-8gb") and module_named("Thor") is not None and module_named("potato") is None


def test_totals_are_in_order_and_rails_that_miss_are_not_guessed():
    assert total_power({"VDD_GPU_SOC": 1.0, "VDD_CPU_CV": 2.0}) == (None, None)
    assert TOTALS[0][0] == ("VIN",)


def made(at: float, power: float | None) -> Sample:
    blank = dict.fromkeys(Sample.__dataclass_fields__)
    return Sample(**{**blank, "at": at, "power": power, "cpu_clocks": (), "gpus": (), "unread": {}})  # type: ignore[arg-type]


def test_joules_between_two_points_of_time():
    line = [made(0, 10.0), made(1, 20.0), made(2, None), made(3, 20.0)]
    assert joules(line, 0, 1) == pytest.approx(15)
    assert joules(line, 0, 3) == pytest.approx(55)
    assert joules(line, 0.5, 1) == pytest.approx(0.5 * (15 + 20) / 2)
    assert joules(line, 0, 4) is None and joules(line[:1], 0, 0) is None and joules([made(0, None)] * 3, 0, 0) is None


def test_joules_by_the_counter_where_there_is_one():
    counted = [replace(made(at, 5.0), energy=energy) for at, energy in ((0, 7.0), (1, 17.0), (1, 17.0), (3, 17.0))]
    assert joules(counted, 0.5, 1) == pytest.approx(5) and joules(counted, 0.5, 3) == pytest.approx(5) and joules(counted, 1, 1) == 0
    assert joules(counted, 0, 0) == 0 and joules(counted, 0, 4) is None
    assert joules([counted[0], made(3, 5.0)], 0, 3) == pytest.approx(15)  # one look at it is none


def test_samples_beside_a_run_give_its_joules():
    with recorded(BOARDS / "orin-nano", interval=0.02) as taken:
        start = time.monotonic()
        time.sleep(0.1)
        end = time.monotonic()
    assert len(taken) >= 4
    assert joules(taken, start, end) == pytest.approx(7.524 * (end - start))


def test_cpu_load_is_a_share_of_what_passed(tmp_path):
    write(tmp_path, "proc/stat", "cpu  100 0 100 700 100 0 0 0 0 0")
    first = cpu_times(tmp_path)
    write(tmp_path, "proc/stat", "cpu  150 0 150 780 120 0 0 0 0 0")
    assert cpu_times(tmp_path).since(first) == pytest.approx(0.5)
    assert CpuTimes(None, None).since(first) is None and first.since(first) is None


def test_own_share_is_resident_and_nvmap(nano):
    write(nano, "proc/42/status", "Name:\tx\nVmRSS:\t  1000 kB")
    assert sample(nano, pid=42).own == 1000 << 10
    write(nano, "sys/kernel/debug/nvmap/iovmm/clients", "CLIENT  PROCESS  PID  SIZE\nuser  flashhead  42  2048K\nuser  flashhead  421  9K\ntotal 1K")
    assert sample(nano, pid=42).own == (1000 + 2048) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_is_looked_at_too():
    stream = samples(interval=0.01)
    first, second = next(stream), next(stream)
    assert first.memory_total and first.own and first.cpu_load is None
    assert second.at > first.at
    assert second.cpu_load is None or 0 <= second.cpu_load <= 1


# ---- NVML


class NVMLError(Exception):
    pass


def fake_nvml(**answers):
    def no(*_):
        raise NVMLError("Not Supported")

    calls = dict.fromkeys(
        (
            "nvmlDeviceGetName",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetClockInfo",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetEnforcedPowerLimit",
        ),
        no,
    )
    calls |= dict.fromkeys(("nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetTemperature"), no)
    calls |= {"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda i: i}
    return SimpleNamespace(NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, **(calls | answers))


def test_nvml_tells_what_it_has_and_says_what_it_has_not(monkeypatch):
    """As GB10 answers: load and power, no memory."""
    module = fake_nvml(
        nvmlDeviceGetName=lambda h: b"NVIDIA GB10",
        nvmlDeviceGetUtilizationRates=lambda h: SimpleNamespace(gpu=37, memory=0),
        nvmlDeviceGetPowerUsage=lambda h: 12500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    unread = {}
    (gpu,) = read_gpus(unread)
    assert (gpu["name"], gpu["load"], gpu["power"], gpu["memory_free"]) == ("NVIDIA GB10", 0.37, 12.5, None)
    assert unread["NVML, GPU 0, memory"] == "cannot be read: Not Supported"
    found = sample(BOARDS / "agx-thor", nvml=True)
    assert found.power == pytest.approx(20.986)  # a rail of the whole stands before the GPU alone
    assert found.gpus[0]["load"] == 0.37


def test_power_and_energy_by_nvml(monkeypatch):
    """Of one GPU it is that one's; of several all of theirs, and said so."""
    module = fake_nvml(nvmlDeviceGetPowerUsage=lambda h: 70_000 + h, nvmlDeviceGetTotalEnergyConsumption=lambda h: 5_000 + h)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    nothing = BOARDS / "no-such-board"
    found = sample(nothing, nvml=True)
    assert (found.power, found.energy, found.power_scope) == (70.0, 5.0, "the GPU alone, by NVML")
    module.nvmlDeviceGetCount = lambda: 2
    found = sample(nothing, nvml=True)
    assert (found.power, found.energy, found.power_scope) == (pytest.approx(140.001), pytest.approx(10.001), "all 2 GPUs, by NVML")
    module.nvmlDeviceGetTotalEnergyConsumption = lambda h: 5_000 if h else fake_nvml().nvmlDeviceGetName()
    assert sample(nothing, nvml=True).energy is None  # of one of two would be too little
    rails = sample(BOARDS / "agx-thor", nvml=True)
    assert rails.energy is None and rails.power == pytest.approx(20.986)  # the counter is the GPU's alone


def test_bandwidth_by_nvml(monkeypatch):
    """Two transfers a clock over the bus: an H100's 2,619 MHz and 5,120 bits are the 3,352 GB/s of its data sheet."""
    module = fake_nvml(nvmlDeviceGetMaxClockInfo=lambda h, kind: {1: 1980, 2: 2619}[kind], nvmlDeviceGetMemoryBusWidth=lambda h: 5120)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    (gpu,) = read_gpus({})
    assert gpu["bandwidth"] == pytest.approx(3352.3, abs=0.1) and gpu["most_clock"] == 1980


def test_nvml_that_is_missing_or_fails_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    unread = {}
    assert read_gpus(unread) == []
    assert "pip install nvidia-ml-py" in unread["NVML"]

    def fails():
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=fails))
    assert read_gpus(unread) == []
    assert unread["NVML"] == "cannot be read: Driver Not Loaded"


def test_memory_of_zero_is_no_memory(monkeypatch):
    """Orin's NVML answers zeros as if they were values."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=0, free=0)))
    (gpu,) = read_gpus({})
    assert gpu["memory_total"] is None is gpu["memory_free"]


def test_looks_are_one_document_each():
    stream = looks(BOARDS / "orin-nano", interval=0.01)
    first, second = next(stream), next(stream)
    assert (first["board"], first["power_mode"], first["clocks_locked"]) == (first["board"], "MAXN_SUPER", True)
    assert first["joules"] == 0.0 < second["joules"]
    assert math.isfinite(second["joules"])
    json.dumps(second, allow_nan=False)
