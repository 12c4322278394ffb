"""Export folders for TensorRT: what `flashhead export tensorrt` writes from a checkpoint without a GPU, and made models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import one_document
from plugin_interpreter import Interpreter, decode_plugins, fingerprint
from small_bodies import VOCAB
from small_checkpoints import content
from small_exports import write_with_index
from small_heads import few_probes
from small_plugins import ORIN, save_plugin_model

from flashhead_edge.cases import FEW_CODES, case_of, made_index
from flashhead_edge.cli import main
from flashhead_edge.errors import CheckpointError, EngineError, ExportError, SettingsError
from flashhead_edge.export.tensorrt import build_engines, export_tensorrt, made
from flashhead_edge.export.tensorrt.dense import add_dense_head
from flashhead_edge.export.tensorrt.engines import Build, prepared
from flashhead_edge.export.tensorrt.graph import set_folder
from flashhead_edge.export.tensorrt.made import Model, decoded, made_folder, with_margins
from flashhead_edge.program.head import Device
from flashhead_edge.reference import run_stages, torch_head

pytest.importorskip("onnxruntime_genai")
LENGTHS = [9, 1, 1]
NAMED = 127  # tokens of the small tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in sizes with kernels, with a published head that opens half of its clusters."""
    folder = tmp_path_factory.mktemp("tensorrt")
    model = save_plugin_model(folder / "model", "llama_tied")
    return write_with_index(model, folder / "checkpoint", lambda weight, fingerprint: few_probes(weight, 8, NAMED, fingerprint=fingerprint))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_tensorrt(checkpoint, out, context=64, chunk=32, batch=2, device=ORIN)
    return out


def test_folder_has_models_weights_and_a_manifest_without_engines(exported: Path, checkpoint: Path) -> None:
    files = {p.name for p in exported.iterdir()}
    assert {"decoder.onnx", "head.onnx", "head_logits.onnx", "weights.safetensors", "manifest.json", "config.json", "tokenizer.json"} <= files
    assert not [f for f in files if f.endswith(".engine")]
    m = json.loads((exported / "manifest.json").read_text())
    index = json.loads((checkpoint / "config.json").read_text())["flash_head"]
    assert m["format"] == 1 and m["engines"] == {} and m["tensorrt"] is m["gpu"] is m["driver"] is m["plugin_library"] is None
    assert m["fingerprint"] == index["fingerprint"] and m["weights_fingerprint"] == fingerprint(exported / "weights.safetensors")
    assert m["weights_bytes"] == (exported / "weights.safetensors").stat().st_size
    assert (m["layers"], m["precision"], m["max_batch"], m["chunk"], m["context"], m["family"]) == ("plugin", "float16", 2, 32, 64, "LlamaForCausalLM")
    assert (m["body"], m["group"], m["capability"], m["multiprocessors"]) == ("int4", 32, 87, 16)
    s = m["settings"]
    assert (s["vocab_size"], s["hidden_size"], s["embedding_rows"], s["context_length"]) == (NAMED, 256, VOCAB, 256)
    assert (s["layers"], s["kv_heads"], s["head_size"], s["q_heads"], s["scale"], s["softcap"]) == (2, 2, 64, 4, 1.0, None)
    products = 2 * (512 * 256 + 256 * 256 + 384 * 256 + 256 * 192)
    assert s["body_parameters"] == products


def test_exported_decoder_says_what_the_checkpoint_s_model_says(exported: Path, checkpoint: Path) -> None:
    """The whole way, with the checkpoint's own head: 4-bit weights move states by half of their size (others are 1.4 of it away), and tokens are the head's."""
    from small_bodies import states_of

    from flashhead_edge.checkpoint import open_source, read_head, read_index

    weights = read_head(open_source(checkpoint))
    head = torch_head(read_index(checkpoint, weights), weights.weight.half().float())
    ids = np.random.default_rng(0).integers(3, 120, (2, sum(LENGTHS)))
    found = decode_plugins(Interpreter(exported, head), ids, LENGTHS)
    want = states_of(checkpoint, ids)
    assert np.linalg.norm(found["hidden_states"] - want) < 0.7 * np.linalg.norm(want)
    step = head.step(torch.from_numpy(found["hidden_states"][:, -1]))
    assert np.array_equal(found["token"][:, -1], step.token) and (found["counts"][:, 0] == 8).all()


