"""Programs made on another machine, for devices that are not at hand: `flashhead bundle` writes them, a backend finds them beside its installation. numpy only.

One folder a checkpoint and settings: a file of weights, which no device changes, and the nodes once for each device, named by its facts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import write_file
from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.kernels.packing import STATIC_SHARED, plans, words_of
from flashhead_edge.packed import open_weights
from flashhead_edge.program.build import build_program
from flashhead_edge.program.file import PROGRAM, Program, read_program, write_program
from flashhead_edge.program.head import Device
from flashhead_edge.program.kept import own_index, program_key
from flashhead_edge.progress import Progress, silent


def ahead_folder() -> Path:
    """Where an installation has what was made for it before it was there: in its environment, whoever runs it."""
    return Path(sys.prefix) / "share" / "flashhead-edge"


def name_for(device: Device) -> str:
    """The file of nodes for a device."""
    return f"program-{device.capability}-{device.multiprocessors}-{device.shared_bytes}.json"


def folder_of(base: Path, checkpoint: Path, settings: dict[str, Any]) -> Path:
    """Where a checkpoint's programs lie below a folder."""
    return base / "programs" / program_key(checkpoint, settings, times=False)


def write_ahead(
    base: Path, checkpoint: Path, devices: Sequence[Device], *, precision: str, context: int, group: int, batch: int, progress: Progress = silent
) -> list[Program]:
    """Make a checkpoint's programs for some devices.

    Args:
        base: below which the folder is made.
        checkpoint: a folder that `flashhead convert` wrote.
        precision, context, group, batch: as `build_program` takes them.
    Returns:
        A program for each device, in their order, without those that the head does not fit.
    Raises:
        What `own_index`, `open_weights` and, for the first device, `build_program` raise. SettingsError: no device.
        FlashHeadError: the disk is full or refuses.
    """
    if not devices:
        raise SettingsError("programs made ahead: no device is named, expected one at least; name the boards")
    settings: dict[str, Any] = {"precision": precision, "context": context, "group": group, "batch": batch}
    folder = folder_of(base, checkpoint, settings)
    progress("reading the head", None)
    index = own_index(checkpoint)
    with open_weights(checkpoint) as weights:
        built = build_program(weights, weights.config, index, precision=precision, context=context, group=group, device=devices[0], batch=batch)
        document = dict(write_program(folder, built, devices[0], settings, progress).document)
    *nodes, head = document["nodes"]
    fitting = []
    for device in devices:
        try:
            made = plans(built.head.packed, device.multiprocessors, device.shared_bytes - STATIC_SHARED, built.head.max_rows)
        except DeviceError:
            continue
        fitting.append(device)
        attributes = head["attributes"] | {"plans": [word for plan in made for word in words_of(plan)]}
        said = document | {"device": asdict(device), "nodes": [*nodes, head | {"attributes": attributes}]}
        write_file(folder / name_for(device), [(json.dumps(said, separators=(",", ":")) + "\n").encode()])
    (folder / PROGRAM).unlink()  # the same as the first device's
    return [read_program(folder, name_for(device)) for device in fitting]


def ready_program(checkpoint: Path, *, precision: str, context: int, group: int, batch: int, device: Device, base: Path | None = None) -> Program | None:
    """The program that was made for this device and came with the installation; None where none did.

    Args:
        base: below which it is looked for; None: `ahead_folder()`.
    Raises:
        CheckpointError: it is there, and damaged.
    """
    found = folder_of(ahead_folder() if base is None else base, checkpoint, {"precision": precision, "context": context, "group": group, "batch": batch})
    return read_program(found, name_for(device)) if (found / name_for(device)).is_file() else None
