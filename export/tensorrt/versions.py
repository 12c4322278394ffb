"""Every difference between TensorRT 8.6, 10.0 to 11.4 and TensorRT-RTX, found by asking for the feature, never for the version.

Nothing of TensorRT is imported at module level: a module `trt` is handed in, which `load` finds. Failures of TensorRT are values (None,
False), and their reasons go to its logger: here they become errors.
"""

from __future__ import annotations

import threading
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.progress import Progress

RUNTIMES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}  # modules, the first that is there
LINES = 12  # of the log that are kept
HALVES = ("HALF", "BF16")


def load(runtime: str) -> Any:
    """The module of a runtime: ``tensorrt``, or ``tensorrt_rtx``, whose bindings are also a package of their own.

    Raises:
        EngineError: it is not installed, or does not load.
    """
    if runtime not in RUNTIMES:
        raise SettingsError(f"runtime: {runtime}, expected {' or '.join(RUNTIMES)}; choose one of them")
    why: list[str] = []
    for name in RUNTIMES[runtime]:
        try:
            return import_module(name)
        except (ImportError, OSError) as error:
            why.append(f"{name}: {error}")
    hint = "it comes with JetPack, or: pip install tensorrt" if runtime == "tensorrt" else "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs"
    raise EngineError(f"{runtime}: the Python module cannot be imported ({'; '.join(why)}), expected TensorRT on the machine that builds engines; {hint}")


def version_of(trt: Any) -> str:
    """Its own version, such as 8.6.0."""
    return str(trt.__version__)


def label(trt: Any) -> str:
    """What messages call it."""
    return f"{'TensorRT-RTX' if 'rtx' in trt.__name__ else 'TensorRT'} {version_of(trt)}"


def major(trt: Any) -> int:
    """8, 10 or 11: what a plugin library is made for."""
    return int(version_of(trt).split(".")[0])


class Log:
    """What TensorRT says, and its last warnings and errors. `logger` is made by `make_logger`."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what = progress, what
        self.errors: deque[str] = deque(maxlen=LINES)
        self.warnings: deque[str] = deque(maxlen=LINES)
        self.lock = threading.Lock()
        self.said = False  # whether its lines are the progress
        self.logger: Any = None

    def take(self, level: str, text: str) -> None:
        """One message; called from TensorRT's threads, so it may not raise."""
        line = " ".join(text.split())
        with self.lock:
            if level in ("INTERNAL_ERROR", "ERROR"):
                self.errors.append(line)
            elif level == "WARNING":
                self.warnings.append(line)
            elif self.said:
                self.progress(f"{self.what}: {line[:100]}", None)

    def last(self) -> str:
        """The last errors, else warnings, in one line."""
        with self.lock:
            found = list(self.errors) or list(self.warnings)
        return "; ".join(found[-3:]) or "it gave no reason"


def make_logger(trt: Any, progress: Progress, what: str) -> Log:
    """A logger of ours: TensorRT 8.6 has no progress but its log."""
    log = Log(progress, what)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity != trt.ILogger.VERBOSE:
                log.take(severity.name, message)

    log.logger = Logger()
    return log


def make_builder(trt: Any, log: Log) -> Any:
    """A builder. The caller has made sure that there is a GPU where one is needed: without one 8.6 raises TypeError here.

    Raises:
        EngineError: TensorRT gives none.
    """
    try:
        builder = trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:
        log.take("ERROR", str(error))
        builder = None
    if builder is None:
        raise EngineError(f"{label(trt)}: it makes no builder ({log.last()}), expected a GPU with a driver that it knows; look at flashhead doctor")
    return builder


def make_network(trt: Any, builder: Any) -> Any:
    """An empty network in which every type is what the model says.

    10 and later have strongly typed networks, 11 no others; 8.6 has batches that are explicit by a flag and types that `hold_types` pins down.
    """
    flag = trt.NetworkDefinitionCreationFlag
    names = ("STRONGLY_TYPED",) if hasattr(flag, "STRONGLY_TYPED") else ("EXPLICIT_BATCH",)
    return builder.create_network(sum(1 << int(getattr(flag, name)) for name in names))


def strongly_typed(trt: Any) -> bool:
    """Whether networks keep the types of their models by themselves."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def has_bfloat16(trt: Any) -> bool:
    """From 10.0 on."""
    return hasattr(trt.DataType, "BF16")


def has_plugins(trt: Any) -> bool:
    """Whether networks take plugins of ours: TensorRT-RTX's do not, though its registry has calls for them."""
    return hasattr(trt.INetworkDefinition, "add_plugin_v3") or hasattr(trt.INetworkDefinition, "add_plugin_v2")


