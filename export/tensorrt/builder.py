"""Building one engine: an ONNX file in, a serialised engine out, nothing half-written. numpy-free; TensorRT is handed in."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import named_errors
from flashhead_edge.errors import DeviceError, EngineError
from flashhead_edge.export.tensorrt import versions
from flashhead_edge.export.tensorrt.manifest import sha256_of
from flashhead_edge.progress import Progress, silent

Sizes = Mapping[str, tuple[int, int, int]]  # least, usual, most, by a dimension's name
WAIT_S = 0.2  # between two looks at a build that runs
HOST_BASE, DEVICE_BASE = 512 << 20, 384 << 20  # what a build takes whatever it builds: measured on 8.6.0, with room
HOST_TIMES, DEVICE_TIMES = 8, 4  # of the weights in an engine: measured on 8.6.0, 6 to 8 and 3.1


@dataclass(frozen=True)
class Built:
    """An engine that has been written."""

    file: str
    bytes: int
    seconds: float
    sha256: str


def build_engine(
    trt: Any,
    model: Path,
    out: Path,
    profiles: Sequence[Sizes],
    *,
    timing_cache: Path | None = None,
    memory: int | None = None,
    few_tactics: bool = False,
    progress: Progress = silent,
) -> Built:
    """Build the engine of an ONNX file. Ctrl-C ends it, where TensorRT can be interrupted at once, and leaves no file.

    Args:
        trt: TensorRT's module (`versions.load`); a plugin library has been loaded into it where the model needs one.
        out: the engine's file, replaced in one step.
        profiles: sizes of the named dimensions, a profile each, in this order.
        timing_cache: kept between builds, replaced in one step after a build that succeeded.
        memory: cap of what tactics may take, bytes.
        few_tactics: try few kernels for each layer: for an engine with a large matrix of its own.
    Raises:
        EngineError: the parser or the builder refuses.
    """
    versions.check_timing_cache(trt, timing_cache)
    log = versions.make_logger(trt, progress, out.name)
    progress(f"{out.name}: reading {model.name}", None)
    builder = versions.make_builder(trt, log)
    network = versions.make_network(trt, builder)
    versions.parse(trt, network, log, model)
    config = builder.create_builder_config()
    for sizes in profiles:
        config.add_optimization_profile(_profile(builder, network, sizes))
    versions.hold_types(trt, network, config)
    versions.without_other_libraries(trt, config)
    versions.allow_aliases(trt, config)
    if few_tactics:
        versions.try_few_tactics(trt, config)
    if memory is not None:
        versions.limit_memory(trt, config, memory)
    if timing_cache is not None:
        with named_errors(timing_cache):
            data = timing_cache.read_bytes() if timing_cache.is_file() else b""
        versions.use_timing_cache(trt, config, log, data, timing_cache)
    cancelled = versions.Cancelled()
    can = versions.watch(trt, config, log, cancelled)
    log.said = not can
    progress(f"{out.name}: building", None)
    start = time.monotonic()
    made = _interruptible(lambda: versions.serialised(trt, builder, network, config, log, out.name), cancelled, can, log, progress)
    seconds = time.monotonic() - start
    with named_errors(out):
        write_whole(out, made)
        if timing_cache is not None:
            write_whole(timing_cache, versions.timing_cache_of(config))
    return Built(out.name, out.stat().st_size, round(seconds, 3), sha256_of(out))


def _profile(builder: Any, network: Any, sizes: Sizes) -> Any:
    """A profile of all inputs with open dimensions."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape, names = tuple(tensor.shape), versions.dimension_names(tensor)
        if -1 not in shape:
            continue
        try:
            ranges = [sizes[name] if size < 0 else (size,) * 3 for size, name in zip(shape, names)]
        except KeyError as error:
            raise EngineError(f"{tensor.name}: a dimension {error} that no profile has, expected one of {', '.join(sizes)}; report this model") from error
        levels = ([r[level] for r in ranges] for level in range(3))
        profile.set_shape(tensor.name, *levels)
    return profile


def _interruptible(work: Any, cancelled: versions.Cancelled, can: bool, log: versions.Log, progress: Progress) -> Any:
    """Run a build in a thread of its own, so that Ctrl-C reaches this one: in TensorRT's callbacks an exception would end the process.

    A second Ctrl-C does not wait for a TensorRT that cannot be interrupted.
    """
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["made"] = work()
        except BaseException as error:  # noqa: BLE001  # it goes on in the thread that waits
            result["error"] = error

    thread = threading.Thread(target=run, name="build", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(WAIT_S)
    except KeyboardInterrupt:
        cancelled.asked.set()
        late = " when TensorRT, which cannot be interrupted here, is done; Ctrl-C again leaves now"
        progress(f"{log.what}: stopping{'' if can else late}", None)
        while thread.is_alive():
            thread.join(WAIT_S)
        raise
    if "error" in result:
        raise result["error"]
    return result["made"]


def write_whole(path: Path, data: Any) -> None:
    """Write a file beside the old one and let it take its place."""
    new = path.with_name(f".{path.name}.flashhead-new-{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(memoryview(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


# ---- memory


def free_host_bytes() -> int | None:
    """Memory of this machine that programs may still take; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
        return int(found[0]) << 10
    except (OSError, IndexError, ValueError):
        return None


def peak_host_bytes() -> int | None:
    """The most memory that this process has had."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@dataclass(frozen=True)
class Needs:
    """What a build takes at most."""

    host: int  # bytes
    device: int


def needs(in_engine: int, plugin_weights: int, bound: int, memory: int | None) -> Needs:
    """What a build needs.

    Args:
        in_engine: bytes of weights that the engine holds.
        plugin_weights: bytes that plugins hold on the device once they run.
        bound: bytes of the largest layer's inputs and outputs.
        memory: the cap of tactics, bytes.
    """
    tactics = in_engine * (DEVICE_TIMES - 1) if memory is None else memory
    return Needs(HOST_BASE + HOST_TIMES * in_engine, DEVICE_BASE + in_engine + tactics + plugin_weights + 2 * bound)


def check_memory(what: str, need: Needs, free_host: int | None, free_device: int | None) -> None:
    """Raise DeviceError where a build would run out of memory, before it starts."""
    for name, wanted, free in (("memory of the GPU", need.device, free_device), ("memory of this machine", need.host, free_host)):
        if free is not None and free < wanted:
            raise DeviceError(
                f"{what}: its build needs {-(-wanted >> 20):,} MiB of {name}, {free >> 20:,} MiB are free; "
                "end other programs, pass a smaller --context, --batch or --memory, or build on a larger device of the same kind"
            )
