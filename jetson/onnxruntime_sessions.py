"""ONNX Runtime's sessions: how they are opened, and what their failures mean."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_edge.errors import CheckpointError, DeviceError, EngineError
from flashhead_edge.jetson.folder import AGAIN

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OUT_OF_MEMORY = re.compile(r"allocate memory|bad.?alloc|out of memory", re.IGNORECASE)  # as ONNX Runtime says it, whatever the class of its error

WORKS = "1.23.2 and 1.32.0 work"  # the versions of ONNX Runtime that tests run
TOO_OLD = ("not a registered function/op", "IR version", "opset", "NOT_IMPLEMENTED", "domain_version")  # in what it says of a model it does not know


def usable_threads() -> int:
    """CPUs that this process is bound to where that is fewer than there are; else 0, with which ONNX Runtime takes one thread for each physical core."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return bound if bound < (os.cpu_count() or 1) else 0


NATIVE_HEAD, NATIVE_BODY = NATIVE = ("head_native", "body_native")  # the parts that are one operator of ours each


def native_library() -> Path | None:
    """The library of our own operators, None where this installation was made without a C compiler."""
    found = importlib.util.find_spec("flashhead_edge.jetson._native")
    return None if found is None or found.origin is None else Path(found.origin)


def vector_unit() -> str | None:
    """What the library's products of a body run on: avx512vnni, avx2, or plain loops; None without the library."""
    if native_library() is None:
        return None
    from flashhead_edge.jetson import _native

    return str(_native.vector_unit)


def parts_of(folder: Path, native: bool = True) -> tuple[str, str]:
    """The parts of an exported folder that run here: the body and the head, ours where the folder and this installation have them.

    Plain loops of our body are slower than standard operators.
    """
    head, body = (native and (folder / f"{part}.onnx").is_file() for part in NATIVE)
    return (
        NATIVE_BODY if body and vector_unit() not in (None, "plain") else "body",
        NATIVE_HEAD if head and native_library() is not None else "head",
    )


def open_model(path: Path, threads: int) -> InferenceSession:
    """An ONNX model as a session on the CPU, with our own operators where it is one of the native parts.

    Raises:
        CheckpointError: the file or its external data is damaged.
        EngineError: ONNX Runtime is missing or does not know the model's operators, or our library is not there or cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"onnxruntime is not installed, expected it to run {path.name} ({WORKS}); pip install 'flashhead-edge[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: they come as exceptions as well, warnings are about graphs that nobody can change here
    # Threads that wait must not spin: beside another program on the same cores two of them then take twice the time of one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # It would keep a plan of a step's memory for every length of a text that it has met: 6 KB each for 30 layers, and no quicker for it.
    options.enable_mem_pattern = False
    if path.stem in NATIVE:
        library = native_library()
        if library is None:
            raise EngineError(f"{path}: this installation has no library of native operators, expected one; install flashhead-edge with a C compiler")
        try:
            options.register_custom_ops_library(str(library))
        except runtime_errors() as error:
            if "is older than" in str(error):
                raise EngineError(f"{path}: ONNX Runtime {onnxruntime.__version__} is too old for native operators, expected a newer one: {WORKS}") from error
            reason = f"ONNX Runtime {onnxruntime.__version__} cannot load it ({short(error)})"
            raise EngineError(f"{library}: {reason}, expected a library built for this machine; install flashhead-edge again") from error
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except runtime_errors() as error:
        text, version = str(error), onnxruntime.__version__
        reason = short(error)
        if "xternal" in text:
            raise CheckpointError(f"{path}: its external data is missing or cut off ({reason}); restore the .data files beside it, or {AGAIN}") from error
        if any(mark in text for mark in TOO_OLD):
            raise EngineError(f"{path}: ONNX Runtime {version} does not know what the model needs ({reason}), expected a newer one: {WORKS}") from error
        if OUT_OF_MEMORY.search(reason):
            raise failed(path.name, error) from error
        raise CheckpointError(f"{path}: ONNX Runtime {version} cannot read the model ({reason}); restore the file, or {AGAIN}") from error


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its classes have no common base of their own, and a run with bound arrays raises plain RuntimeErrors."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return RuntimeError, *(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def failed(what: str, error: Exception) -> EngineError | DeviceError:
    """A run that ONNX Runtime did not end, in a sentence."""
    reason = short(error)
    if OUT_OF_MEMORY.search(reason):
        return DeviceError(f"{what}: there is too little memory ({reason}), expected room for the model; free some, or raise the process's limit")
    return EngineError(f"{what}: ONNX Runtime failed ({reason}), expected a result; {AGAIN}")


def short(error: Exception) -> str:
    """What ONNX Runtime says, without its codes and its own source lines."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S*/?\w+\.(cc|h):\d+ .*?\) ", "", text)
    text = re.sub(r"\S*\w+\.(cc|h):\d+ (\w+ )?", "", text)
    return text[:300].rstrip(" .")
