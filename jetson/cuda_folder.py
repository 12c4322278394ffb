"""A checkpoint for the CUDA backend: its program, from the user's cache or made here (flashhead_edge.program), opened on the GPU. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError, DeviceError, SettingsError
from flashhead_edge.jetson.board import Module, board_named
from flashhead_edge.jetson.cuda_backend import Cuda, open_program
from flashhead_edge.jetson.cuda_library import MOST_ROWS
from flashhead_edge.jetson.cuda_plan import checkpoint_need
from flashhead_edge.jetson.driver import DeviceFacts, device_facts
from flashhead_edge.jetson.folder import is_exported
from flashhead_edge.jetson.plan import Need, check_fits, free_gpu
from flashhead_edge.jetson.tensorrt_folder import is_tensorrt
from flashhead_edge.program.ahead import ready_program
from flashhead_edge.program.families import describe
from flashhead_edge.program.file import PROGRAM, Program, read_program
from flashhead_edge.program.head import DRAFTED_ROWS, Device
from flashhead_edge.program.kept import cached_program, is_kept
from flashhead_edge.program.weights import PRECISIONS
from flashhead_edge.progress import Progress, silent

CONTEXT = 4096  # positions of the cache, at most, where nobody says
GROUP = 128  # weights that share a scale where a matrix is coded here

BOARD_RUNTIME = 600 << 20  # of program, libraries and context where a GPU shares the system's memory: as plan_sources has TensorRT's
BOARD_NOTE = "the program and its context, 600 MiB, were not measured on a board; weights in 4 bits, coded anew where the checkpoint has them in 16"
NO_GPU = "no GPU is here: launches are counted as an AGX Orin 64 GB has them, some megabytes more or less than another's; name a board with --memory"


def open_folder(
    folder: Path,
    stream: int | None = None,
    *,
    precision: str | None = None,
    context: int | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Cuda:
    """Open a FlashHead checkpoint, or a program that was written of one.

    Args:
        stream: the handle of a stream to work in, such as pycuda's; None: one of its own.
        precision: of activations, float16 or bfloat16; None: the checkpoint's, float16 where that is float32.
        context: positions of the cache; None: the model's, 4,096 at most.
        batch: texts at once, at most; up to eight share one program on disk.
    Raises:
        CheckpointError: no such folder, or a damaged one. UnsupportedModelError: a family without a program.
        ExportError: a size without a kernel. SettingsError: a setting is out of range.
        DeviceError: no GPU, or too little memory, which is looked at before a program is made.
        EngineError: a kernel does not compile, or a program is another GPU's.
    """
    if (folder / PROGRAM).is_file():
        program = read_program(folder)
        for what, asked, made in (("context", context, program.context), ("precision", precision, program.precision)):
            if asked not in (None, made):
                raise SettingsError(f"{folder}: the {what} is {asked}, expected {made}, which the program was made for; leave it out, or open the checkpoint")
        return _opened(replace(program, batch=max(batch, program.batch)), stream, progress)
    config, facts = read_json(folder / "config.json"), device_facts()
    settings = program_settings(config, precision=precision, context=context, batch=batch)
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    found = ready_program(folder, **settings, device=device)
    if found is None:
        if not is_kept(folder, **settings, device=device):
            need = checkpoint_need(folder, facts, **settings | {"batch": batch}, positions=describe(config).positions or None)
            check_fits(need, free_gpu(facts.free_bytes), settings["context"], batch)
        found = cached_program(folder, **settings, device=device, progress=progress)
    return _opened(replace(found, batch=batch), stream, progress)


def program_settings(config: Any, *, precision: str | None = None, context: int | None = None, batch: int = 1) -> dict[str, Any]:
    """What a checkpoint's program is made with, by `open_folder` as by `flashhead bundle`: precision, context, group and batch.

    A program's head takes eight states in any case, so up to eight texts are no reason to make another one.

    Args:
        config: config.json.
        precision, context, batch: as `open_folder` takes them.
    Raises:
        SettingsError: the context is longer than the model's. UnsupportedModelError: a family without a program.
    """
    return {
        "precision": precision or precision_of(config),
        "context": _context(config, context),
        "group": _group(config),
        "batch": batch if _texts(batch) > DRAFTED_ROWS else 1,
    }


def need_of_checkpoint(folder: Path, context: int | None = None, batch: int = 1, board: Module | None = None) -> Need:
    """What a checkpoint takes of this machine's GPU, or where there is none of an Orin's: of the device, launches need some megabytes more or less.

    Args:
        context, batch: as `open_folder` takes them.
        board: whose launches and memory are meant instead: there the program and its context lie in the memory that a model has.
    Raises:
        As `open_folder`, but for what needs a GPU. Headers, norms and the head's index are read.
    """
    if not (folder / "config.json").is_file() or is_exported(folder) or is_tensorrt(folder):
        found = "an exported folder" if folder.is_dir() and (folder / "config.json").is_file() else "no config.json"
        raise CheckpointError(f"{folder}: {found}, expected a FlashHead checkpoint, which the cuda backend runs; run flashhead convert")
    config = read_json(folder / "config.json")
    notes: tuple[str, ...] = ()
    try:
        facts = device_facts() if board is None else _facts_of(board)
    except DeviceError:
        facts, notes = _facts_of(board_named("agx-orin-64gb")), (NO_GPU,)
    need = checkpoint_need(
        folder, facts, precision=precision_of(config), context=_context(config, context), group=_group(config), batch=_texts(batch),
        positions=describe(config).positions or None,
    )  # fmt: skip
    return replace(need, notes=(*need.notes, *notes)) if board is None else replace(need, runtime=BOARD_RUNTIME, notes=(*need.notes[1:], BOARD_NOTE))


def _facts_of(board: Module) -> DeviceFacts:
    return DeviceFacts(board.title, board.capability, board.multiprocessors, board.shared_bytes, 0, 0, None, f"{board.cuda}")


def _texts(batch: int) -> int:
    """Texts at once."""
    if not 1 <= batch <= MOST_ROWS:
        raise SettingsError(f"cuda backend: {batch} texts at once, expected 1 to {MOST_ROWS}; ask for fewer")
    return batch


def _context(config: Any, context: int | None) -> int:
    """The positions of the cache."""
    most = describe(config).positions
    context = min(CONTEXT, most or CONTEXT) if context is None else context
    if not 2 <= context <= (most or context):
        raise SettingsError(f"cuda backend: the context is {context:,}, expected 2 to the model's {most:,} positions; choose another")
    return context


def _opened(program: Program, stream: int | None, progress: Progress) -> Cuda:
    return open_program(program, dict(program.settings), program.fingerprint, stream, progress=progress)


def precision_of(config: Any) -> str:
    """What a checkpoint's floats are."""
    inner = text_config(dict(config))
    named = str(inner.get("dtype") or inner.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "")
    return named if named in PRECISIONS else "float16"


def _group(config: Any) -> int:
    """The largest group that the widths of a decoder's matrices are multiples of."""
    layout = describe(config)
    widths = (layout.hidden, layout.intermediate, layout.q_heads * layout.head_size)
    return next((g for g in (GROUP, 64, 32) if all(w % g == 0 for w in widths)), 32)
