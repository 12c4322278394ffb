"""What this machine has: Python, torch, GPU, CUDA, TensorRT, vLLM, ONNX Runtime, Jetson; and what that enables.

Every fact is looked up in the way that costs least and can fail alone: a broken installation is a fact, not a crash.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashhead_edge import __version__

RUNTIMES = {  # of TensorRT: modules, the first that has its classes; what it enables
    "TensorRT": (("tensorrt",), "export tensorrt, and generate and chat of what it wrote"),
    "TensorRT-RTX": (("tensorrt_rtx_bindings", "tensorrt_rtx"), "export tensorrt --runtime tensorrt_rtx: native layers alone, it takes no plugins"),
    "TensorRT lean": (("tensorrt_lean_bindings", "tensorrt_lean"), "trying the plugins without a builder (scripts/plugin_lean.py)"),
}
# In a process of its own: a TensorRT that is broken may end it. Prints the module's version, then what its loading of the plugin library says.
LOOK = """
import importlib, sys
from pathlib import Path
from flashhead_edge.errors import DeviceError, EngineError
from flashhead_edge.jetson import plugins
from flashhead_edge.jetson.driver import device_facts
try:
    module = importlib.import_module(sys.argv[1])
    print(module.__version__, flush=True)
except (ImportError, OSError, AttributeError) as error:
    print("!", *str(error).split(), flush=True)
    sys.exit()
try:
    capability = device_facts().capability
except DeviceError:
    capability = None
try:
    library = plugins.find_library(int(module.__version__.split(".")[0]), None, capability)
    print(library, plugins.version(library), sep="\\n", flush=True)
    plugins.load_library(module, library)
    print("loads")
except EngineError as error:
    print("!", error)
"""


@dataclass(frozen=True)
class Fact:
    """One thing that was looked for."""

    name: str
    found: bool
    version: str | None
    detail: str | None  # what was found, or why it was not
    enables: str  # what it is good for here


def examine() -> dict[str, Any]:
    """All facts, as JSON: `flashhead_edge` (version) and `facts`, a list of `Fact`."""
    looks: tuple[Callable[[], Fact], ...] = (
        python,
        processor,
        memory,
        disk,
        torch,
        lambda: package("transformers", "reading models, calibrating, generating (extra: torch)", minimum=5),
        lambda: package("gguf", "GGUF files as input (extra: torch)"),
        gpu,
        torch_cuda,
        lambda: library("CUDA driver", "cuda", "running kernels on an NVIDIA GPU"),
        lambda: library(
            "CUDA NVRTC",
            "nvrtc",
            "flashhead_edge.kernels and generate --backend cuda: compiling kernels without a toolchain",
            packages=("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
        ),
        launchers,
        lambda: package("vllm", "serving: vllm serve OUT (0.26 or newer, on a GPU)"),
        onnxruntime,
        lambda: package("llguidance", "answers that follow a JSON schema or a pattern (extra: grammar)"),
        lambda: package("onnxruntime-genai", "export onnx with the decoder's body (extra: export)"),
        jetson,
    )
    return {"flashhead_edge": __version__, "facts": [asdict(fact) for fact in (*(look() for look in looks), *tensorrt(), *made_ahead(), *board())]}


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person, one line a fact."""
    facts = report["facts"]
    width = max(len(f["name"]) for f in facts)
    out = [f"flashhead-edge {report['flashhead_edge']}"]
    for f in facts:
        what = " ".join(x for x in (f["version"], f"({f['detail']})" if f["detail"] else None) if x) or ("found" if f["found"] else "not found")
        out.append(f"{'yes' if f['found'] else 'no ':<3} {f['name']:<{width}}  {what}: {f['enables']}")
    return out


def python() -> Fact:
    return Fact("Python", True, platform.python_version(), f"{sys.executable}, {platform.system()} {platform.machine()}", "everything; 3.10 or newer is needed")


def processor() -> Fact:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_tile", "asimd", "asimddp", "i8mm") if re.search(rf"\b{f}\b", text)]
    detail = ", ".join([f"{usable} cores", *([model[1].strip()] if model else []), *flags])
    return Fact("processor", True, None, detail, "the reference head in torch; more cores convert faster")


