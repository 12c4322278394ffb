"""The builder of engines: what it writes, what it says, and what an interruption leaves.

By TensorRT-RTX, which builds without a GPU, and by TensorRT where it and a GPU are: on a board without torch, too
(`pytest --noconftest tests/export/test_tensorrt_builder.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.export.tensorrt import versions
from flashhead_edge.export.tensorrt.builder import build_engine, check_memory, free_host_bytes, needs, peak_host_bytes, write_whole
from flashhead_edge.export.tensorrt.engines import profiles_of

PROFILES = [{"batch": (1, 1, 4)}]


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def trt(request: pytest.FixtureRequest) -> Any:
    """The runtimes that can build here."""
    try:
        module = versions.load(request.param)
        if request.param == "tensorrt":
            from flashhead_edge.jetson.driver import device_facts

            device_facts()
    except (EngineError, DeviceError) as error:
        pytest.skip(str(error))
    return module


@pytest.fixture
def rtx(trt: Any) -> Any:
    if versions.has_plugins(trt):
        pytest.skip("of TensorRT-RTX")
    return trt


@pytest.fixture
def full(trt: Any) -> Any:
    if not versions.has_plugins(trt):
        pytest.skip("TensorRT-RTX keeps no timing cache")
    return trt


def product(path: Path, op: str = "MatMul", width: int = 64) -> Path:
    """x [batch, width] times a matrix."""
    matrix = helper.make_tensor("w", TensorProto.FLOAT16, [width, width], np.ones(width * width, np.float16).tobytes(), raw=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", width]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "product", [x], [y], [matrix])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_an_engine_is_written_whole(trt: Any, tmp_path: Path) -> None:
    said: list[tuple[str, float | None]] = []
    model, out = product(tmp_path / "model.onnx"), tmp_path / "model.engine"
    built = build_engine(trt, model, out, PROFILES, memory=64 << 20, progress=lambda m, s=None: said.append((m, s)))
    assert built.file == "model.engine" and built.bytes == out.stat().st_size > 1000 and built.seconds > 0 and len(built.sha256) == 64
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.engine"}
    assert {m.split(":")[0] for m, _ in said} == {"model.engine"} and all(s is None or 0 <= s <= 1 for _, s in said)
    assert any(s is not None for _, s in said) == hasattr(trt, "IProgressMonitor")
    build_engine(trt, model, out, PROFILES)  # over what is there


def test_a_timing_cache_is_kept_and_a_foreign_one_refused(full: Any, tmp_path: Path) -> None:
    model, cache = product(tmp_path / "model.onnx"), tmp_path / "timing.cache"
    build_engine(full, model, tmp_path / "model.engine", PROFILES, timing_cache=cache)
    before = cache.read_bytes()
    build_engine(full, model, tmp_path / "model.engine", PROFILES, timing_cache=cache)
    assert len(cache.read_bytes()) == len(before) > 0
    cache.write_bytes(b"no cache" * 40)
    with pytest.raises(EngineError, match=r"timing\.cache: TensorRT \S+ does not take the timing cache, expected one of its own and of this GPU"):
        build_engine(full, model, tmp_path / "model.engine", PROFILES, timing_cache=cache)
    assert cache.read_bytes() == b"no cache" * 40


def test_a_timing_cache_that_would_not_be_kept_is_refused(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a timing cache, expected none for TensorRT-RTX \S+, which times kernels where the engine runs"):
        build_engine(rtx, product(tmp_path / "model.onnx"), tmp_path / "model.engine", PROFILES, timing_cache=tmp_path / "timing.cache")


def test_what_the_parser_says_is_in_the_error(trt: Any, tmp_path: Path) -> None:
    model = product(tmp_path / "model.onnx", "NoSuchOperator")
    with pytest.raises(EngineError, match=r"model\.onnx: the parser of TensorRT\S* \S+ refuses it \(.*NoSuchOperator.*\), expected a model that it reads"):
        build_engine(trt, model, tmp_path / "model.engine", PROFILES)
    model.write_bytes(model.read_bytes()[:200])
    with pytest.raises(EngineError, match="refuses it"):
        build_engine(trt, model, tmp_path / "model.engine", PROFILES)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_dimension_without_a_profile_is_named(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="x: a dimension 'batch' that no profile has, expected one of N"):
        build_engine(trt, product(tmp_path / "model.onnx"), tmp_path / "model.engine", [{"N": (1, 1, 1)}])


def test_what_the_builder_says_is_in_the_error(trt: Any, tmp_path: Path) -> None:
    """A profile whose sizes contradict each other is refused when the engine is built."""
    with pytest.raises(EngineError, match=r"model\.engine: TensorRT\S* \S+ builds no engine \(.+\), expected one"):
        build_engine(trt, product(tmp_path / "model.onnx"), tmp_path / "model.engine", [])


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from flashhead_edge.export.tensorrt import versions
from flashhead_edge.export.tensorrt.builder import build_engine
trt = versions.load(sys.argv[2])
folder, asked = Path(sys.argv[1]), []
cache = folder / "timing.cache" if versions.has_plugins(trt) else None
def progress(message, share=None):  # called from the thread that builds
    if not asked and (share is not None or not message.endswith(("building", "model.onnx"))):
        asked.append(message)
        os.kill(os.getpid(), signal.SIGINT)
    if ": stopping" in message:
        print("stopping")
try:
    build_engine(trt, folder / "model.onnx", folder / "model.engine", [{"batch": (1, 1, 4)}], timing_cache=cache, progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_an_interrupted_build_leaves_the_old_engine_and_cache(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache" if versions.has_plugins(trt) else None
    product(tmp_path / "model.onnx")
    build_engine(trt, tmp_path / "model.onnx", tmp_path / "model.engine", PROFILES, timing_cache=cache)
    product(tmp_path / "model.onnx", width=128)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    runtime = "tensorrt" if versions.has_plugins(trt) else "tensorrt_rtx"
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, str(tmp_path), runtime], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["stopping", "interrupted"], result.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_memory_that_is_missing_is_said_before_the_build() -> None:
    need = needs(in_engine=100 << 20, plugin_weights=0, bound=1 << 20, memory=None)
    check_memory("decoder", need, need.host, need.device)
    check_memory("decoder", need, None, None)
    with pytest.raises(DeviceError, match=r"decoder: its build needs 786 MiB of memory of the GPU, 700 MiB are free; end other programs"):
        check_memory("decoder", need, need.host, 700 << 20)
    with pytest.raises(DeviceError, match=r"decoder: its build needs 1,312 MiB of memory of this machine, 1,311 MiB are free"):
        check_memory("decoder", need, need.host - 1, need.device)
    small = needs(in_engine=0, plugin_weights=600 << 20, bound=0, memory=16 << 20)
    assert small.host == 512 << 20 and small.device == (384 + 600 + 16) << 20  # weights in a file of their own cost the host nothing
    free, peak = free_host_bytes(), peak_host_bytes()
    assert free is None or free > 1 << 20
    assert peak is None or peak > 1 << 20


def test_profiles_are_those_of_steps_and_of_a_prompt() -> None:
    about: dict[str, Any] = {"layers": "plugin", "max_batch": 4, "chunk": 64, "context": 512}
    assert profiles_of("head", about) == [{"batch": (1, 1, 4)}]
    assert profiles_of("decoder", about) == [{"batch": (1, 1, 4), "sequence": (1, 1, 1)}, {"batch": (1, 1, 1), "sequence": (1, 64, 64)}]
    for sizes in profiles_of("decoder", about | {"layers": "native"}):
        past, new, total = (sizes[f"{name}_length"] if name == "sequence" else sizes[f"{name}_sequence_length"] for name in ("past", "sequence", "total"))
        assert [p + n for p, n in zip(past, new)] == list(total) and total[2] == 512


def test_features_are_asked_for(rtx: Any) -> None:
    """TensorRT-RTX is of the generation of TensorRT 10 and 11: types are kept, bfloat16 is there, plugins are not."""
    assert versions.strongly_typed(rtx) and versions.has_bfloat16(rtx) and not versions.has_plugins(rtx)
    assert versions.load("tensorrt_rtx").__name__ in ("tensorrt_rtx", "tensorrt_rtx_bindings")
    assert versions.major(rtx) == 1 and versions.label(rtx) == f"TensorRT-RTX {rtx.__version__}"


def test_native_layers_are_built_without_a_gpu(rtx: Any, tmp_path: Path) -> None:
    """The whole decoder in TensorRT's own operators, in a process of its own, which TensorRT may abort."""
    pytest.importorskip("onnxruntime_genai")
    from small_exports import write_with_index
    from small_heads import few_probes
    from small_plugins import save_plugin_model

    model = save_plugin_model(tmp_path / "model", "llama_tied")
    write_with_index(model, tmp_path / "checkpoint", lambda weight, fingerprint: few_probes(weight, 8, 127, fingerprint=fingerprint))
    command = [sys.executable, "-m", "flashhead_edge", "export", "tensorrt", tmp_path / "checkpoint", tmp_path / "out", "--layers", "native"]
    options = ["--runtime", "tensorrt_rtx", "--context", 128, "--chunk", 32, "--batch", 2, "--json"]
    result = subprocess.run([str(part) for part in command + options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)["manifest"]
    assert document["layers"] == "native" and document["runtime"] == "tensorrt_rtx" and document["plugin_library"] is None
    assert document["peak_host_bytes"] > 0 and document["weights_fingerprint"] is None
    for part in ("head", "head_logits", "decoder"):
        assert document["engines"][part]["bytes"] == (tmp_path / "out" / f"{part}.engine").stat().st_size
    assert document["engines"]["decoder"]["bytes"] > (tmp_path / "out/model.onnx.data").stat().st_size // 2  # the weights are in it
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == document