def hold_types(trt: Any, network: Any, config: Any) -> None:
    """Where networks are weakly typed: allow 16 bits, and pin every layer with results in 16 bits to them. Inputs and outputs lie in rows everywhere."""
    for tensor in [network.get_input(i) for i in range(network.num_inputs)] + [network.get_output(i) for i in range(network.num_outputs)]:
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    if strongly_typed(trt):
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if "PLUGIN" in layer.type.name or any(t is None or t.is_shape_tensor for t in outputs):
            continue  # a plugin says its types itself
        if layer.type.name == "CONSTANT" or not any(t.dtype == trt.DataType.HALF for t in outputs):
            continue
        layer.precision = trt.DataType.HALF
        for i, tensor in enumerate(outputs):
            layer.set_output_type(i, tensor.dtype)


def parse(trt: Any, network: Any, log: Log, path: Path) -> None:
    """Read an ONNX file into a network.

    Raises:
        EngineError: the parser refuses it; its message is in ours.
    """
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(path)):
        why = "; ".join(" ".join(str(parser.get_error(i)).split()) for i in range(min(3, parser.num_errors))) or log.last()
        raise EngineError(f"{path.name}: the parser of {label(trt)} refuses it ({why}), expected a model that it reads; see docs/tensorrt.md for versions")


def dimension_names(tensor: Any) -> list[str]:
    """The names of an input's dimensions, empty where they have none. 8.5 does not tell them: those of our own models are known."""
    if hasattr(tensor, "get_dimension_name"):
        return [tensor.get_dimension_name(axis) or "" for axis in range(len(tuple(tensor.shape)))]
    return (["batch", "sequence"] if tensor.name == "input_ids" else ["batch"] + [""] * 3)[: len(tuple(tensor.shape))]


def limit_memory(trt: Any, config: Any, size: int) -> None:
    """Cap the memory of tactics, bytes: their workspace, and what the builder takes to time them."""
    for name in ("WORKSPACE", "TACTIC_DRAM"):
        if hasattr(trt.MemoryPoolType, name):
            config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), size)


def try_few_tactics(trt: Any, config: Any) -> None:
    """Build in a minute what takes many: 8.6.0 did not finish a product with 128,256 rows in 200 s; its step is as fast as with more tries."""
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = 1


def without_other_libraries(trt: Any, config: Any) -> None:
    """Take no tactics from cuBLAS and cuDNN where TensorRT still asks them (8.6): nothing of ours needs them, and they need not be installed then."""
    if hasattr(trt.TacticSource, "CUDNN"):
        config.set_tactic_sources(0)


def allow_aliases(trt: Any, config: Any) -> None:
    """Let a plugin give an input back as an output, as the cache is (10.3 and later). Before that one address is bound twice."""
    if hasattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03"):
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def check_timing_cache(trt: Any, path: Path | None) -> None:
    """Raise SettingsError where a timing cache is asked for and none is kept: TensorRT-RTX has the calls, but they do nothing."""
    if path is not None and not has_plugins(trt):
        raise SettingsError(f"{path}: a timing cache, expected none for {label(trt)}, which times kernels where the engine runs; leave --timing-cache out")


def use_timing_cache(trt: Any, config: Any, log: Log, data: bytes, path: Path) -> None:
    """Start from what another build has timed; with no data from nothing. One that cannot be read becomes an empty one, with a warning: not here.

    Raises:
        EngineError: the data come from another TensorRT or another GPU.
    """
    cache = config.create_timing_cache(data)
    unread = any("deserialize timing cache" in line for line in log.warnings)
    if cache is None or unread or not config.set_timing_cache(cache, False):
        raise EngineError(f"{path}: {label(trt)} does not take the timing cache, expected one of its own and of this GPU; name another file, or remove it")


def timing_cache_of(config: Any) -> bytes:
    """What has been timed, to be kept."""
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())


class Cancelled:
    """Whether a build shall end: set by another thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()


def watch(trt: Any, config: Any, log: Log, cancelled: Cancelled) -> bool:
    """Show the build's phases, and end it when asked; True where this TensorRT can (10.0 and later). Elsewhere its log is the progress."""
    if not hasattr(trt, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
        return False

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}  # the outermost ones, with their steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phases[phase_name] = num_steps
            log.progress(f"{log.what}: {phase_name}", None)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                log.progress(f"{log.what}: {phase_name}", min(1.0, step / max(1, self.phases[phase_name])))
            return not cancelled.asked.is_set()

    config.progress_monitor = Monitor()
    return True


def serialised(trt: Any, builder: Any, network: Any, config: Any, log: Log, what: str) -> Any:
    """The engine's bytes, as TensorRT's host memory.

    Raises:
        EngineError: TensorRT builds none.
    """
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise EngineError(f"{what}: {label(trt)} builds no engine ({log.last()}), expected one; see docs/tensorrt.md for the versions that work")
    return made
