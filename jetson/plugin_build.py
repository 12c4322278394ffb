"""The plugin library made on the user's machine from the sources in this package: the host's code by g++, the device's by NVRTC.

A C++ compiler reads the launchers of the CUDA sources and leaves their kernels undefined: these names are what NVRTC then compiles, each kernel with all
of its instances a cubin. Assembler puts the cubins into the library and gives every name an address, which `plugins_trt/nvrtc/runtime.cpp` looks up.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_edge import __version__
from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.jetson import plugins
from flashhead_edge.jetson.board import board_named
from flashhead_edge.jetson.driver import device_facts
from flashhead_edge.jetson.nvrtc import Nvrtc, cuda_folders, find_nvrtc, wheel_folders
from flashhead_edge.progress import Progress, silent

LAUNCHERS = ("attention", "decode", "elementwise", "embedding", "head_step", "settings", "w4a16", "w4a16_fused")  # the CUDA sources that plugins call
CUDA_HEADERS = ("cuda.h", "cuda_runtime.h", "crt/host_defines.h")
LEAST_CAPABILITY = 80
MOST_JOBS = 4  # a compilation takes up to half a gigabyte
HEADERS = "the public repository of TensorRT has them in include/, of the tag that is your version; JetPack in libnvinfer-headers-dev"


@dataclass(frozen=True)
class Sources:
    """Folders of `plugins_trt`, in a clone or as this package carries them."""

    kernels: Path
    plugins: Path
    nvrtc: Path


@dataclass(frozen=True)
class BuiltLibrary:
    """What `build` made."""

    path: Path
    version: str  # 0.1.0 tensorrt 8.6.0
    capability: int  # of the GPUs that it runs on, 87 for 8.7
    nvrtc: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Target:
    """What must be known of the machine that shall run a library."""

    capability: int  # of its GPU, 87 for 8.7
    cuda: int | None  # major version of its driver's CUDA, the oldest that may be there; None: any


BOARDS_PROCESSOR = "aarch64"


def target_named(name: str) -> Target:
    """The target of a board's name, such as orin-nano-8gb, or of a capability, such as 89.

    Raises:
        SettingsError: the name is not known; the C++ compiler is of another processor than the board's.
    """
    if name.isdecimal():
        return Target(int(name), None)
    module = board_named(name)
    if shutil.which(compiler()) and machine_of_compiler() != BOARDS_PROCESSOR:
        raise SettingsError(
            f"board {name}: {compiler()} compiles for {machine_of_compiler()}, expected a compiler for {BOARDS_PROCESSOR}, which the board has; "
            f"install one (apt install g++-{BOARDS_PROCESSOR}-linux-gnu) and set CXX={BOARDS_PROCESSOR}-linux-gnu-g++, or build on the board"
        )
    return Target(module.capability, module.cuda)


def sources() -> Sources:
    """Where the sources lie."""
    above = Path(__file__).resolve().parents[1]
    if (above / "plugins_trt").is_dir():  # a clone
        return Sources(*(above / "plugins_trt" / name for name in ("kernels", "plugins", "nvrtc")))
    return Sources(*(above / "kernels" / name for name in ("sources", "plugins", "nvrtc")))


def tensorrt_headers(given: Path | None) -> tuple[Path, tuple[int, int, int]]:
    """The folder of TensorRT's headers and their version.

    Raises:
        EngineError: they are not there, or are of no version that is known here.
    """
    places = [given] if given else [*sorted(Path("/usr/include").glob("*-linux-gnu")), Path("/usr/include"), Path("/usr/local/tensorrt/include")]
    folder = next((p for p in places if (p / "NvInferRuntime.h").is_file() and (p / "NvInferVersion.h").is_file()), None)
    if folder is None:
        looked = ", ".join(str(p) for p in places)
        raise EngineError(f"TensorRT's headers: NvInferRuntime.h is not in {looked}, expected it there; name their folder with --tensorrt-include ({HEADERS})")
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"#define +(?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) +(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = tuple(int(n[1]) for n in numbers if n)
    if len(version) != 3 or version < (8, 6):
        raise EngineError(f"{folder}: headers of TensorRT {'.'.join(map(str, version)) or 'without a version'}, expected 8.6 or newer; {HEADERS}")
    return folder, version  # type: ignore[return-value]


def cuda_headers() -> list[Path]:
    """The folders that together hold CUDA's headers.

    Raises:
        EngineError: some are in none.
    """
    places = [f for root in cuda_folders() for f in (root / "include", *sorted(root.glob("targets/*/include")))] + [f / "include" for f in wheel_folders()]
    whole = next((p for p in places if all((p / name).is_file() for name in CUDA_HEADERS)), None)
    if whole:
        return [whole]
    found = [next((p for p in places if (p / name).is_file()), None) for name in CUDA_HEADERS]
    missing = [name for name, folder in zip(CUDA_HEADERS, found) if folder is None]
    if missing:
        raise EngineError(
            f"CUDA's headers: {', '.join(missing)} not found, expected in CUDA_HOME/include, in /usr/local/cuda/include or in NVIDIA's wheels; install the "
            "CUDA toolkit, or: pip install nvidia-cuda-runtime nvidia-cuda-crt"
        )
    return list(dict.fromkeys(folder for folder in found if folder))


def build(include: Path | None = None, out: Path | None = None, target: Target | None = None, progress: Progress = silent) -> BuiltLibrary:
    """Make the plugin library for this machine's GPU, or for another one.

    Args:
        include: the folder of TensorRT's headers; None: where a system has them.
        out: the file to write; None: its place in the cache, where exports and sessions look for it.
        target: what shall run it; None: this machine.
    Raises:
        EngineError: a compiler or headers are missing, or a source does not compile.
        DeviceError: no target is given, and there is no GPU.
        SettingsError: the capability is too low.
    """
    begin = time.monotonic()
    if target is None:
        try:
            facts = device_facts()
        except DeviceError as error:
            raise DeviceError(f"plugin build: no GPU here says its capability ({error}), expected one, or its name; pass --for BOARD") from error
        target = Target(facts.capability, int(facts.cuda_version.split(".")[0]))
    capability = target.capability
    if capability < LEAST_CAPABILITY:
        raise SettingsError(f"capability {capability}: the kernels run from {LEAST_CAPABILITY} on (Ampere, 8.0), expected that or more; use another GPU")
    trt, version = tensorrt_headers(include)
    tools = [tool for tool in (compiler(), binutil("nm"), binutil("c++filt")) if shutil.which(tool) is None]
    if tools:
        raise EngineError(f"{tools[0]}: it is not installed, expected a C++ compiler with its tools; install g++ and binutils (apt install g++), or set CXX")
    headers, nvrtc = cuda_headers(), find_nvrtc(target.cuda)
    if capability not in nvrtc.architectures():
        raise EngineError(
            f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} ({nvrtc.path}): it does not compile for capability {capability}, expected one of "
            f"{', '.join(map(str, nvrtc.architectures()))}; install a newer NVRTC, or name another board with --for"
        )
    if out is None and for_another_machine():
        raise SettingsError(f"plugin build: {compiler()} compiles for another processor, expected --out then, since the cache is for this machine; pass --out")
    path = (out or plugins.cache_folder() / plugins.library_name(version[0])).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
            made, s = Path(work) / path.name, sources()
            flags = [
                f'-DFLASHHEAD_VERSION="{__version__}"',
                f'-DFLASHHEAD_CAPABILITIES="{capability}"',
                f"-I{s.kernels}",
                *(w for folder in (*headers, trt) for w in ("-isystem", str(folder))),
            ]
            launchers, others = [s.kernels / f"{stem}.cu" for stem in LAUNCHERS], [*sorted(s.plugins.glob("*.cpp")), s.nvrtc / "runtime.cpp"]
            make_library(made, launchers, others, s.plugins / "exports.map", flags, nvrtc, "sm_90a" if capability == 90 else f"sm_{capability}", progress)
            said = f"{__version__} tensorrt {'.'.join(map(str, version))}" if for_another_machine() else plugins.version(made)
            os.replace(made, path)
    except OSError as error:
        raise EngineError(f"{path}: it cannot be written ({error.strerror}), expected a folder that can be; name another file with --out") from error
    return BuiltLibrary(path, said, capability, f"{nvrtc.version[0]}.{nvrtc.version[1]}", path.stat().st_size, time.monotonic() - begin)


def compiler() -> str:
    """The C++ compiler."""
    return os.environ.get("CXX") or "g++"


def binutil(name: str) -> str:
    """A tool that reads what the compiler writes: a cross-compiler, such as aarch64-linux-gnu-g++, has its own beside it."""
    own = f"{compiler().removesuffix('g++')}{name}"
    return own if compiler().endswith("-g++") and shutil.which(own) else name


def for_another_machine() -> bool:
    """Whether the compiler writes for another processor than this one, which cannot load the library then."""
    return machine_of_compiler() != platform.machine()


def machine_of_compiler() -> str:
    """The processor that the compiler writes for, such as aarch64."""
    return run([compiler(), "-dumpmachine"]).split("-")[0]


def make_library(
    target: Path,
    launchers: Sequence[Path],
    others: Sequence[Path],
    exports: Path,
    flags: Sequence[str],
    nvrtc: Nvrtc,
    architecture: str,
    progress: Progress = silent,
) -> None:
    """Compile and link a library beside its objects.

    Args:
        target: the file to write, in a folder that is nobody else's.
        launchers: CUDA sources, whose kernels go into the library as cubins.
        others: C++ sources, `runtime.cpp` among them.
        exports: the linker's version script.
        flags: of the compiler: where headers lie, and the like.
        architecture: such as ``sm_90a``.
    Raises:
        EngineError: something does not compile.
    """
    work = target.parent
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread", *flags]
    host = {work / f"{path.stem}.launch.o": ["-include", "cuda_runtime.h", "-x", "c++", str(path)] for path in launchers}
    host |= {work / f"{path.stem}.o": [str(path)] for path in others}
    jobs = min(MOST_JOBS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    with ThreadPoolExecutor(jobs) as pool:
        compiling = {pool.submit(run, [compiler(), *flags, "-c", *what, "-o", str(path)]): Path(what[-1]).name for path, what in host.items()}
        _wait(pool, compiling, "compiling for the host", 0.0, 0.4, progress)
        parts = [(source, group) for source in launchers for group in by_kernel(undefined_kernels(work / f"{source.stem}.launch.o"))]
        device = {
            pool.submit(nvrtc.cubin, source, [expression for _, expression in group], architecture): f"{source.name}, {plain(group[0][1])}"
            for source, group in parts
        }
        _wait(pool, device, f"compiling for {architecture}", 0.4, 0.98, progress)
    table = []
    for number, (future, (_, group)) in enumerate(zip(device, parts)):
        code, names = future.result()
        (work / f"{number}.cubin").write_bytes(code)
        for (symbol, expression), lowered in zip(group, names):
            if symbol != lowered:
                raise EngineError(f"{expression}: NVRTC calls it {lowered}, expected {symbol} as {compiler()} does; report this with both versions")
            table.append((symbol, number))
    progress("linking", 0.99)
    (work / "kernels.s").write_text(assembler(table, len(parts)), encoding="ascii")
    run([compiler(), "-c", "kernels.s", "-o", "kernels.o"], work)
    link = ["-shared", "-pthread", *map(str, host), "kernels.o", f"-Wl,--version-script={exports}", "-Wl,--no-undefined", "-ldl"]
    run([compiler(), *link, "-o", str(target)], work)


def _wait(pool: ThreadPoolExecutor, futures: dict[Any, str], what: str, start: float, end: float, progress: Progress) -> None:
    progress(what, start)
    try:
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            progress(f"{what}: {futures[future]}", start + (end - start) * done / len(futures))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def run(command: list[str], folder: Path | None = None) -> str:
    """What a tool says on its standard output.

    Raises:
        EngineError: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line or "undefined" in line), done.stderr.strip()[-200:] or "it gives no reason")
        raise EngineError(f"plugin library: {command[0]} fails ({said.strip()}), expected it to compile; look that --tensorrt-include and the compiler fit")
    return done.stdout


