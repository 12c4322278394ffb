"""What is accepted as a model, and each refusal: its class and its sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_checkpoints import save_model

from flashhead_edge.checkpoint import open_source, read_head
from flashhead_edge.errors import CheckpointError, UnsupportedModelError


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_folder(folder: Path) -> None:
    source = open_source(folder)
    assert source.folder == folder and source.gguf is None and source.name == "model"
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert open_source(source) is source


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder, expected a model folder, a \.gguf file or a hub name"):
        open_source(tmp_path / "nowhere")


def test_hub_that_cannot_be_reached() -> None:
    with pytest.raises(CheckpointError, match=r"owner/some-model: no such folder, and the hub cannot be reached; name a local folder"):
        open_source("owner/some-model")


def test_hub_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name is fetched as safetensors and text files; code only where it is trusted."""
    asked: list[dict] = []

    def fetch(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = open_source("owner/some-model", revision="v2")
    assert source.name == "owner/some-model" and source.revision == "v2"
    assert asked[0]["revision"] == "v2" and "*.py" not in asked[0]["allow_patterns"] and "*.bin" not in asked[0]["allow_patterns"]
    open_source("owner/some-model", trust_remote_code=True)
    assert "*.py" in asked[1]["allow_patterns"]


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no config\.json, expected a Hugging Face model folder or one \.gguf file"):
        open_source(tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a single file of type \.onnx, expected a model folder or a \.gguf file"):
        open_source(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel has no head that writes the next token"),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, "BertLMHeadModel is an encoder"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel has no head that writes the next token"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification has no head that writes"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"architectures": None, "model_type": "vit"}, "model_type 'vit' has no head that writes"),
        ({"model_type": "never-heard-of"}, "model type 'never-heard-of' is unknown, expected one that this version of transformers has"),
    ],
)
def test_models_without_a_head(folder: Path, changes: dict, sentence: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=sentence):
        open_source(folder)


def test_architecture_from_the_model_type(folder: Path) -> None:
    edit(folder, architectures=None)
    assert read_head(folder).vocab_size == 127


def test_remote_code_only_when_asked(folder: Path) -> None:
    edit(folder, model_type="their-own", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(
        CheckpointError,
        match=r"model type 'their-own' brings its own Python code, expected leave to run it; read that code, then allow it with trust_remote_code",
    ):
        open_source(folder)
    assert open_source(folder, trust_remote_code=True).trust_remote_code


def test_native_code_serves_a_model_that_also_brings_its_own(folder: Path) -> None:
    """Phi-3 and others carry auto_map though transformers knows them: nothing of theirs is run."""
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert read_head(folder).vocab_size == 127


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code when they are read, expected safetensors"):
        open_source(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights, expected model\.safetensors or model\.safetensors\.index\.json"):
        open_source(folder)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_weights(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file has [\d,]+ bytes, expected [\d,]+ as its header says"):
        open_source(folder)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "the file has 0 bytes, expected a safetensors file"),
        (b"\xff" * 8, "the header is 18,446,744,073,709,551,615 bytes long in a file of 8"),
        (b"\x02\0\0\0\0\0\0\0[]", "the header cannot be read"),
        (b"\x04\0\0\0\0\0\0\0{\xff\xff}", "the header cannot be read"),
    ],
)
def test_damaged_header(folder: Path, data: bytes, sentence: str) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence):
        open_source(folder)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "a lies at bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "a lies at bytes"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "a has dtype F99"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "a lies at bytes"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, "the header cannot be read"),
    ],
)
def test_lying_header(folder: Path, entry: dict, sentence: str) -> None:
    header = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=sentence):
        open_source(folder)


def test_shards(tmp_path: Path) -> None:
    """Sharded weights read the same; a missing shard and a tensor that is not where the index says are named."""
    whole, folder = save_model(tmp_path / "whole"), save_model(tmp_path / "shards", max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert read_head(folder).fingerprint == read_head(whole).fingerprint
    shards[1].rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: the file is missing"):
        open_source(folder)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match=r"is missing, expected by model\.safetensors\.index\.json"):
        open_source(folder)


def test_index_that_points_outside(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "shards", max_shard_size="8KB")
    path = folder / "model.safetensors.index.json"
    listed = json.loads(path.read_text())
    listed["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    path.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        open_source(folder)
