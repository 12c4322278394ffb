"""The kernels' code: of exactly the kernels that a model launches, as it came with the installation (`flashhead bundle`), or compiled by NVRTC on the user's
machine once, and read from the user's cache after that.

Which these are a dry pass says: the launchers run over the whole model and note what they would launch (`fh_dry`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.cuda_library import library
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.jetson.nvrtc import Nvrtc, find_nvrtc
from flashhead_edge.jetson.plugin_build import MOST_JOBS, expression_of, plain, sources
from flashhead_edge.program.ahead import ahead_folder
from flashhead_edge.progress import Progress, silent

DIGEST = hashlib.sha256().digest_size
_held: dict[str, ctypes.Array] = {}  # code by kernel, for the life of the process: the library has its address


@dataclass(frozen=True)
class Readied:
    """What `ready` did."""

    kernels: int  # that the model launches
    compiled: int  # of these, now
    seconds: float
    nvrtc: str


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashhead-edge" / "kernels"


def architecture_of(capability: int) -> str:
    """What kernels are compiled for: on Hopper with the instructions that no later device has."""
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def launched_by(dry: Callable[[], None]) -> list[str]:
    """The kernels that a pass launches, by their names in a cubin; nothing is done on a device.

    Raises:
        EngineError: a launcher refuses.
    """
    found = library()
    found.fh_dry(1)
    try:
        dry()
    finally:
        found.fh_dry(0)
    names, name = [], found.fh_seen(0)
    while name is not None:
        names.append(name.decode())
        name = found.fh_seen(len(names))
    return sorted(names)


def kernel_sources() -> dict[str, str]:
    """The CUDA source of every kernel of the library, by its name in a cubin."""
    found, source = library(), ctypes.c_char_p()
    all_: dict[str, str] = {}
    while (name := found.fh_kernel(len(all_), ctypes.byref(source))) is not None:
        all_[name.decode()] = (source.value or b"").decode()
    return all_


def expression(name: str) -> str:
    """A kernel as C++ writes it, such as ``fh::rms_norm<fh::Fp16>``."""
    text = library().fh_expression(name.encode())
    try:
        return expression_of(ctypes.string_at(text).decode())
    finally:
        library().fh_free(text)


def ready(dry: Callable[[], None], facts: DeviceFacts, progress: Progress = silent) -> Readied:
    """Give the library the code of every kernel that a pass launches.

    Args:
        dry: the pass: launches, and nothing else of a device.
    Raises:
        EngineError: there is no NVRTC, or it does not compile for this GPU; or the pass is refused.
    """
    begin = time.monotonic()
    wanted = launched_by(dry)
    missing = [name for name in wanted if name not in _held]
    if not missing:
        return Readied(len(wanted), 0, time.monotonic() - begin, "")
    architecture, of, version, compiled_now = architecture_of(facts.capability), kernel_sources(), "", 0
    came = ahead_folder() / "kernels"
    codes = {name: code for name in missing if (code := read_cached(came / ahead_name(name, of[name], architecture))) is not None}
    if rest := [name for name in missing if name not in codes]:
        nvrtc = find_nvrtc(int(facts.cuda_version.split(".")[0]))
        made, compiled_now = cached_codes(rest, facts.capability, nvrtc, progress)
        codes, version = codes | made, f"{nvrtc.version[0]}.{nvrtc.version[1]}"
    for name, code in codes.items():
        _held[name] = ctypes.create_string_buffer(code, len(code))
        library().fh_set_code(name.encode(), ctypes.addressof(_held[name]))
    return Readied(len(wanted), compiled_now, time.monotonic() - begin, version)


def cached_codes(names: Sequence[str], capability: int, nvrtc: Nvrtc, progress: Progress = silent) -> tuple[dict[str, bytes], int]:
    """The code of kernels, from the user's cache or compiled and kept there from now on.

    Args:
        capability: of the GPU that they are for, which need not be at hand.
    Returns:
        Code by kernel, and how many were compiled now.
    Raises:
        EngineError: NVRTC does not compile for the capability, or refuses a kernel; or the cache cannot be written.
    """
    if capability not in nvrtc.architectures():
        raise EngineError(
            f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} ({nvrtc.path}): it does not compile for capability {capability}, expected one of "
            f"{', '.join(map(str, nvrtc.architectures()))}; install a newer NVRTC"
        )
    architecture, of = architecture_of(capability), kernel_sources()
    files = {name: cached_file(name, of[name], architecture, nvrtc) for name in names}
    codes = {name: code for name, path in files.items() if (code := read_cached(path)) is not None}
    absent = [name for name in names if name not in codes]
    with ThreadPoolExecutor(min(max(MOST_JOBS, 8), os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(compiled, name, of[name], architecture, nvrtc): name for name in absent}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                name = jobs[job]
                codes[name] = job.result()
                write_cached(files[name], job.result())
                progress(f"compiling for {architecture}: {plain(expression(name))}", done / len(jobs))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return codes, len(absent)


def compiled(name: str, source: str, architecture: str, nvrtc: Nvrtc) -> bytes:
    """The cubin of one kernel.

    Raises:
        EngineError: it does not compile, or has another name than the library's compiler gave it.
    """
    code, (lowered,) = nvrtc.cubin(sources().kernels / source, [expression(name)], architecture)
    if lowered != name:
        raise EngineError(f"{expression(name)}: NVRTC calls it {lowered}, expected {name} as this installation's compiler does; report this with both versions")
    return code


def cached_file(name: str, source: str, architecture: str, nvrtc: Nvrtc) -> Path:
    """Where a kernel's code is kept: another source, header, architecture or compiler has another file."""
    return cache_folder() / _file_name((name, architecture, nvrtc.version), source, architecture)


def ahead_name(name: str, source: str, architecture: str) -> str:
    """The file of a kernel's code that came with the installation. Which compiler made it is the bundle's to say: a board need not have one."""
    return _file_name((name, architecture), source, architecture)


def _file_name(key: tuple[object, ...], source: str, architecture: str) -> str:
    folder = sources().kernels
    digest = hashlib.sha256(repr(key).encode())
    for file in (folder / source, *included(folder / source)):
        digest.update(file.read_bytes())
    return f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:24]}.cubin"


def included(source: Path) -> list[Path]:
    """The headers that a source includes, and theirs."""
    found: dict[Path, None] = {}
    todo = [source]
    while todo:
        for line in re.findall(r'^#include "([^"]+)"', todo.pop().read_text(encoding="utf-8"), re.MULTILINE):
            path = source.parent / line
            if path not in found:
                found[path] = None
                todo.append(path)
    return sorted(found)


def read_cached(path: Path) -> bytes | None:
    """Code that was kept; None where there is none, or a damaged one, which is made again."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[DIGEST:] if data[:DIGEST] == hashlib.sha256(data[DIGEST:]).digest() else None


def write_cached(path: Path, code: bytes) -> None:
    """Keep code, whole or not at all.

    Raises:
        EngineError: the folder cannot be written.
    """
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise EngineError(f"{path}: compiled kernels cannot be kept ({error.strerror}), expected a folder that can be written; set XDG_CACHE_HOME") from error
