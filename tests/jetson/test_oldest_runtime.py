"""The runtime as a JetPack 6 board has it at the most: Python 3.10 and ONNX Runtime 1.23.2, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge.decoding import Sampling
from flashhead_edge.generation import stream
from flashhead_edge.jetson import open_engine

OLDEST = "1.23.2"
PROMPT = [1, 17, 90, 5, 33, 128, 64]
SCRIPT = """
import json, sys
import onnxruntime
from flashhead_edge.decoding import Sampling
from flashhead_edge.generation import stream
from flashhead_edge.jetson import open_engine
engine = open_engine(sys.argv[1], threads=1)
tokens = [[t.id for t in stream(engine, json.loads(sys.argv[2]), 60, s)] for s in (Sampling(), Sampling(temperature=1.2, seed=4))]
said = {"python": sys.version_info[:2], "runtime": onnxruntime.__version__, "torch": "torch" in sys.modules}
print(json.dumps(said | {"about": engine.backend.about, "tokens": tokens}))
"""


def python310() -> str | None:
    """A CPython 3.10, also one that pyenv holds but does not offer."""
    found = shutil.which("python3.10")
    if found is None:
        return None
    asked = [found, "-c", "import sys, ensurepip; print(sys.executable)"]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"PYENV_VERSION": "3.10"}, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture(scope="module")
def oldest(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, its extra `onnx`, and that ONNX Runtime."""
    python = python310()
    if python is None:
        pytest.skip("no Python 3.10 with venv here")
    folder = tmp_path_factory.mktemp("oldest")
    copy = folder / "source"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "tests", "docs", "*.so", "demo"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy], check=True, capture_output=True, timeout=240)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True, timeout=240)
    inside = folder / "venv" / "bin" / "python"
    install = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{wheel}[onnx]", f"onnxruntime=={OLDEST}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {OLDEST} could not be installed: {done.stderr.strip().splitlines()[-1]}")
    return inside


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "body"), [("onnxruntime", "int4"), ("onnxruntime", "fp32"), ("portable", "fp32")])
def test_text_is_the_newest_runtimes(exported, oldest: Path, dialect: str, body: str, tmp_path: Path) -> None:
    """The tiny model's next logits lie 1e-2 apart and more on these 60 steps; two versions' float32 sums 1e-6."""
    folder = exported(dialect, body)
    done = subprocess.run([oldest, "-c", SCRIPT, folder, json.dumps(PROMPT)], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["python"] == [3, 10] and found["runtime"] == OLDEST and not found["torch"]
    engine = open_engine(folder, threads=1)
    assert found["tokens"] == [[t.id for t in stream(engine, PROMPT, 60, s)] for s in (Sampling(), Sampling(temperature=1.2, seed=4))]
    operators = {name: engine.backend.about[name] for name in ("head_operators", "body_operators")}
    assert {name: found["about"][name] for name in operators} == operators


@pytest.mark.slow
def test_what_tensorrt_needs_runs_there(oldest: Path, tmp_path: Path) -> None:
    """Of JetPack 6's Python: every module without torch, and the sentences that come before a GPU, TensorRT or headers are needed."""
    modules = ("driver", "nvrtc", "plugins", "plugin_build", "tensorrt_folder", "tensorrt_engine", "tensorrt_backend")
    code = f"import sys\nfor name in {modules}: __import__(f'flashhead_edge.jetson.{{name}}')\nassert 'torch' not in sys.modules"
    done = subprocess.run([oldest, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    verb = [oldest, "-m", "flashhead_edge", "plugin", "build", "--for", "87", "--tensorrt-include", tmp_path]
    done = subprocess.run(verb, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and f"NvInferRuntime.h is not in {tmp_path}" in done.stderr
    done = subprocess.run([oldest, "-m", "flashhead_edge", "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert {"TensorRT", "TensorRT plugins"} <= {fact["name"] for fact in json.loads(done.stdout)["facts"]}, done.stderr
