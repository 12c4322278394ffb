"""Compiling the CUDA sources with NVRTC for the device found, once a machine: a disk cache under a file lock."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flashhead_edge.errors import DeviceError


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashhead-edge" / "kernels"


def sources_folder() -> Path:
    """The folder of the CUDA sources and their headers."""
    installed = Path(__file__).parent / "sources"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "plugins_trt" / "kernels"


def architecture_of(device: torch.device) -> str:
    """What kernels are compiled for on a device that torch sees, such as ``sm_90``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def capability_of(architecture: str) -> int:
    """10 times the capability that an architecture names: 90 of ``sm_90``, ``sm_90a`` and ``compute_90``."""
    return int("".join(c for c in architecture if c.isdigit()))


def compiled(source: str, architecture: str) -> bytes:
    """The cubin of a source for one architecture, from the cache or compiled into it.

    Args:
        source: file name in the folder of sources, such as ``head_step.cu``.
        architecture: such as ``sm_90``; ``compute_87`` gives PTX.
    Raises:
        DeviceError: cuda-core is not installed, or NVRTC refuses the source.
    """
    return _cached(source, architecture, "")


def instantiated(source: str, instance: str, architecture: str) -> tuple[bytes, str]:
    """The cubin of a source with one of its templates instantiated, such as ``fh::rms_norm<fh::Fp16>``, and the kernel's name in it."""
    name, _, code = _cached(source, architecture, instance).partition(b"\n")
    return code, name.decode()


def _cached(source: str, architecture: str, instance: str) -> bytes:
    """What is kept of a compilation: the code; of an instance its name and a line's end before it."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions
        from filelock import FileLock
    except ImportError as error:
        raise DeviceError(f"CUDA kernels: {error.name} is not installed, expected it beside torch; pip install 'flashhead-edge[cuda]'") from error
    folder = sources_folder()
    headers = sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])
    digest = hashlib.sha256(repr((source, architecture, instance, nvrtc.nvrtcVersion())).encode())
    for file in [folder / source, *headers]:
        digest.update(file.read_bytes())
    target = cache_folder() / f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:20]}.bin"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(f"CUDA kernels: {target.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can") from error
    with FileLock(f"{target}.lock"):
        if target.exists():
            digest_, code = target.read_bytes()[:32], target.read_bytes()[32:]
            if digest_ == hashlib.sha256(code).digest():  # else a damaged file: made anew
                return code
        options = ProgramOptions(name=source, arch=architecture, std="c++17", include_path=[str(folder)])
        names = (instance,) if instance else ()
        try:
            program = Program((folder / source).read_text(encoding="utf-8"), "c++", options)
            found = program.compile("ptx" if architecture.startswith("compute") else "cubin", name_expressions=names)
        except Exception as error:
            raise DeviceError(f"CUDA kernels: {source} does not compile for {architecture} ({error}); use the torch backend, and report this") from error
        kept = found.code
        if instance:
            name = found.symbol_mapping[instance]
            kept = (name if isinstance(name, bytes) else name.encode()) + b"\n" + kept
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_bytes(hashlib.sha256(kept).digest() + kept)
        os.replace(partial, target)
        return bytes(kept)


def check(result: tuple[Any, ...], what: str | Callable[[], str]) -> Any:
    """The value of a driver call, or DeviceError with the driver's own name of what failed; `what` names the kernel."""
    code, *values = result
    if int(code):
        raise DeviceError(
            f"CUDA kernels: {what if isinstance(what, str) else what()}: the driver returned {code.name}, expected success; see the driver's page of that name"
        )
    return values[0] if values else None


@cache
def function(source: str, name: str, device: int, architecture: str) -> Any:
    """A kernel loaded in the current context of `device`, allowed all the shared memory that the device gives to a block."""
    return _loaded(compiled(source, architecture), name, device)


@cache
def instance(source: str, expression: str, device: int, architecture: str) -> Any:
    """As `function`, of an instance of a template."""
    return _loaded(*instantiated(source, expression, architecture), device)


Prepared = Callable[[int], None]  # launches on a stream


def launch(handle: Any, blocks: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, arguments: Any, **options: Any) -> None:
    """Launch a kernel; arguments and options as in `prepare`."""
    prepare(handle, blocks, threads, shared_bytes, arguments, **options)(stream)


def prepare(
    handle: Any,
    blocks: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: Any,
    *,
    cooperative: bool = False,
    overlap: bool = False,
    cluster: int = 1,
) -> Prepared:
    """A launch of a kernel that can be made many times.

    Args:
        arguments: (values, ctypes), or the one structure that the kernel takes, which is read at each launch.
        cooperative: all blocks resident, or an error instead of a hang; overlap: it may begin while the launch before it ends
            (capability 9.0 and up); cluster: blocks along x that form a thread block cluster.
    """
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    attributes = []
    if cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id, attribute.value.cooperative = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1
        attributes.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    last = None
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments)) if isinstance(arguments, ctypes.Structure) else None

    def what() -> str:
        name = driver.cuFuncGetName(handle)[1].decode()
        return f"{name} in {blocks[0]} x {blocks[1]} blocks of {threads} threads with {shared_bytes} bytes of shared memory"

    def run(stream: int) -> None:
        nonlocal last
        if stream != last:
            config.hStream = last = stream
        check(driver.cuLaunchKernelEx(config, handle, arguments if pointers is None else ctypes.addressof(pointers), 0), what)

    return run


def _loaded(code: bytes, name: str, device: int) -> Any:
    from cuda.bindings import driver, nvrtc

    check_versions(check(driver.cuDriverGetVersion(), name) // 1000, nvrtc.nvrtcVersion()[1])
    module = check(driver.cuModuleLoadData(code + b"\0"), name)  # PTX ends with a zero, a cubin may
    handle = check(driver.cuModuleGetFunction(module, name.encode()), name)
    most = check(driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device), name)
    static = static_shared(handle, name)
    check(driver.cuFuncSetAttribute(handle, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - static), name)
    return handle


def check_versions(driver: int, compiler: int) -> None:
    """Raise DeviceError where the driver's major version of CUDA is below the compiler's: it does not load what that makes."""
    if compiler > driver:
        raise DeviceError(
            f"CUDA kernels: NVRTC is of CUDA {compiler} and the driver of CUDA {driver}, expected no newer compiler than driver; update the driver, or "
            f"pip install 'nvidia-cuda-nvrtc-cu{driver}' 'cuda-bindings=={driver}.*'"
        )


def static_shared(handle: Any, name: str) -> int:
    """Bytes of shared memory that a loaded kernel declares itself."""
    from cuda.bindings import driver

    return int(check(driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle), name))
