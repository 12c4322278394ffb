"""One export, one folder of tiny wheels, for the whole session."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_bodies import warm_builder
from small_exports import write_exportable, write_with_index
from small_heads import everything_open
from small_wheels import copy_pip, write_wheel

from flashhead_edge import __version__

# What stands in for flashhead-edge in the tests of the installer: `flashhead inspect` is its check, and refuses a model that says so.
CODE = """
import pathlib, sys
def main():
    if pathlib.Path(sys.argv[2], "refused").exists():
        sys.exit("the model is refused")
    print("{}")
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundled")
    model = write_exportable(folder / "tiny")
    return write_with_index(model, folder / "tiny-head", lambda w, fingerprint: everything_open(w, cascade=True, fingerprint=fingerprint))


@pytest.fixture(scope="session")
def runnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of sizes that the cuda backend's kernels take."""
    folder = tmp_path_factory.mktemp("runnable")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    model = write_exportable(folder / "tiny", **sizes)
    return write_with_index(model, folder / "tiny-head", lambda w, fingerprint: everything_open(w, fingerprint=fingerprint))


@pytest.fixture(scope="session")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for ONNX Runtime, with a name in it that has blanks."""
    pytest.importorskip("onnxruntime_genai")
    from flashhead_edge.export import export_onnx

    out = tmp_path_factory.mktemp("exported") / "tiny"
    with warm_builder():
        export_onnx(checkpoint, out, dialect="onnxruntime", body="fp32")
    (out / "read me first.txt").write_text("hello\n")
    return out


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "flashhead-edge", __version__, code=CODE, requires=["helper-package>=1; python_version < '3.12'", "absent; python_version < '3'"])
    write_wheel(folder, "helper-package", "1.2")
    copy_pip(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip asks no index: only the folders that are named have wheels."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
