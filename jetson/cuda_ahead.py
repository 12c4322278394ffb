"""Kernels for boards that are not at hand: which a program launches there, and their code, for the installation that `flashhead bundle` makes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.cuda_kernels import ahead_name, architecture_of, cached_codes, kernel_sources, launched_by, write_cached
from flashhead_edge.jetson.cuda_program import dry_pass, head_of
from flashhead_edge.jetson.cuda_session import planned_model
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.jetson.nvrtc import Nvrtc
from flashhead_edge.program.ahead import ahead_folder, name_for
from flashhead_edge.program.file import Program
from flashhead_edge.program.head import Device
from flashhead_edge.progress import Progress, silent


@dataclass(frozen=True)
class Came:
    """What an installation came with."""

    gpus: int  # that there is a program for
    kernels: int
    here: bool  # whether the GPU that is at hand is one of them


def came_with(facts: DeviceFacts | None, base: Path | None = None) -> Came | None:
    """What was made ahead for this installation; None where nothing was.

    Args:
        facts: of the GPU at hand.
        base: where it lies; None: in this environment.
    """
    base = ahead_folder() if base is None else base
    programs = {p.name for p in base.glob("programs/*/program-*.json")}
    here = facts is not None and name_for(Device(facts.multiprocessors, facts.shared_bytes, facts.capability)) in programs
    return Came(len(programs), len(list(base.glob("kernels/*.cubin"))), here) if programs else None


def facts_of(device: Device) -> DeviceFacts:
    """What plans must know of a GPU that is not at hand; its memory is not known.

    Raises:
        EngineError: its capability is not known.
    """
    if device.capability is None:
        raise EngineError("kernels made ahead: the device's capability is not known, expected one such as 87; name the board")
    name = f"a GPU of capability {device.capability / 10} with {device.multiprocessors} multiprocessors"
    return DeviceFacts(name, device.capability, device.multiprocessors, device.shared_bytes, 0, 0, None, "0.0")


def launched_there(program: Program) -> list[str]:
    """The kernels that a program launches on the device that it was made for, by their names in a cubin: for its texts, and for as many as its head takes.

    Raises:
        EngineError: the library of launchers is not in this installation, or refuses.
    """
    models = [planned_model(replace(program, batch=batch), facts_of(program.device)) for batch in sorted({program.batch, len(head_of(program).plans)})]
    return sorted({name for model in models for name in launched_by(functools.partial(dry_pass, model))})


def compile_ahead(programs: Sequence[Program], nvrtc: Nvrtc, folder: Path, progress: Progress = silent) -> int:
    """Write the code of every kernel that some programs launch, one file a kernel and capability, for `cuda_kernels.ready` of another installation.

    Args:
        nvrtc: one whose code the boards' driver loads.
    Returns:
        How many files there are.
    Raises:
        EngineError: the library of launchers is missing, NVRTC does not compile for a capability or refuses a kernel, or a folder cannot be written.
    """
    wanted: dict[int, set[str]] = {}
    for number, program in enumerate(programs):
        progress("looking for the kernels that it launches", number / len(programs))
        wanted.setdefault(facts_of(program.device).capability, set()).update(launched_there(program))
    of, count = kernel_sources(), 0
    for capability, names in wanted.items():
        codes, _ = cached_codes(sorted(names), capability, nvrtc, progress)
        architecture = architecture_of(capability)
        for name, code in codes.items():
            write_cached(folder / ahead_name(name, of[name], architecture), code)
        count += len(codes)
    return count
