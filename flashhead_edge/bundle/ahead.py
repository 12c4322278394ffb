"""What a checkpoint's first start would make on the board, made here: its programs and kernels for every GPU that the target's boards may have."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_edge.bundle.targets import Target
from flashhead_edge.bundle.wheels import need_pip, said_last
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import EngineError, FlashHeadError, first_line
from flashhead_edge.progress import Progress, silent

if TYPE_CHECKING:
    from flashhead_edge.jetson.nvrtc import Nvrtc


@dataclass(frozen=True)
class Ahead:
    """What was made."""

    devices: tuple[str, ...]  # capability and multiprocessors, such as "8.7 x 16"
    settings: dict[str, Any]  # of the programs: another context is made on the board
    bytes: int
    kernels: int  # that are compiled; 0: the board compiles them
    nvrtc: str | None  # which compiled them
    notes: tuple[str, ...]


def devices_of(target: Target) -> list[Any]:
    """Every GPU that a board of the target may show, as `program.head.Device`, the largest of a capability first.

    A multiprocessor is not switched off alone but with its neighbour (a TPC), and slow power modes do: all even numbers up to the largest module's.
    """
    from flashhead_edge.jetson.board import MODULES, SHARED_BYTES
    from flashhead_edge.program.head import Device

    found = []
    for capability in target.capabilities:
        most = max(m.multiprocessors for m in MODULES if m.capability == capability)
        found += [Device(n, SHARED_BYTES[capability], capability) for n in range(most, 1, -2)]
    return found


def make_ahead(target: Target, checkpoint: Path, base: Path, work: Path, find_links: Sequence[Path] = (), progress: Progress = silent) -> Ahead:
    """Write a checkpoint's programs and kernels below `base`, as an installation has them in its share/flashhead-edge.

    Args:
        work: a folder that NVRTC may be unpacked in.
    Raises:
        CheckpointError, UnsupportedModelError, ExportError, DeviceError: the cuda backend does not run this checkpoint, there as here.
        FlashHeadError: the disk refuses.
    """
    from flashhead_edge.jetson.cuda_ahead import compile_ahead
    from flashhead_edge.jetson.cuda_folder import program_settings
    from flashhead_edge.program.ahead import write_ahead

    settings, notes = program_settings(read_json(checkpoint / "config.json")), []
    programs = write_ahead(base, checkpoint, devices_of(target), **settings, progress=progress)
    count, version = 0, None
    try:
        nvrtc = nvrtc_for(target, work, find_links, progress)
        count = compile_ahead(programs, nvrtc, base / "kernels", progress)
        version = f"{nvrtc.version[0]}.{nvrtc.version[1]}"
    except FlashHeadError as error:  # the board has NVRTC too
        shutil.rmtree(base / "kernels", ignore_errors=True)  # some of them would save little, and be counted by nobody
        notes.append(f"the kernels are not compiled ahead, the first start on the board does it: {first_line(error)}")
    size = sum(p.stat().st_size for p in base.rglob("*") if p.is_file())
    shown = tuple(f"{(p.device.capability or 0) / 10} x {p.device.multiprocessors}" for p in programs)
    return Ahead(shown, settings, size, count, version, (*programs[0].document["notices"], *notes))


def nvrtc_for(target: Target, work: Path, find_links: Sequence[Path] = (), progress: Progress = silent) -> Nvrtc:
    """NVRTC of the version that the target has, running here: this machine's own, or a wheel's.

    A newer one's code may not load in the board's driver.

    Raises:
        FlashHeadError: there is none, nor a wheel of it.
    """
    from packaging.requirements import Requirement

    from flashhead_edge.jetson.nvrtc import Nvrtc, libraries

    wanted = Requirement(target.nvrtc)
    for path in libraries():
        try:
            found = Nvrtc(path)
        except OSError:  # of another machine, or without what it needs: a wheel's will do
            continue
        if wanted.specifier.contains(f"{found.version[0]}.{found.version[1]}"):
            return found
    progress(f"fetching {wanted} for this machine", None)
    need_pip()
    folder = work / "nvrtc"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += [word for path in find_links for word in ("--find-links", str(path))]
    result = subprocess.run([*command, "--", target.nvrtc], capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise EngineError(f"{wanted} for this machine: pip download failed ({said_last(result.stderr.splitlines())}), expected a wheel; check the network")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder)
        (path,) = (p for p in folder.rglob("libnvrtc.so.*") if "alt" not in p.name)
        return Nvrtc(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EngineError(f"{wheels[0].name}: its libnvrtc.so cannot be loaded ({first_line(error)}), expected NVRTC for this machine; try again") from error
