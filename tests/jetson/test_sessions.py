"""What is refused before a token is made: parts from elsewhere, of another head, cut off, too new for the runtime. Real files, the real runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from flashhead_edge.errors import CheckpointError, EngineError, SettingsError
from flashhead_edge.jetson import is_exported, open_engine
from flashhead_edge.jetson.folder import PARTS, read_settings
from flashhead_edge.jetson.onnxruntime_backend import open_folder
from flashhead_edge.jetson.onnxruntime_sessions import open_model, usable_threads

SETTINGS = {
    "vocab_size": 10, "hidden_size": 4, "context_length": 32, "scale": 1.0, "softcap": None, "cache": "in_place", "head_size": 8, "embedding_rows": 12,
    "body_parameters": 100, "fixed_bytes": 10, "item_bytes": [3, 9],
}  # fmt: skip


def metadata(kind: str, **changed: str | None) -> dict[str, str]:
    found = {"format": "1", "part": kind, "dialect": "onnxruntime", "fingerprint": "sha256:aa", "settings": json.dumps(SETTINGS)} | changed
    return {f"flashhead.{key}": value for key, value in found.items() if value is not None}


def write(path: Path, props: dict[str, str], op: str = "Relu", domain: str = "", ir_version: int = 10, opset: int = 21, data: bool = False) -> Path:
    """A model of one node, with a weight beside it where `data`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096]) for name in ("a", "b")]
    nodes, weights = [helper.make_node(op, ["a"], ["x"], domain=domain)], []
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [4096], bytes(4 * 4096), raw=True)]
    nodes.append(helper.make_node("Add", ["x", "w"], ["b"]))
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    helper.set_model_props(model, props)
    if data:
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    else:
        path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in PARTS:
        write(tmp_path / f"{part}.onnx", metadata(part), data=True)
    (tmp_path / "config.json").write_text(json.dumps({"flash_head": {"fingerprint": "sha256:aa"}}))
    return tmp_path


def test_parts_that_belong_together_open_when_they_are_needed(folder):
    backend = open_folder(folder, 1, "sha256:aa")
    assert set(backend.sessions) == {"body", "head"}
    assert backend.session("rescore") is backend.session("rescore")
    s = backend.settings
    assert (s.part, s.vocab_size, s.softcap, s.item_bytes) == ("body", 10, None, (3, 9))
    about = {"backend": "onnxruntime", "backend_version": onnxruntime.__version__, "device": "cpu", "threads": 1}
    operators = {"head_operators": "standard operators", "body_operators": "standard operators"}  # this folder has no native parts
    assert backend.about == about | operators


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"format": None}, r"head.onnx: the model does not come from flashhead export \(its metadata has no flashhead.format\)"),
        (
            {"format": "2"},
            "head.onnx: the export has format version 2, expected 1; run flashhead export onnx again or install the flashhead-edge that wrote it",
        ),
        ({"part": "rescore"}, "head.onnx: the model is the part 'rescore', expected 'head'"),
        ({"settings": "{"}, "head.onnx: the metadata of the export does not have the expected form"),
        ({"settings": json.dumps(SETTINGS | {"vocab_size": "many"})}, "head.onnx: the metadata of the export does not have the expected form"),
        ({"fingerprint": "sha256:bb"}, "head.onnx: the part was exported from a head with fingerprint sha256:bb, body.onnx has sha256:aa"),
    ],
)
def test_foreign_parts_are_one_sentence(folder, changed, text):
    write(folder / "head.onnx", metadata("head", **changed))
    with pytest.raises(CheckpointError, match=text):
        open_folder(folder, 1, None)


def test_a_part_that_opens_late_is_checked_too(folder):
    write(folder / "rescore.onnx", metadata("rescore", fingerprint="sha256:bb"))
    backend = open_folder(folder, 1, "sha256:aa")
    with pytest.raises(CheckpointError, match=r"rescore.onnx: the part was exported from a head with fingerprint sha256:bb, config.json has sha256:aa"):
        backend.session("rescore")


