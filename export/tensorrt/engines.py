"""All engines of an export folder: what is needed is looked for first, then they are built one after another. Needs numpy and TensorRT.

A folder of models can come from another machine: `build_engines` is the second half of `export_tensorrt`, for boards without torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import link_or_copy, regular, replacing
from flashhead_edge.errors import CheckpointError, DeviceError, EngineError, ExportError, SettingsError
from flashhead_edge.export.tensorrt import builder, versions
from flashhead_edge.export.tensorrt.manifest import sha256_of, write_manifest
from flashhead_edge.jetson.tensorrt_folder import MANIFEST, WEIGHTS, header_fingerprint, read_manifest
from flashhead_edge.program.head import Device
from flashhead_edge.progress import Progress, silent

PARTS = ("head", "head_logits", "decoder", "decoder_dense")  # in the order in which they are built: the small ones fail first
SPARE = 64 << 20  # bytes for engines without weights


@dataclass(frozen=True)
class Build:
    """How engines are built."""

    runtime: str = "tensorrt"  # or tensorrt_rtx
    plugin: Path | None = None  # the plugin library; None: the one in the cache
    timing_cache: Path | None = None
    memory_mib: int | None = None  # cap of tactics


@dataclass(frozen=True, eq=False)
class Ready:
    """TensorRT, GPU and plugin library, found and looked at."""

    build: Build
    trt: Any
    facts: Any | None  # flashhead_edge.jetson.driver.DeviceFacts; None: TensorRT-RTX without a GPU
    library: Path | None

    @property
    def device(self) -> Device:
        if self.facts is None:
            return Device(0, 0)
        return Device(self.facts.multiprocessors, self.facts.shared_bytes, self.facts.capability)


def prepared(build: Build, layers: str, precision: str) -> Ready:
    """Find what a build needs, before anything slow is done.

    Raises:
        SettingsError: settings that exclude each other.
        DeviceError: there is no GPU. EngineError: no TensorRT, one without what is asked, no plugin library or a foreign one.
    """
    trt = versions.load(build.runtime)
    name = versions.label(trt)
    if layers == "plugin" and not versions.has_plugins(trt):
        raise SettingsError(f"{name}: plugin layers, expected native ones, since it takes no plugins; pass --layers native, or --runtime tensorrt")
    if layers == "native" and not versions.strongly_typed(trt):
        raise EngineError(f"{name}: native layers, expected TensorRT 10 or newer, which has 4-bit weights; pass --layers plugin")
    if precision == "bfloat16" and not versions.has_bfloat16(trt):
        raise EngineError(f"{name}: --precision bfloat16, expected TensorRT 10 or newer, which has that type; pass --precision float16")
    versions.check_timing_cache(trt, build.timing_cache)
    facts = _facts(build.runtime)
    library = None
    if layers == "plugin":
        from flashhead_edge.jetson.plugins import find_library, load_library

        library = find_library(versions.major(trt), build.plugin, None if facts is None else facts.capability)
        load_library(trt, library)
    return Ready(build, trt, facts, library)


def _facts(runtime: str) -> Any | None:
    """The GPU. TensorRT-RTX alone builds without one."""
    from flashhead_edge.jetson.driver import device_facts

    try:
        return device_facts()
    except DeviceError:
        if runtime == "tensorrt_rtx":
            return None
        raise


def add_engines(ready: Ready, folder: Path, manifest: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Build every model of a folder that is being written: what its manifest says of them."""
    models = [folder / f"{part}.onnx" for part in PARTS if (folder / f"{part}.onnx").is_file()]
    cap = None if ready.build.memory_mib is None else ready.build.memory_mib << 20
    for model in models:
        need = builder.needs(_weights_in_engine(model.stem, folder, manifest), _plugin_weights(folder, manifest), _bound(manifest), cap)
        builder.check_memory(model.stem, need, builder.free_host_bytes(), None if ready.facts is None else ready.facts.free_bytes)
    if ready.library is not None:
        from flashhead_edge.jetson.plugins import add_folder

        add_folder(ready.library, folder)
    built = {}
    for model in models:
        out = folder / f"{model.stem}.engine"
        profiles = profiles_of(model.stem, manifest)
        dense = model.stem == "decoder_dense"
        one = builder.build_engine(
            ready.trt, model, out, profiles, timing_cache=ready.build.timing_cache, memory=cap, few_tactics=dense, progress=progress
        )  # fmt: skip
        built[model.stem] = asdict(one)
    facts = ready.facts
    return {
        "engines": built,
        "runtime": ready.build.runtime,
        "tensorrt": versions.version_of(ready.trt),
        "cuda_driver": None if facts is None else facts.cuda_version,
        "driver": None if facts is None else facts.driver_version,
        "gpu": None if facts is None else facts.name,
        "plugin_library": None if ready.library is None else ready.library.name,
        "plugin_sha256": None if ready.library is None else sha256_of(ready.library),
        "peak_host_bytes": builder.peak_host_bytes(),
        "memory_cap_mib": ready.build.memory_mib,
    }


