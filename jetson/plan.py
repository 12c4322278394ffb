"""Whether a model fits into a machine's memory, and how many positions of text do. All of it is a prediction from sizes in headers.

`plan_sources` reads those; backends call `check_fits` before they load anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.jetson.board import MODULES, Module, module_named
from flashhead_edge.jetson.board_files import Files

MIB = 1 << 20
DEFAULT_CONTEXT = 4096
MOST_CONTEXT = 1 << 24  # where a model names no limit
PROMPT_BLOCK = 1024  # tokens of a prompt whose scores of attention torch has at once
# What the system itself takes of a board without a desktop: 1,224 MB on an idle Orin NX, 1,273 on an Orin Nano, 3,429 on Thor (tegrastats).
SYSTEM_LEAST, SYSTEM_SHARE = 1300 * MIB, 0.03
BACKENDS = ("auto", "cuda")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True)
class Layer:
    """What one array, or one layer, of the cache takes."""

    per_position: int  # bytes
    window: int | None = None  # positions that it keeps at most


@dataclass(frozen=True)
class Need:
    """What a model takes, in bytes; all predicted."""

    name: str
    kind: str  # onnxruntime, tensorrt, torch, cuda
    weights: int  # without the head's exact rows
    index: int  # the head's coded rows, centroids and tables
    exact_rows: int  # of the model's own head: for a tied model also its embedding
    copies: int  # of weights that a runtime lays out anew
    runtime: int  # program, libraries, device context
    scratch: int  # of a prompt
    layers: tuple[Layer, ...]
    limit: int | None  # positions that the model was made for
    first: int = 1  # positions that a cache begins with; it doubles
    doubled: bool = False  # past and present lie side by side
    scores: int = 0  # bytes of attention's scores for each pair of a prompt's token and a position
    positions: int = 0  # bytes of each position whatever the batch, such as rotary tables
    tables: int = 0  # of the weights: embeddings, of which a token reads one row
    fixed: tuple[int, int] | None = None  # context and batch that are allocated whatever is asked
    notes: tuple[str, ...] = ()

    def cache(self, context: int, batch: int = 1) -> int:
        """The KV cache of some texts of that many positions."""
        room = self.capacity(context)
        one = sum(layer.per_position * min(room, layer.window or room) for layer in self.layers)
        return one * batch * (2 if self.doubled else 1)

    def capacity(self, context: int) -> int:
        """Positions that are allocated for that many."""
        if self.first <= 1:
            return context
        room = self.first
        while room < context:
            room *= 2
        return max(context, min(room, self.limit)) if self.limit is not None else room

    def prompt(self, context: int, batch: int = 1) -> int:
        """Scratch while a prompt is read."""
        return self.scratch + self.positions * context + self.scores * min(context, PROMPT_BLOCK) * context * batch

    def total(self, context: int, batch: int = 1) -> int:
        return self.weights + self.index + self.exact_rows + self.copies + self.runtime + self.cache(context, batch) + self.prompt(context, batch)

    def largest_context(self, free: int, batch: int = 1) -> int:
        """Most positions that fit; 0: none do."""
        low, high = 0, self.limit or MOST_CONTEXT
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle, batch) <= free else (low, middle - 1)
        return low


@dataclass(frozen=True)
class Free:
    """Memory that a model may take."""

    size: int | None  # bytes; None: not known
    where: str


def check_fits(need: Need, free: Free, context: int, batch: int = 1) -> None:
    """Refuse, before anything is loaded, what will not fit. Where the free memory is not known nothing is refused.

    Raises:
        DeviceError: too little memory; one sentence with the largest context that fits.
    """
    needed = need.total(context, batch)
    if free.size is None or needed <= free.size:
        return
    most = need.largest_context(free.size, batch)
    if most:
        then = f"at most {most:,} positions fit: " + ("export it again with that --context" if need.fixed else "use a shorter context")
        if batch > 1:
            then += ", or with a smaller --batch" if need.fixed else ", or fewer texts at once"
    else:
        then = "no context fits: free memory, or take a smaller model" + (" or fewer texts at once" if batch > 1 and not need.fixed else "")
    raise DeviceError(
        f"{need.name}: {context:,} positions at batch {batch} need about {mib(needed)} (predicted), {mib(free.size)} are free ({free.where}), "
        f"expected room for all; {then}"
    )


def document(need: Need, free: Free, context: int | None = None, batch: int | None = None) -> dict[str, Any]:
    """A plan, as JSON. Sizes are bytes."""
    if need.fixed is not None:
        context, batch = context or need.fixed[0], batch or need.fixed[1]
    context = context or min(need.limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    batch = batch or 1
    if need.limit is not None and context > need.limit:
        raise SettingsError(f"plan: the context is {context:,}, expected at most the model's {need.limit:,} positions; plan a shorter one")
    needed = need.total(context, batch)
    return {
        "model": need.name,
        "runtime": need.kind,
        "context": context,
        "batch": batch,
        "parts": {
            "weights": need.weights,
            "head_index": need.index,
            "exact_rows": need.exact_rows,
            "kv_cache": need.cache(context, batch),
            "weights_laid_out_anew": need.copies,
            "prompt": need.prompt(context, batch),
            "runtime": need.runtime,
        },
        "kv_cache_per_position": sum(layer.per_position for layer in need.layers),
        "needed": needed,
        "free": free.size,
        "memory": free.where,
        "fits": None if free.size is None else needed <= free.size,
        "largest_context": None if free.size is None else need.largest_context(free.size, batch),
        "context_limit": need.limit,
        "predicted": True,
        "notes": list(need.notes),
    }


# ---- memory


def free_of(memory: str | None, root: str | Path = "/") -> Free:
    """The memory that a model may take.

    Args:
        memory: None is this machine's; else an amount that is free, such as 8GB, or a board, such as orin-nano-8gb.
    Raises:
        SettingsError: neither an amount nor a board.
    """
    if memory is None:
        return free_here(root)
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", memory.lower())
    if amount is not None and amount[2] != "i":
        return Free(int(float(amount[1]) * UNITS[amount[2]]), "as given")
    module = module_named(memory)
    if module is None:
        known = ", ".join(m.key for m in MODULES)
        raise SettingsError(f"plan: memory is {memory!r}, expected an amount such as 8GB or a board ({known}); give one of them")
    return free_on(module)


def free_on(module: Module) -> Free:
    """What a board without a desktop has left."""
    system = max(SYSTEM_LEAST, int(SYSTEM_SHARE * module.total))
    measured = "" if module.memory_total is not None else ", predicted"
    return Free(
        module.total - system, f"{module.title}: {mib(module.total)} in all{measured} ({module.source}), {mib(system)} for the system without a desktop"
    )


def free_here(root: str | Path = "/") -> Free:
    """MemAvailable of this machine, or what this process's control group leaves, whichever is less."""
    files = Files(Path(root))
    text = files.text("/proc/meminfo") or ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if found is None:
        return Free(None, f"this machine, whose free memory {files.why('/proc/meminfo')}")
    available = int(found[1]) << 10
    most, used = (files.text(f"/sys/fs/cgroup/memory.{name}", said=False) for name in ("max", "current"))
    if most is not None and used is not None and most.isdigit() and used.isdigit():
        cached = re.findall(
            r"^(?:in)?active_file (\d+)$", files.text("/sys/fs/cgroup/memory.stat", said=False) or "", re.MULTILINE
        )  # given back when asked for
        left = max(0, int(most) - int(used) + sum(map(int, cached)))
        if left < available:
            return Free(left, "this machine, as far as its control group allows")
    return Free(available, "this machine, MemAvailable")


