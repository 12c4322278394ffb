"""Compiling the CUDA sources with NVRTC for the device found, once a machine: a disk cache under a file lock."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from flashhead_edge.errors import DeviceError


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashhead-edge" / "kernels"


def sources_folder() -> Path:
    """The folder of the CUDA sources and their headers."""
    installed = Path(__file__).parent / "sources"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "plugins_trt" / "kernels"


def compiled(source: str, architecture: str) -> bytes:
    """The cubin of a source for one architecture, from the cache or compiled into it.

    Args:
        source: file name in the folder of sources, such as ``head_step.cu``.
        architecture: such as ``sm_90``; ``compute_87`` gives PTX.
    Raises:
        DeviceError: cuda-core is not installed, or NVRTC refuses the source.
    """
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions
        from filelock import FileLock
    except ImportError as error:
        raise DeviceError(f"CUDA kernels: {error.name} is not installed, expected it beside torch; pip install 'flashhead-edge[cuda]'") from error
    folder = sources_folder()
    headers = sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])
    digest = hashlib.sha256(repr((source, architecture, nvrtc.nvrtcVersion())).encode())
    for file in [folder / source, *headers]:
        digest.update(file.read_bytes())
    target = cache_folder() / f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:20]}.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target.read_bytes()
        options = ProgramOptions(name=source, arch=architecture, std="c++17", include_path=[str(folder)])
        try:
            code = Program((folder / source).read_text(encoding="utf-8"), "c++", options).compile("ptx" if architecture.startswith("compute") else "cubin").code
        except Exception as error:
            raise DeviceError(f"CUDA kernels: {source} does not compile for {architecture} ({error}); use the torch backend, and report this") from error
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_bytes(code)
        os.replace(partial, target)
        return bytes(code)


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or DeviceError with the driver's own name of what failed."""
    code, *values = result
    if int(code):
        raise DeviceError(f"CUDA driver: a kernel call returned {code.name}, expected success; see the driver's page of that name")
    return values[0] if values else None


@cache
def function(source: str, name: str, device: int, architecture: str) -> Any:
    """A kernel loaded in the current context of `device`, allowed all the shared memory that the device gives to a block."""
    from cuda.bindings import driver

    module = check(driver.cuModuleLoadData(compiled(source, architecture) + b"\0"))  # PTX ends with a zero, a cubin may
    handle = check(driver.cuModuleGetFunction(module, name.encode()))
    most = check(driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device))
    static = check(driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle))
    check(driver.cuFuncSetAttribute(handle, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - static))
    return handle