def memory() -> Fact:
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if not sizes:
        return Fact("memory", False, None, "/proc/meminfo cannot be read", "converting needs the head, and the model once for calibration")
    total, free = (int(sizes.get(k, 0)) / 2**20 for k in ("MemTotal", "MemAvailable"))
    return Fact("memory", True, None, f"{free:.1f} of {total:.1f} GiB available", "converting needs the head, and the model once for calibration")


def disk() -> Fact:
    usage = shutil.disk_usage(".")
    return Fact(
        "disk",
        True,
        None,
        f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free here",
        "a checkpoint is as large as its model, and a few percent more",
    )


def package(name: str, enables: str, minimum: int | None = None) -> Fact:
    """An installed distribution, not imported."""
    version = _version(name)
    if version is None:
        return Fact(name, False, None, None, enables)
    old = minimum is not None and int(re.match(r"\d*", version)[0] or 0) < minimum  # type: ignore[index]
    return Fact(name, not old, version, f"too old: {minimum}.0 or newer is needed" if old else None, enables)


def torch() -> Fact:
    enables = "convert, calibrate, evaluate, generate, chat (extra: torch)"
    version = _version("torch")
    if version is None:
        return Fact("torch", False, None, "pip install 'flashhead-edge[torch]'", enables)
    try:
        import torch as module
    except (ImportError, OSError) as error:  # OSError: a shared library of it cannot be loaded
        return Fact("torch", False, version, f"installed, but does not load: {_line(error)}", enables)
    return Fact("torch", True, module.__version__, f"{module.get_num_threads()} threads", enables)


