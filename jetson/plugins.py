"""The library of TensorRT plugins: found, looked at, loaded into TensorRT, and asked. See docs/tensorrt.md."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from flashhead_edge.errors import EngineError
from flashhead_edge.program.ahead import ahead_folder

_loaded: dict[str, Path] = {}  # by TensorRT's module: its registry keeps plugins by name, so that a second library would be passed over
ALONE = 87  # Orin: other GPUs of its major version do not run its code, nor it theirs
HOW = "make it with: flashhead plugin build --tensorrt-include DIR, DIR being the folder of NvInfer.h"


def library_name(tensorrt_major: int) -> str:
    """The file of the library for a major version of TensorRT."""
    return f"libflashhead_plugins_trt{tensorrt_major}.so"


def cache_folder() -> Path:
    """Where `flashhead plugin build` puts it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashhead-edge" / "plugins"


def find_library(tensorrt_major: int, given: Path | None = None, capability: int | None = None) -> Path:
    """The library for a TensorRT: the one given, else the one in the cache, in the environment (for all who run it), or that `make plugin` left in a clone.

    Args:
        capability: of the GPU that shall run it, 87 for 8.7; None: that is not looked at.
    Raises:
        EngineError: there is none, or it has no kernels for that GPU.
    """
    path = _placed(tensorrt_major, given)
    if capability is not None:
        check_capability(path, capability)
    return path


def _placed(tensorrt_major: int, given: Path | None) -> Path:
    name = library_name(tensorrt_major)
    if given is not None:
        if not given.is_file():
            raise EngineError(f"{given}: the plugin library is not there, expected {name}; name another file, or {HOW}")
        return given.resolve()  # a bare name would be looked for among the system's libraries
    places = [cache_folder() / name, ahead_folder() / "plugins" / name, Path(__file__).resolve().parents[1] / "build" / "plugin" / name]
    for path in places:
        if path.is_file():
            return path
    raise EngineError(f"{name}: no plugin library was found (looked for {places[0]}), expected one for TensorRT {tensorrt_major}; {HOW}")


def opened(path: Path) -> ctypes.CDLL:
    """The library itself, once it is known to be ours.

    Raises:
        EngineError: it cannot be loaded, or is somebody else's.
    """
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path}: the plugin library cannot be loaded ({error}), expected one built for this machine; {HOW}") from error
    if not hasattr(found, "flashhead_plugin_version"):
        raise EngineError(f"{path}: the library is not ours (it has no flashhead_plugin_version), expected {library_name(0).replace('0', 'N')}; {HOW}")
    return found


def text_of(path: Path, function: str, *arguments: bytes) -> str | None:
    """What a function of the library says."""
    f = getattr(opened(path), function)
    f.restype, f.argtypes = ctypes.c_char_p, [ctypes.c_char_p] * len(arguments)
    found = f(*arguments)
    return None if found is None else found.decode(errors="replace")


def version(path: Path) -> str:
    """Its own version and that of the TensorRT whose headers it was made with, such as ``0.1.0 tensorrt 8.6.0``."""
    return text_of(path, "flashhead_plugin_version") or ""


def check_capability(path: Path, capability: int) -> None:
    """Raise EngineError where the library has no kernels for a GPU of a capability, 87 for 8.7."""
    if not hasattr(opened(path), "flashhead_plugin_capabilities"):
        raise EngineError(f"{path}: the plugin library is of an older version, which does not say its GPUs, expected one of this version; {HOW}")
    made_for = [int(word) for word in (text_of(path, "flashhead_plugin_capabilities") or "").split()]
    if not any(runs_on(made, capability) for made in made_for):
        raise EngineError(
            f"{path}: the plugin library has kernels for capability {', '.join(map(str, made_for))}, found a GPU of {capability}, expected one for it; {HOW}"
        )


def runs_on(made_for: int, capability: int) -> bool:
    """Whether a GPU runs code that was compiled for a capability: the same major version, no older minor one, Orin's apart.

    Source: CUDA's programming guide, binary compatibility. Code for 90 is for sm_90a, which runs on 9.0 alone.
    """
    if ALONE in {made_for, capability}:
        return made_for == capability
    return made_for // 10 == capability // 10 and made_for <= capability


def load_library(trt: Any, path: Path) -> None:
    """Load the library into TensorRT, once a process: its plugins can then be parsed, built and deserialised.

    Raises:
        EngineError: it is somebody else's, or made for another major version of TensorRT, or TensorRT refuses it; another one has been loaded.
    """
    made_for = version(path).split()[-1].split(".")[0]
    here = str(trt.__version__).split(".")[0]
    if made_for != here:
        raise EngineError(f"{path}: the plugin library was made for TensorRT {made_for}, found TensorRT {trt.__version__}, expected equal majors; {HOW}")
    registry = trt.get_plugin_registry()
    if _has_plugins(registry):  # by us, or by the program itself
        before = _loaded.setdefault(trt.__name__, path.resolve())
        if before != path.resolve():
            raise EngineError(
                f"{path}: this process has loaded another plugin library ({before}), expected one library a process; give that one, or start another process"
            )
        return
    if registry.load_library(str(path)) is None:
        raise EngineError(f"{path}: TensorRT {trt.__version__} does not load the plugin library ({last_error(path) or 'it says no more'}); {HOW}")
    if not _has_plugins(registry):
        raise EngineError(f"{path}: TensorRT {trt.__version__} has no plugin FlashHead after loading the library, expected one; {HOW}")
    _loaded[trt.__name__] = path.resolve()


def _has_plugins(registry: Any) -> bool:
    listed = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    return any((c.name, c.plugin_namespace) == ("FlashHead", "flashhead") for c in listed)


def add_folder(path: Path, folder: Path) -> None:
    """Tell the library where a file of weights lies.

    Raises:
        EngineError: it refuses the folder.
    """
    wrong = text_of(path, "flashhead_add_folder", str(folder).encode())
    if wrong:
        raise EngineError(f"{path.name}: {wrong}")


def last_error(path: Path) -> str:
    """The last thing that went wrong in a plugin of this process."""
    return text_of(path, "flashhead_last_error") or ""


def device_bytes(path: Path) -> int:
    """Bytes of weights that the library holds on all devices."""
    f = opened(path).flashhead_device_bytes
    f.restype = ctypes.c_longlong
    return int(f())
