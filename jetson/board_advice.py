"""What holds a board's speed back, and what to type against it. Standard library only.

Each finding stands for itself: where a device file cannot be read the finding says so, and the others are as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashhead_edge.jetson.board import MODES, STATUS, Board, PowerMode, read_board
from flashhead_edge.jetson.board_telemetry import BIG, Clock, Sample, desktop, sample

FRAGMENTED = 36, 4, 7  # L4T from which on a large cudaMalloc fails where memory is in small pieces
ENOUGH_BLOCKS = 0.25  # of the memory that is available, in blocks of 4 MiB and more: below it the memory counts as fragmented
NOISE = 64 << 20  # bytes in swap that hold nothing back


@dataclass(frozen=True)
class Finding:
    """One thing that can hold a board back."""

    name: str  # what is wanted, so that "no" is what holds it back
    good: bool  # it holds nothing back; False also where it cannot be read
    state: str | None  # in a word or two
    detail: str
    remedy: str  # what to type, or what it is good for where nothing is to be done


def held_back(root: str | Path = "/", board: Board | None = None, now: Sample | None = None) -> list[Finding]:
    """What holds a Jetson back; empty on another machine."""
    board = read_board(root) if board is None else board
    if board.tegra is None:
        return []
    now = sample(root, nvml=False) if now is None else now
    return [
        _mode(board.power_mode, board.unread),
        _clocks(now),
        _throttling(now),
        _memory_pieces(board, now),
        _swap(now),
        _desktop(desktop(root), board, now),
        _power(now),
    ]


def _mode(mode: PowerMode | None, unread: dict[str, str]) -> Finding:
    name, why = "fastest power mode", "it caps clocks and cores, and is kept over a reboot"
    lost = {path: reason for path, reason in unread.items() if path in (STATUS, MODES)}
    if mode is None:
        return Finding(name, False, None, _lost(lost), f"{why}; type: sudo nvpmodel -q")
    if mode.name is None:
        reason = _lost(lost) if lost else f"{MODES} has no mode of that number"
        return Finding(
            name,
            False,
            f"number {mode.number}",
            f"its name is not known: {reason}; the number alone means another mode on another board",
            "type: sudo nvpmodel -q",
        )
    fastest = mode.fastest
    if fastest is None or fastest[0] == mode.number:
        return Finding(name, True, mode.name, "the fastest of this board", why)
    return Finding(
        name, False, mode.name, f"the fastest of this board is {fastest[1]}",
        f"{why}; type: sudo nvpmodel -m {fastest[0]}  (by this board's own list; a mode with other cores asks for a reboot, over ssh silently)",
    )  # fmt: skip


def _clocks(now: Sample) -> Finding:
    name, why = "clocks locked", "locked clocks make times steady and first tokens sooner"
    gpu, cpus = now.gpu_clock, now.cpu_clocks
    said = [*([f"GPU {_clock(gpu)}"] if gpu else []), *([f"CPU {_clock(cpus[0])}"] if cpus else [])]
    if now.locked is None:
        return Finding(name, False, None, "; ".join([*said, _lost({p: r for p, r in now.unread.items() if p.endswith("_freq")})]), why)
    if now.locked:
        return Finding(name, True, "locked", ", ".join(said), why)
    return Finding(
        name, False, "not locked", ", ".join(said),
        f"{why}; type: sudo jetson_clocks --store && sudo jetson_clocks  (lost at a reboot, and whenever nvpmodel runs; undo: sudo jetson_clocks --restore)",
    )  # fmt: skip


def _throttling(now: Sample) -> Finding:
    name = "unthrottled"
    hot = max(now.temperatures.items(), key=lambda item: item[1], default=None)
    said = [f"hottest {hot[0]} {hot[1]:.0f} C"] if hot else []
    counted = {kind: n for kind, n in now.events.items() if n}
    said += [f"{n:,} times {kind} since boot" for kind, n in counted.items()]
    if now.throttled or now.alarms:
        what = ", ".join((*now.throttled, *(f"alarm {a}" for a in now.alarms)))
        return Finding(name, False, "now", f"{what}; {', '.join(said)}", "cool the board (fan, heat sink, air), look at its supply; type: sudo nvpmodel -q")
    if not now.temperatures and not now.events and not now.rails:
        return Finding(
            name, False, None, _lost({p: r for p, r in now.unread.items() if "thermal" in p or "ina3221" in p}), "whether heat or current hold it back"
        )
    if counted.keys() & {"under-voltage", "average over-current"}:
        return Finding(name, False, "since boot", ", ".join(said), "each event halves clocks for a moment: take a supply with more current and a shorter cable")
    if counted:
        return Finding(name, True, "short peaks", ", ".join(said), "each halves clocks for about a millisecond; in the fastest mode some are expected")
    return Finding(name, True, None, ", ".join(said), "neither heat nor current hold it back")


def _memory_pieces(board: Board, now: Sample) -> Finding:
    name = "memory in one piece"
    if now.largest_block is None or now.big_blocks is None:
        return Finding(name, False, None, _lost({p: r for p, r in now.unread.items() if "buddyinfo" in p}), "large allocations on the GPU need it")
    count, size = now.largest_block
    said = f"largest free blocks {count:,} x {_mb(size)}, {_mb(now.big_blocks)} in blocks of {_mb(BIG)} and more"
    small = now.memory_available is not None and now.big_blocks < ENOUGH_BLOCKS * now.memory_available
    affected = board.l4t is not None and tuple(int(x) for x in board.l4t.split(".") if x.isdigit()) >= FRAGMENTED
    if small:
        then = f"; on L4T {board.l4t} a large cudaMalloc then fails with memory free (NvMap error 12)" if affected else ""
        return Finding(
            name, False, "fragmented", f"{said}, of {_mb(now.memory_available)} available",
            f"type: sync && echo 3 | sudo tee /proc/sys/vm/drop_caches, then echo 1 | sudo tee /proc/sys/vm/compact_memory; else reboot{then}",
        )  # fmt: skip
    return Finding(name, True, None, said, "large allocations on the GPU need it")


def _swap(now: Sample) -> Finding:
    name = "nothing swapped out"
    if now.swap_total is None or now.swap_used is None:
        return Finding(
            name, False, None, _lost({p: r for p, r in now.unread.items() if "meminfo" in p}), "weights that are swapped out are read again token by token"
        )
    if now.swap_used <= NOISE:
        return Finding(name, True, None, f"{_mb(now.swap_used)} of {_mb(now.swap_total)}", "weights stay in memory")
    return Finding(
        name, False, _mb(now.swap_used), f"of {_mb(now.swap_total)}, with {_mb(now.memory_available)} of memory available",
        "end what needs the memory (flashhead plan says what fits), then type: sudo swapoff -a && sudo swapon -a",
    )  # fmt: skip


def _desktop(running: str | None, board: Board, now: Sample) -> Finding:
    name = "headless"
    if running is None:
        return Finding(name, True, None, "no desktop session among the processes that can be seen", "memory and GPU are the model's")
    return Finding(
        name, False, "running", running,
        "it takes memory and a share of the GPU; type: sudo systemctl set-default multi-user.target && sudo reboot  (back: graphical.target)",
    )  # fmt: skip


def _power(now: Sample) -> Finding:
    name, why = "power rails", "joules per token (flashhead monitor)"
    rails = ", ".join(f"{label} {watts:.2f} W" for label, watts in now.rails.items())
    if now.power is None:
        lost = {p: r for p, r in now.unread.items() if "ina3221" in p or "hwmon" in p}
        return Finding(name, False, None, rails or _lost(lost), why)
    return Finding(name, True, f"{now.power:.2f} W", f"{now.power_scope}; {rails}", why)


def _clock(clock: Clock) -> str:
    known = [f"{x:,.0f}" if x is not None else "?" for x in (clock.least, clock.most, clock.now)]
    return f"{known[1]} MHz" if clock.locked and clock.least == clock.most else f"{known[0]} to {known[1]} MHz, now {known[2]}"


def _lost(unread: dict[str, str]) -> str:
    shown = [f"{path}: {why}" for path, why in unread.items()]
    rest = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"cannot be read: {'; '.join(shown[:3]) or 'no such device files'}{rest}"


def _mb(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):,.0f} MB"
