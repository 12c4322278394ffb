"""From a model in floats to what runs: quantize, convert, export to ONNX and to TensorRT, each the same integers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import one_document
from plugin_interpreter import Interpreter, decode_plugins
from small_bodies import decode_with, session, states_of
from small_plugins import ORIN, save_plugin_model

from flashhead_edge.checkpoint import open_source, read_head, read_index
from flashhead_edge.cli import main
from flashhead_edge.export.tensorrt import export_tensorrt
from flashhead_edge.reference import torch_head

pytest.importorskip("onnxruntime_genai")
LENGTHS = [9, 1, 1]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> SimpleNamespace:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--asymmetric",)], ids=["symmetric", "asymmetric"])
def test_quantize_convert_export(more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verbs one after another; what runs computes the quantised checkpoint's states, not those of a second rounding."""
    model, packed, converted = save_plugin_model(tmp_path / "model", "llama_tied"), tmp_path / "packed", tmp_path / "converted"
    (tmp_path / "text.txt").write_text(" ".join(f"t{(7 * i * i) % 126}" for i in range(1200)))
    text = tmp_path / "text.txt"
    done = run(capsys, "quantize", model, packed, "--group", 32, *more, "--positions", 1000, "--measured", 1000, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    report = one_document(done.stdout)
    assert [t["name"] for t in report["texts"]] == ["own text, held out", "text.txt"] and report["symmetric"] == (not more)
    assert "layer 2 of 2" in done.stderr and "round-to-nearest" in done.stderr and "text.txt" in done.stderr
    again = run(capsys, "quantize", packed, tmp_path / "twice", "--group", 32)
    assert (again.returncode, again.stdout) == (2, "") and "quantised already (compressed-tensors)" in again.stderr.splitlines()[-1]
    assert run(capsys, "convert", packed, converted, "--head", "published").returncode == 0
    assert "flashhead_quantize" in (converted / "config.json").read_text()

    ids = np.random.default_rng(0).integers(3, 120, (2, sum(LENGTHS)))
    from safetensors.torch import load_file, save_file

    from flashhead_edge.checkpoint import quantised

    tensors, scheme = load_file(packed / "model.safetensors"), quantised.quantisation(open_source(packed).config)
    assert scheme is not None
    floats = dict(quantised.dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, "m"))
    plain = save_plugin_model(tmp_path / "plain", "llama_tied")
    save_file({n: t.float().contiguous() for n, t in floats.items()}, plain / "model.safetensors", {"format": "pt"})
    want = states_of(plain, ids)

    done = run(capsys, "export", "onnx", converted, tmp_path / "onnx", "--dialect", "portable")
    assert done.returncode == 0, done.stderr
    states = decode_with(session(tmp_path / "onnx/body.onnx", exact=True), ids, LENGTHS)
    assert np.abs(states - want).max() < 1e-2 * np.abs(want).max()  # float32's rounding; a second rounding to 4 bits moves states by half
    assert one_document(run(capsys, "inspect", tmp_path / "onnx", "--json").stdout)

    export_tensorrt(converted, tmp_path / "tensorrt", context=64, chunk=32, batch=2, device=ORIN)
    weights = read_head(open_source(converted))
    head = torch_head(read_index(converted, weights), weights.weight.half().float())
    found = decode_plugins(Interpreter(tmp_path / "tensorrt", head), ids, LENGTHS)["hidden_states"]
    assert np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)  # activations of 16 bits