def build_engines(folder: str | Path, *, build: Build | None = None, dense_head: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Build the engines of a folder that was written without, on the board that shall run them: the new manifest.

    The folder is the old one or the new one at every moment.

    Args:
        dense_head: make decoder_dense.onnx of its decoder first where it has none (the onnx package), and build that engine too.
    Raises:
        CheckpointError: the folder is no such export, or its file of weights is another one.
        ExportError: a dense head beside native layers, or without the onnx package.
        DeviceError, EngineError: as `export_tensorrt`; the head was planned for another device.
    """
    path = Path(folder).expanduser().resolve()
    manifest = read_manifest(path).document
    build = build or Build()
    adds_dense = dense_head and not (path / "decoder_dense.onnx").is_file()
    if adds_dense:
        _check_dense(path, manifest)
    ready = prepared(build, manifest["layers"], manifest["precision"])
    if manifest["layers"] == "plugin":
        found = header_fingerprint(path / WEIGHTS) if regular(path / WEIGHTS) else "missing"
        size = (path / WEIGHTS).stat().st_size if regular(path / WEIGHTS) else 0
        if (found, size) != (manifest["weights_fingerprint"], manifest["weights_bytes"]):
            wanted = f"{manifest['weights_fingerprint']} with {manifest['weights_bytes']:,} bytes"
            raise CheckpointError(
                f"{path / WEIGHTS}: the file is {found} with {size:,} bytes, expected {wanted}, as the models were written; copy the folder again"
            )
        _check_planned(path, manifest, ready.device)
    files = [p for p in sorted(path.rglob("*")) if regular(p) and p.name != MANIFEST and p.suffix != ".engine"]
    inside = sum(_weights_in_engine(part, path, manifest) for part in PARTS if (path / f"{part}.onnx").is_file() or (adds_dense and part == "decoder_dense"))
    with replacing(path, sum(f.stat().st_size for f in files) + inside + SPARE) as new:
        for file in files:
            target = new / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
        if adds_dense:
            from flashhead_edge.export.tensorrt.dense import add_dense_head

            add_dense_head(new)
        _say_folder(new, path, manifest, progress)
        whole = manifest | {"capability": ready.device.capability or manifest["capability"]} | add_engines(ready, new, manifest, progress)
        write_manifest(new, whole)
    return read_manifest(path).document


def _check_dense(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ExportError where a dense head cannot be put into a folder."""
    if manifest["layers"] != "plugin":
        raise ExportError(f"{path}: a dense head beside native layers is asked for, expected it beside plugins; leave --dense-head out")
    if importlib.util.find_spec("onnx") is None:
        raise ExportError(f"{path}: the onnx package is not installed, expected it for --dense-head; pip install onnx, or export again with --dense-head")


def _check_planned(path: Path, manifest: Mapping[str, Any], device: Device) -> None:
    """Raise EngineError where the head was planned for another device."""
    planned = (manifest["multiprocessors"], manifest["shared_bytes"])
    if planned[0] != device.multiprocessors or planned[1] > device.shared_bytes:
        found, here = (f"{m} multiprocessors and {s >> 10} KiB of shared memory" for m, s in (planned, (device.multiprocessors, device.shared_bytes)))
        flags = f"--onnx-only --multiprocessors {device.multiprocessors} --shared-kib {device.shared_bytes >> 10} --capability {device.capability}"
        raise EngineError(f"{path}: the head was planned for {found}, this GPU has {here}; export again with {flags}")


def _say_folder(new: Path, final: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
    """Let the models name the folder where they lie now, for a TensorRT that knows nothing of us. That needs the onnx package."""
    if manifest["layers"] != "plugin":
        return
    try:
        from flashhead_edge.export.tensorrt.graph import set_folder
    except ModuleNotFoundError:
        progress("models: they keep naming the folder where they were exported (no onnx package); our own runtime looks in the engine's folder", None)
        return
    for part in PARTS:
        if (new / f"{part}.onnx").is_file():
            set_folder(new / f"{part}.onnx", final)


# ---- sizes


def profiles_of(part: str, manifest: Mapping[str, Any]) -> list[builder.Sizes]:
    """The profiles of a model: of a decoder first the steps of single tokens, then a prompt's."""
    batch, chunk, context = manifest["max_batch"], manifest["chunk"], manifest["context"]
    many, one = (1, 1, batch), (1, 1, 1)
    if manifest["layers"] == "native":
        if part != "decoder":
            return [{"N": many}]
        middle = max(1, context // 2)
        read = min(chunk, context)
        return [
            {"batch_size": many, "sequence_length": one, "past_sequence_length": (0, middle, context - 1), "total_sequence_length": (1, middle + 1, context)},
            {
                "batch_size": one,
                "sequence_length": (1, read, read),
                "past_sequence_length": (0, 0, context - read),
                "total_sequence_length": (1, read, context),
            },
        ]
    if part.startswith("head"):
        return [{"batch": many}]
    steps = {"batch": many, "sequence": one}
    return [steps] if part == "decoder_dense" else [steps, {"batch": one, "sequence": (1, chunk, chunk)}]  # whose product alone takes minutes to time


def _weights_in_engine(part: str, folder: Path, manifest: Mapping[str, Any]) -> int:
    if part == "decoder_dense":
        s = manifest["settings"]
        return int(s["embedding_rows"] * s["hidden_size"] * 2)
    data = folder / "model.onnx.data"
    return data.stat().st_size if manifest["layers"] == "native" and data.is_file() else 0


def _plugin_weights(folder: Path, manifest: Mapping[str, Any]) -> int:
    return int(manifest.get("weights_bytes") or 0)


def _bound(manifest: Mapping[str, Any]) -> int:
    """Bytes of the largest layer's inputs and outputs: the cache of one layer."""
    s = manifest["settings"]
    return int(2 * 2 * manifest["max_batch"] * s["kv_heads"] * manifest["context"] * s["head_size"])
