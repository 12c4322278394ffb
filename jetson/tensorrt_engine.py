"""One serialised engine in TensorRT: its tensors by name, contexts, addresses. What differs between versions of the runtime's API stands here."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.driver import Stream

LINES = 5  # of TensorRT's log that are kept
ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "BOOL": 1, "INT8": 1, "UINT8": 1}


def load_tensorrt() -> Any:
    """TensorRT's Python module.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise EngineError(
            f"tensorrt: the Python module cannot be imported ({error}), expected TensorRT; it comes with JetPack (a virtual environment needs "
            "--system-site-packages), or: pip install tensorrt"
        ) from error
    return tensorrt


@dataclass(frozen=True)
class Tensor:
    """An input or output."""

    name: str
    is_input: bool
    kind: str  # TensorRT's name of its type, such as HALF
    shape: tuple[int, ...]  # -1 where it is open

    def bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * ITEM_BYTES[self.kind]


class Runtime:
    """TensorRT's runtime in this process. Look for a GPU before one is made: without one 8.6 ends the process."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.said: deque[str] = deque(maxlen=LINES)
        said = self.said

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    said.append(" ".join(message.split()))

        self.logger = Logger()
        self.runtime = trt.Runtime(self.logger)

    def why(self) -> str:
        """The last that TensorRT complained of."""
        return "; ".join(self.said) or "it gave no reason"

    def engine(self, path: Path, why: Any) -> Engine:
        """A serialised engine.

        Args:
            why: a function that tells what a plugin complained of.
        Raises:
            EngineError: TensorRT refuses it.
        """
        made = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if made is None:
            raise EngineError(
                f"{path}: TensorRT {self.trt.__version__} does not read the engine ({why() or self.why()}), expected one that it built for this GPU; "
                "build the engines on this machine with flashhead export engines"
            )
        return Engine(self, path.stem, made)


class Engine:
    """An engine and what it reads and writes."""

    def __init__(self, runtime: Runtime, name: str, engine: Any) -> None:
        self.runtime, self.name, self.engine = runtime, name, engine
        trt = runtime.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.tensors = {
            n: Tensor(n, engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT, engine.get_tensor_dtype(n).name, tuple(engine.get_tensor_shape(n)))
            for n in names
        }  # fmt: skip

    def context(self, profile: int, stream: Stream, why: Any) -> Context:
        """A context on one of the engine's profiles.

        Raises:
            EngineError: TensorRT makes none, for want of memory above all.
        """
        made = self.engine.create_execution_context()
        if made is None or not made.set_optimization_profile_async(profile, stream.handle):
            raise EngineError(f"{self.name}: TensorRT makes no context ({why() or self.runtime.why()}), expected one; free memory of the GPU")
        stream.wait()
        return Context(self, made)


class Context:
    """One way through an engine: shapes and addresses are kept from call to call."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self.engine, self.context = engine, context

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of inputs, and addresses of tensors.

        Raises:
            EngineError: a shape is outside of the profile.
        """
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise EngineError(f"{self.engine.name}: {name} of shape {list(shape)} is outside of what the engine was built for; export again with more")
        for name, address in addresses.items():
            self.context.set_tensor_address(name, address)

    def run(self, stream: Stream, why: Any) -> None:
        """Put one run into a stream.

        Raises:
            EngineError: TensorRT or a plugin refuses.
        """
        if not self.context.execute_async_v3(stream.handle):
            raise EngineError(f"{self.engine.name}: the run failed ({why() or self.engine.runtime.why()}), expected none to; look at flashhead doctor")


def to_float32(values: np.ndarray, precision: str) -> np.ndarray:
    """Values in 16 bits, bfloat16 as uint16, as float32."""
    if precision == "float16":
        return values.astype(np.float32)
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_half(values: np.ndarray, precision: str) -> np.ndarray:
    """float32 rounded to nearest, bfloat16 as uint16."""
    if precision == "float16":
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