def gpu() -> Fact:
    enables = "converting and calibrating faster"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Fact("NVIDIA GPU", False, None, "nvidia-smi is not found", enables)
    query = [tool, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Fact("NVIDIA GPU", False, None, f"nvidia-smi failed: {_line(error)}", enables)
    rows = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if result.returncode or not rows:
        return Fact("NVIDIA GPU", False, None, f"nvidia-smi failed: {_line(result.stdout or result.stderr)}", enables)
    driver = rows[0].rsplit(", ", 1)[-1]
    return Fact("NVIDIA GPU", True, driver, "; ".join(rows), enables)


def torch_cuda() -> Fact:
    enables = "converting and calibrating on the GPU"
    try:
        import torch as module
    except (ImportError, OSError):
        return Fact("torch CUDA", False, None, "torch does not load", enables)
    version = module.version.cuda
    if version is None:
        return Fact("torch CUDA", False, None, "this build of torch is without CUDA", enables)
    if not module.cuda.is_available():
        return Fact("torch CUDA", False, version, "built with CUDA, but it finds no GPU that it can use", enables)
    return Fact("torch CUDA", True, version, f"{module.cuda.device_count()} GPU", enables)


def library(name: str, short: str, enables: str, packages: tuple[str, ...] = ()) -> Fact:
    """A shared library on the loader's path, or a distribution that brings it."""
    for package_name in packages:
        version = _version(package_name)
        if version is not None:
            return Fact(name, True, version, f"package {package_name}", enables)
    path = ctypes.util.find_library(short)
    return Fact(name, path is not None, None, path, enables)


def launchers() -> Fact:
    """The launchers of our kernels, which a C++ compiler made when the package was installed; not whether they load: that is a backend's to say."""
    enables = "generate --backend cuda: checkpoints on an NVIDIA GPU (8.0 or newer) with NVRTC, without torch"
    found = importlib.util.find_spec("flashhead_edge.jetson._cuda")
    why = "installed where no C++ compiler was, or not on Linux" if found is None else None
    return Fact("CUDA launchers", found is not None, None, why or (found.origin if found else None), enables)


def made_ahead(base: Path | None = None) -> list[Fact]:
    """What `flashhead bundle` made for this installation, and whether it is for this GPU; nothing where there is none.

    Args:
        base: where it lies; None: in this environment.
    """
    from flashhead_edge.errors import DeviceError
    from flashhead_edge.jetson.cuda_ahead import came_with
    from flashhead_edge.jetson.driver import device_facts

    enables = "a first start of --backend cuda that neither lays weights out nor compiles"
    try:
        facts, gpu = device_facts(), ""
    except DeviceError as error:
        facts, gpu = None, _line(error)
    came = came_with(facts, base)
    if came is None:
        return []
    if facts is not None:
        gpu = f"this one, {facts.capability / 10} with {facts.multiprocessors} multiprocessors, is {'one of them' if came.here else 'none of them'}"
    return [Fact("made ahead", came.here, None, f"programs for {came.gpus} GPUs, {came.kernels} kernels; {gpu}", enables)]


def tensorrt() -> list[Fact]:
    """Which TensorRT there is, and whether our plugin library loads in it."""
    facts, plugin = [], None
    for name, (modules, enables) in RUNTIMES.items():
        module = next((m for m in modules if importlib.util.find_spec(m)), None)
        if module is None:
            continue
        version, *said = _look(module)
        broken = version.startswith("! ")
        facts.append(Fact(name, not broken, None if broken else version, f"installed, but does not load: {version[2:]}" if broken else module, enables))
        if name != "TensorRT-RTX" and not broken and plugin is None:
            plugin = _plugin_library(f"{name} {version}", said)
    if not any(f.name == "TensorRT" for f in facts):
        path = ctypes.util.find_library("nvinfer")
        detail = f"{path}, but no Python module" if path else "no module tensorrt: it comes with JetPack (--system-site-packages), or pip install tensorrt"
        facts.insert(0, Fact("TensorRT", False, None, detail, RUNTIMES["TensorRT"][1]))
    return [*facts, plugin or _plugin_library("", [])]


def _plugin_library(runtime: str, said: list[str]) -> Fact:
    """What became of the plugin library: its path, its version, and `loads` or what was wrong."""
    enables = "engines whose head and layers are ours; made by flashhead plugin build"
    if not runtime:
        return Fact("TensorRT plugins", False, None, "no TensorRT to load them", enables)
    wrong = next((line[2:] for line in said if line.startswith("! ")), None)
    if wrong is None and said[-1:] != ["loads"]:
        wrong = f"loading them ends the process in {runtime}"
    version = next((line for line in said[1:2] if not line.startswith("! ")), None)
    return Fact("TensorRT plugins", wrong is None, version, wrong or f"{said[0]} loads in {runtime}", enables)


def _look(module: str) -> list[str]:
    """The lines of LOOK for a module, at least one."""
    try:
        done = subprocess.run([sys.executable, "-c", LOOK, module], capture_output=True, text=True, errors="replace", timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"! {_line(error)}"]
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines or [f"! {_line(done.stderr) or f'the process ended with {done.returncode}'}"]


def onnxruntime() -> Fact:
    enables = "generate, chat and evaluate of an export, without torch (extra: onnx)"
    version = next((v for v in map(_version, ("onnxruntime-gpu", "onnxruntime")) if v), None)
    if version is None:
        return Fact("ONNX Runtime", False, None, None, enables)
    try:
        import onnxruntime as module
    except (ImportError, OSError) as error:
        return Fact("ONNX Runtime", False, version, f"installed, but does not load: {_line(error)}", enables)
    from flashhead_edge.jetson.onnxruntime_sessions import vector_unit

    unit = vector_unit()
    native = "no native operators: flashhead-edge was installed without a C compiler" if unit is None else f"native operators on {unit}"
    return Fact("ONNX Runtime", True, version, f"{', '.join(module.get_available_providers())}; {native}", enables)


def jetson(root: str | Path = "/") -> Fact:
    """The board from its device tree, the software from its release file. `root` is the file system looked at."""
    from flashhead_edge.jetson.board import read_board

    enables, found = "exports in ONNX Runtime and TensorRT; flashhead monitor shows it live, flashhead plan says what fits", read_board(root)
    if found.tegra is None:
        return Fact("Jetson", False, None, None, enables)
    version = None if found.l4t is None else f"L4T {found.l4t}" + (f", JetPack {found.jetpack}" if found.jetpack else "")
    unread = "; ".join(f"{path} cannot be read: {why}" for path, why in found.unread.items())
    return Fact("Jetson", True, version, "; ".join(x for x in (found.title, unread) if x), enables)


def board(root: str | Path = "/") -> list[Fact]:
    """What holds a Jetson's speed back and what to type; nothing on another machine. `root` is the file system looked at."""
    from flashhead_edge.jetson.board_advice import held_back

    return [Fact(f.name, f.good, f.state, f.detail, f.remedy) for f in held_back(root)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _line(text: object) -> str:
    return " ".join(str(text).split())[:200]