def test_same_command_gives_the_same_bytes(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    """But for the folder that nodes name, and which `set_folder` changes as a move does."""
    export_tensorrt(checkpoint, tmp_path / "out", context=64, chunk=32, batch=2, device=ORIN)
    for model in (tmp_path / "out").glob("*.onnx"):
        assert bytes(tmp_path) in model.read_bytes()
        set_folder(model, exported)
    assert content(tmp_path / "out") == content(exported)


def test_failure_leaves_no_folder_and_no_trace(checkpoint: Path, tmp_path: Path) -> None:
    """Groups that do not divide the inputs are seen when the body has been built; an old export stays."""
    export_tensorrt(checkpoint, tmp_path / "out", context=64, device=ORIN)
    before = content(tmp_path / "out")
    with pytest.raises(ExportError, match=r"layers\.0\.down: a matrix \[256, 192\] in groups of 128"):
        export_tensorrt(checkpoint, tmp_path / "out", context=64, group=128, device=ORIN, overwrite=True)
    with pytest.raises(ExportError):
        export_tensorrt(checkpoint, tmp_path / "new", context=64, group=128, device=ORIN)
    assert content(tmp_path / "out") == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="the output folder exists already"):
        export_tensorrt(checkpoint, tmp_path / "out", device=ORIN)
    export_tensorrt(checkpoint, tmp_path / "out", context=32, chunk=32, device=ORIN, overwrite=True)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["context"] == 32 and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 512}, "the context is 512, expected 2 to the model's 256 positions"),
        ({"context": 64, "chunk": 65}, "the chunk is 65, expected 1 to the context's 64"),
        ({"batch": 33}, "the batch is 33, expected 1 to 32"),
        ({"group": 16}, "the group is 16, expected one of 32, 64, 128"),
        ({"precision": "float32"}, "the precision is float32, expected float16 or bfloat16"),
        ({"layers": "other"}, "layers is other, expected plugin or native"),
        ({"layers": "native", "precision": "bfloat16"}, "the precision of native layers is bfloat16, expected float16"),
        ({"layers": "native", "dense_head": True}, "a dense head beside native layers is asked for"),
    ],
)
def test_settings_out_of_range_are_refused_first(options: dict[str, Any], words: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        export_tensorrt(checkpoint, tmp_path / "out", **({"chunk": 32} | options), device=ORIN)
    assert words in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_without_a_head_index_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no head index"):
        export_tensorrt(checkpoint.parent / "model", tmp_path / "out", device=ORIN)


def test_runtimes_that_cannot_do_it_say_so(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(exported)
    with pytest.raises(SettingsError, match="runtime: cuda, expected tensorrt or tensorrt_rtx"):
        build_engines(exported, build=Build("cuda"))
    if pytest.importorskip("tensorrt_rtx_bindings"):
        with pytest.raises(SettingsError, match=r"TensorRT-RTX 1\.\S+: plugin layers, expected native ones, since it takes no plugins; pass --layers native"):
            build_engines(exported, build=Build("tensorrt_rtx"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt: the Python module cannot be imported .* it comes with JetPack"):
        prepared(Build(), "plugin", "float16")
    assert content(exported) == before


def test_engines_are_built_only_in_a_folder_that_is_whole(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: the file is missing, expected a folder that flashhead export tensorrt wrote"):
        build_engines(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match="the manifest has format 9, expected 1"):
        build_engines(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="the file cannot be read"):
        build_engines(tmp_path)


# ---- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> SimpleNamespace:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)


PLANNED = ("--onnx-only", "--multiprocessors", "16", "--shared-kib", "163", "--capability", "87")


def test_verb_writes_and_tells(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(
        capsys, "export", "tensorrt", checkpoint, tmp_path / "out", "--context", 64, "--chunk", 16, "--dense-head", "--onnx-only", "--for", "AGX Orin", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = one_document(done.stdout)
    assert [document["manifest"][name] for name in ("multiprocessors", "shared_bytes", "capability")] == [16, 163 << 10, 87]
    assert document["manifest"]["settings"]["q_heads"] == 4 and document["files"]["decoder_dense.onnx"] > 0
    assert f"no engines yet; on the board: flashhead export engines {tmp_path / 'out'}" in done.stderr.replace("\n", "")
    assert done.stdout.count("{") == done.stdout.count("}")


def test_verb_refuses_half_a_device_and_names_wrong_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for some in (PLANNED[:1], PLANNED[1:], PLANNED[:5]):
        done = run(capsys, "export", "tensorrt", checkpoint, tmp_path / "out", *some)
        assert done.returncode == 2 and "belong together: all of them, or none" in done.stderr
    for option in (("--memory", 100), ("--runtime", "tensorrt_rtx")):
        done = run(capsys, "export", "tensorrt", checkpoint, tmp_path / "out", *PLANNED, *option)
        assert done.returncode == 2 and "give them to `flashhead export engines`" in done.stderr
    for some, said in (
        (("--for", "thor", *PLANNED[1:]), "leave them out"),
        (("--for", "thor"), "all of them, or none"),
        (("--for", "xavier"), "board xavier: not known"),
    ):
        done = run(capsys, "export", "tensorrt", checkpoint, tmp_path / "out", *some)
        assert done.returncode == 2 and said in done.stderr
    done = run(capsys, "export", "engines", tmp_path / "none")
    assert done.returncode == 2 and "manifest.json: the file is missing" in done.stderr


# ---- made models

TINY = Model(256, 192, 2, 4, 2, 64, True, 1e4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(made.MODELS, "Llama-3.2-1B", TINY)
    monkeypatch.setitem(made.SHAPES, "Llama-3.2-1B", (5_003, 256))


def test_made_model_decodes_with_activations_of_a_usual_size(tiny: None, tmp_path: Path) -> None:
    made_folder(tmp_path / "out", "Llama-3.2-1B", Device(16, 163 << 10, 87), group=64, context=64, batch=2, chunk=32, dense_head=True)
    ids = np.random.default_rng(0).integers(0, 5_003, (2, sum(LENGTHS)))
    found = decode_plugins(Interpreter(tmp_path / "out", rounding="float16"), ids, LENGTHS)["hidden_states"]
    assert 0.9 < np.sqrt(np.mean(found**2)) < 1.1 and np.abs(found).max() < 10
    m = json.loads((tmp_path / "out/manifest.json").read_text())
    assert m["made"] == "Llama-3.2-1B" and m["settings"]["head_size"] == 64 and (tmp_path / "out/decoder_dense.onnx").is_file()


@pytest.mark.parametrize("vocab", [5_003, 5_008], ids=["an odd vocabulary", "whole"])
def test_a_dense_head_added_later_is_the_one_that_is_exported(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    monkeypatch.setitem(made.SHAPES, "Llama-3.2-1B", (vocab, 256))
    made_folder(tmp_path / "out", "Llama-3.2-1B", Device(16, 163 << 10, 87), group=64, context=64, batch=2, chunk=32, dense_head=True)
    dense = tmp_path / "out/decoder_dense.onnx"
    wanted = dense.read_bytes()
    dense.unlink()
    add_dense_head(tmp_path / "out")
    assert dense.read_bytes() == wanted


@pytest.mark.parametrize("change", ["no head", "native", "no onnx"])
def test_what_a_dense_head_cannot_be_added_to_is_refused(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    out = made_folder(tmp_path / "out", "Llama-3.2-1B", Device(16, 163 << 10, 87), group=64, context=64, batch=2, chunk=32)
    before = sorted(p.name for p in out.iterdir())
    if change == "no head":
        (out / "decoder.onnx").write_bytes((out / "decoder.onnx").read_bytes().replace(b"FlashHead", b"FlashBead"))
        with pytest.raises(ExportError, match=r"decoder.onnx: 0 nodes FlashHead, expected one at its end"):
            add_dense_head(out)
    elif change == "native":
        (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"layers": "plugin"', '"layers": "native"'))
        with pytest.raises(ExportError, match="a dense head beside native layers is asked for"):
            build_engines(out, dense_head=True)
    else:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "onnx" else found(name, package))
        with pytest.raises(ExportError, match="the onnx package is not installed, expected it for --dense-head"):
            build_engines(out, dense_head=True)
    assert sorted(p.name for p in out.iterdir()) == before


def test_made_head_opens_as_much_as_a_calibrated_one(tiny: None) -> None:
    """Over the states that it was set for, by the reference: clusters and rows within the rounding of float32."""
    index = with_margins(made_index(case_of("Llama-3.2-1B", FEW_CODES)), FEW_CODES)
    head = torch_head(index, torch.zeros(5_003, 256))
    assert np.abs(decoded(index.centroids) - head.centroids.numpy()).max() < 1e-5
    states = np.random.default_rng([0, 1]).standard_normal((made.STATES, 256)).astype(np.float32)
    trail = run_stages(head, torch.from_numpy(states))
    opened, _, rows = trail.counts.double().mean(0).tolist()
    assert abs(opened / (FEW_CODES.mean[0] * 5_003 / FEW_CODES.cluster_size) - 1) < 0.03
    assert 0.5 < rows / (FEW_CODES.mean[1] * 5_003 + 18) < 1.2  # always scored ones come on top, caps take some


def test_made_models_need_numpy_and_onnx_alone(root: Path, tmp_path: Path) -> None:
    """As on a board: everything that exporters need is not there."""
    script = f"""
import sys
for name in ("torch", "onnx_ir", "onnxruntime", "onnxruntime_genai", "transformers", "safetensors", "click", "rich", "tokenizers"):
    sys.modules[name] = None
from flashhead_edge.export.tensorrt import build_engines, made
from flashhead_edge.export.tensorrt.graph import set_folder
from flashhead_edge.program.head import Device
from flashhead_edge.errors import FlashHeadError
made.MODELS["Qwen3-0.6B"] = made.Model(256, 192, 1, 4, 2, 64, True, 1e4)
made.SHAPES["Qwen3-0.6B"] = (5003, 256)
out = made.made_folder({str(tmp_path / "out")!r}, "Qwen3-0.6B", Device(16, 163 << 10, 87), group=64, context=64, batch=1, chunk=8)
sys.modules["onnx"] = None  # engines are built without it
from flashhead_edge.export.tensorrt import builder, engines, versions
sys.modules["tensorrt"] = None
try:
    build_engines(out)
except FlashHeadError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("tensorrt: the Python module cannot be imported")


def test_unknown_made_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"made model: GPT, expected one of Llama-3\.2-1B"):
        made_folder(tmp_path / "out", "GPT", ORIN)
    assert not (tmp_path / "out").exists()