def undefined_kernels(path: Path) -> list[tuple[str, str]]:
    """The kernels that an object of launchers leaves open: symbols, and what they are in C++. All are of namespace fh, or called flashhead_."""
    symbols = [line.split()[-1] for line in run([binutil("nm"), "-u", str(path)]).splitlines() if line.strip()]
    symbols = [s for s in symbols if s.startswith(("_ZN2fh", "flashhead_"))]
    names = run([binutil("c++filt"), *symbols]).splitlines() if symbols else []
    return [(symbol, expression_of(name)) for symbol, name in zip(symbols, names)]


def expression_of(name: str) -> str:
    """The kernel in ``void fh::rms_norm<fh::Fp16>(unsigned short const*, int)``."""
    depth, end = 0, len(name)
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    return name[:end].removeprefix("void ")


def plain(expression: str) -> str:
    """A kernel's name alone."""
    return expression.split("<")[0].split("::")[-1]


def by_kernel(kernels: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """All instances of a template together, and all kernels that are none."""
    found: dict[str, list[tuple[str, str]]] = {}
    for symbol, expression in kernels:
        found.setdefault(plain(expression) if "<" in expression else "", []).append((symbol, expression))
    return list(found.values())


def assembler(table: list[tuple[str, int]], cubins: int) -> str:
    """Cubins, an address for each kernel, and the table of runtime.cpp."""
    lines = ["    .section .rodata"]
    for number in range(cubins):
        lines += ["    .balign 64", f"cubin_{number}:", f'    .incbin "{number}.cubin"']
    for at, (symbol, _) in enumerate(table):
        lines += [f"name_{at}:", f'    .asciz "{symbol}"']
    lines.append("    .balign 8")
    for symbol, _ in table:
        lines += [f"    .globl {symbol}", f"    .hidden {symbol}", f"{symbol}:", "    .byte 0"]
    lines += ['    .section .data.rel.ro,"aw"', "    .balign 8", "    .globl flashhead_kernels", "    .hidden flashhead_kernels", "flashhead_kernels:"]
    lines += [f"    .quad {symbol}, name_{at}, cubin_{number}" for at, (symbol, number) in enumerate(table)]
    return "\n".join([*lines, "    .quad 0, 0, 0", '    .section .note.GNU-stack,"",%progbits', ""])
