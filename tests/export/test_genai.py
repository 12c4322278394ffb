"""ONNX Runtime GenAI, unmodified, on a body with a head behind it: what it needs of the folder, and the same greedy text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bodies import VOCAB, save_body

og = pytest.importorskip("onnxruntime_genai")

import onnx_ir as ir  # noqa: E402

from flashhead_edge.export.body import Body, build_body  # noqa: E402
from flashhead_edge.export.body_dialects import to_dialect  # noqa: E402
from flashhead_edge.export.genai import genai_config, last_hidden  # noqa: E402
from flashhead_edge.export.graph import Ops  # noqa: E402

NEW = 12
PROMPTS = [[5, 77, 31, 8, 99, 14, 52], [40, 3], [61, 62, 63, 64]]


def save_decoder(model: ir.Model, rows: np.ndarray, built: dict[str, Any], folder: Path, shared_cache: bool) -> Path:
    """The body with a dense head for the last real token of each row."""
    folder.mkdir()
    graph, op = model.graph, Ops()
    hidden = next(v for v in graph.outputs if v.name == "hidden_states")
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    logits = op.Unsqueeze(op.MatMul(last_hidden(op, hidden, mask), op.const(rows.T)), op.ints(1))
    op.rename("head")
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch_size", 1, len(rows)])
    graph.extend(op.nodes)
    graph.outputs[list(graph.outputs).index(hidden)] = logits
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    (folder / "genai_config.json").write_text(json.dumps(genai_config(built, shared_cache=shared_cache)))
    return folder


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What GenAI writes after each prompt; several are padded on their right, as its tokenizer does."""
    longest = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + NEW, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([p + [0] * (longest - len(p)) for p in prompts], np.int32))
    written: list[list[int]] = [[] for _ in prompts]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(written, generator.get_next_tokens()):
            row.append(int(token))
    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that stops at a token which is not written here."""
    folder = save_body(tmp_path_factory.mktemp("genai") / "model", "qwen3", torch.float32)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": VOCAB - 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB - 1, "pad_token_id": 0}))
    return folder


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Body]:
    """Its body on disk, built as the product builds it."""
    work = tmp_path_factory.mktemp("work")
    body = build_body(folder, work, precision="fp32")
    ir.save(body.model, work / "body.onnx", external_data="body.onnx.data")
    return work / "body.onnx", body


@pytest.mark.parametrize("dialect", ["onnxruntime", "portable"])
def test_greedy_text_is_transformers(dialect: str, folder: Path, built: tuple[Path, Body], tmp_path: Path) -> None:
    import transformers

    path, first = built
    body = replace(first, model=ir.load(path))
    to_dialect(body, dialect)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = plain.get_output_embeddings().weight.detach().numpy()
    out = save_decoder(body.model, rows, body.genai_config, tmp_path / "out", shared_cache=dialect == "onnxruntime")
    model = og.Model(str(out))
    want = [plain.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS]
    assert [greedy(model, [p])[0] for p in PROMPTS] == want
    if dialect == "onnxruntime":  # prompts of different lengths at once
        batch = greedy(model, PROMPTS)
        assert all(row[:NEW] == text for row, text in zip(batch, want))


def test_configuration_names_the_decoder_and_its_logits() -> None:
    built = {"model": {"decoder": {"filename": "x.onnx", "outputs": {"present_key_names": "present.%d.key"}}}, "search": {"past_present_share_buffer": True}}
    made = genai_config(built, filename="model.onnx", shared_cache=False)
    assert made["model"]["decoder"] == {"filename": "model.onnx", "outputs": {"logits": "logits", "present_key_names": "present.%d.key"}}
    assert made["search"]["past_present_share_buffer"] is False
    assert built["model"]["decoder"]["filename"] == "x.onnx"  # the builder's own is left as it was