def test_another_models_config_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"flash_head": {"fingerprint": "sha256:cc"}}))
    with pytest.raises(CheckpointError, match=r"body.onnx: .* fingerprint sha256:aa, config.json has sha256:cc; run flashhead export onnx again"):
        open_engine(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(folder, part):
    (folder / f"{part}.onnx").unlink()
    assert is_exported(folder)
    with pytest.raises(CheckpointError, match=rf"{part}.onnx: the file is missing, expected body.onnx, head.onnx, head_logits.onnx, rescore.onnx"):
        open_engine(folder)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_external_data_that_is_missing_or_cut_off_is_said(folder, damage):
    data = folder / "body.onnx.data"
    data.unlink() if damage == "missing" else data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"body.onnx: its external data is missing or cut off \(.*\); restore the .data files beside it"):
        open_folder(folder, 1, None)


@pytest.mark.parametrize("content", [b"", b"hello world", "half"])
def test_a_damaged_model_is_said(folder, content):
    path = folder / "body.onnx"
    path.write_bytes(path.read_bytes()[:150] if content == "half" else content)
    with pytest.raises(CheckpointError, match=r"body.onnx: no ONNX model that can be read \(.*\); restore the file"):
        open_folder(folder, 1, None)
    with pytest.raises(CheckpointError, match=r"body.onnx: ONNX Runtime .* cannot read the model \(.*\); restore the file"):
        open_model(path, 1)


@pytest.mark.parametrize("new", [{"op": "NotYetThere", "domain": "com.microsoft"}, {"ir_version": 99}, {"opset": 99}], ids=str)
def test_a_runtime_that_is_too_old_is_told_which_versions_work(tmp_path, new):
    with pytest.raises(EngineError, match=r"m.onnx: ONNX Runtime .* does not know what the model needs \(.*\), expected a newer one: 1.23.2 and 1.32.0 work"):
        open_model(write(tmp_path / "m.onnx", {}, **new), 1)


def test_without_onnx_runtime_the_extra_is_named(folder):
    """A process whose imports find no onnxruntime."""
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from flashhead_edge.jetson import open_engine\nfrom flashhead_edge.errors import EngineError\n"
        f"try:\n    open_engine({str(folder)!r})\nexcept EngineError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ("onnxruntime is not installed, expected it to run body.onnx (1.23.2 and 1.32.0 work); pip install 'flashhead-edge[onnx]'\n")


def test_settings_out_of_range_are_refused(folder, tmp_path_factory):
    with pytest.raises(SettingsError, match="threads is 0, expected 1 or more"):
        open_engine(folder, threads=0)
    with pytest.raises(SettingsError, match="backend is 'rocm', expected auto, onnxruntime, tensorrt, cuda"):
        open_engine(folder, "rocm")
    empty = tmp_path_factory.mktemp("empty")
    assert not is_exported(empty)
    with pytest.raises(CheckpointError, match="no exported model"):
        open_engine(empty)


def test_no_released_checkpoint_is_needed_for_its_fingerprint(folder):
    """A config without a head index of ours names no fingerprint: then the parts must agree with each other."""
    assert set(open_folder(folder, 1, None).found) == {"body", "head"}


def test_threads_are_those_that_the_process_may_use():
    """Bound to one CPU it takes one, whatever the machine has."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from flashhead_edge.jetson.onnxruntime_sessions import usable_threads as u; print(u(), os.cpu_count())"
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a system that binds a process to CPUs")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0] == ("1" if done.stdout.split()[1] != "1" else "0")
    assert usable_threads() >= 0


def test_metadata_reads_back():
    s = read_settings(Path("x.onnx"), "body", metadata("body"))
    assert (s.dialect, s.fingerprint, s.hidden_size, s.context_length, s.cache, s.head_size, s.embedding_rows) == (
        "onnxruntime",
        "sha256:aa",
        4,
        32,
        "in_place",
        8,
        12,
    )