def free_gpu(free_bytes: int, root: str | Path = "/") -> Free:
    """Of a GPU: its own, but of a board that shares its memory MemAvailable, since the driver's figure leaves out what can be reclaimed."""
    if "tegra" in (Files(Path(root)).text("/proc/device-tree/compatible", said=False) or ""):
        here = free_here(root)
        if here.size is not None:
            return here
    return Free(free_bytes, "this GPU")


def plan(
    model: str | Path, *, context: int | None = None, batch: int | None = None, memory: str | None = None, backend: str = "auto", root: str | Path = "/"
) -> dict[str, Any]:  # fmt: skip
    """What a model needs against what is free, as JSON.

    Args:
        model: a checkpoint, a GGUF file, or an export.
        context: positions; None: 4,096, or what the model was made or exported for.
        batch: texts at once; None: one, or what it was exported for.
        memory: see `free_of`.
        backend: cuda plans a checkpoint for the backend of that name, auto for what runs the model otherwise.
    Raises:
        CheckpointError: no such model, or a damaged one.
        SettingsError: `context`, `batch`, `memory` or `backend` is out of range.
        UnsupportedModelError, ExportError: the cuda backend does not run the model.
    """
    from flashhead_edge.jetson.plan_sources import need_of

    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise SettingsError(f"plan: {name} is {value}, expected 1 or more; plan another value")
    free = free_of(memory, root)
    if backend not in BACKENDS:
        raise SettingsError(f"plan: backend is {backend!r}, expected {' or '.join(BACKENDS)}; plan for one of them")
    if backend == "cuda":
        from flashhead_edge.jetson.cuda_folder import need_of_checkpoint

        board = None if memory is None else module_named(memory)
        need = need_of_checkpoint(Path(model).expanduser(), context, batch or 1, board)
        return document(need, _gpu_here(free, root) if memory is None else free, context, batch)
    need = need_of(model, gpu=memory is not None and free.where != "as given")
    if memory is None and need.kind == "tensorrt":
        free = _gpu_here(free, root)
    return document(need, free, context, batch)


def _gpu_here(otherwise: Free, root: str | Path) -> Free:
    from flashhead_edge.jetson.driver import device_facts

    try:
        return free_gpu(device_facts().free_bytes, root)
    except DeviceError:
        return Free(otherwise.size, f"{otherwise.where}; no GPU is found here")


def mib(size: int | None) -> str:
    """Bytes for a person."""
    return "?" if size is None else f"{size / MIB:,.0f} MiB"
