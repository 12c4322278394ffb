"""One tiny checkpoint and its exports, for the whole session: each takes some seconds."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from small_exports import write_exportable, write_with_index
from small_heads import everything_open, few_probes

from flashhead_edge.cli import main

INDEXES = {
    "all": lambda w, fingerprint: everything_open(w, cascade=True, fingerprint=fingerprint),  # leaves nothing out
    "bad": lambda w, fingerprint: few_probes(w, 3, fingerprint=fingerprint),  # misses often
}


@pytest.fixture(scope="session")
def exportable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("exportable") / "tiny")


@pytest.fixture(scope="session")
def converted(exportable: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A FlashHead checkpoint of the model, with one of INDEXES."""

    @lru_cache
    def make(index: str = "all") -> Path:
        return write_with_index(exportable, tmp_path_factory.mktemp("converted") / f"tiny-{index}", INDEXES[index])

    return make


@pytest.fixture(scope="session")
def exported(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The export of such a checkpoint."""
    pytest.importorskip("onnxruntime_genai")

    from small_bodies import warm_builder

    from flashhead_edge.export import export_onnx

    @lru_cache
    def make(dialect: str, body: str, index: str) -> Path:
        out = tmp_path_factory.mktemp("exported") / f"{dialect}-{body}-{index}"
        with warm_builder():
            export_onnx(converted(index), out, dialect=dialect, body=body)
        return out

    # a cache takes a default and the same value said aloud for two things
    return lambda dialect="onnxruntime", body="fp32", index="all": make(dialect, body, index)


@pytest.fixture
def flashhead(capsys, monkeypatch):
    """Run a verb in this process: exit code, stdout, stderr."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture(scope="session")
def made_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 without a GPU (plugins_trt/tests/made_driver.cpp), for the library path of a process."""
    from flashhead_edge.errors import EngineError
    from flashhead_edge.jetson.plugin_build import cuda_headers, run

    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    try:
        includes = [word for path in cuda_headers() for word in ("-isystem", str(path))]
    except EngineError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[2] / "plugins_trt" / "tests" / "made_driver.cpp"
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    run(["g++", *flags, *includes, str(source), "-o", str(folder / "libcuda.so.1")])
    return folder
