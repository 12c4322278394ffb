"""The head alone: every dtype and family, padding, and what is not a usable head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import NAMED, VOCAB, save_model, save_tokenizer
from small_models import FAMILIES, SIZES, small_model

from flashhead_edge.checkpoint import fingerprint, load_model, read_head
from flashhead_edge.errors import CheckpointError, SettingsError, UnsupportedModelError


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    """Matrix, bias, tie, scale and soft-cap: together they give the model's own logits."""
    folder = save_model(tmp_path, family, torch.float32, tokenizer=False)
    head, model = read_head(folder), load_model(folder)
    output = model.get_output_embeddings()
    assert torch.equal(head.weight, output.weight) and head.vocab_size == VOCAB
    assert (head.bias is None) == (getattr(output, "bias", None) is None)
    assert head.bias is None or torch.equal(head.bias, output.bias)
    assert head.tied == (output.weight is model.get_input_embeddings().weight)
    seen: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        want = model(torch.arange(3, 20)[None]).logits
        got = torch.nn.functional.linear(seen[0], head.weight, head.bias) * head.scale
        if head.softcap is not None:
            got = head.softcap * torch.tanh(got / head.softcap)
    assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)  # a few float32 roundings of logits about 5


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({"model_type": "cohere", "logit_scale": 0.25}, 0.25, None),
        ({"model_type": "cohere2"}, 0.0625, None),  # left out: the family's default
        ({"model_type": "granitemoe", "logits_scaling": 8.0}, 0.125, None),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, 8.0, None),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5, None),
        ({"model_type": "gemma2"}, 1.0, 30.0),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 12.0}}, 1.0, 12.0),
        ({"model_type": "gemma3_text"}, 1.0, None),
        ({"model_type": "nanochat"}, 1.0, 15.0),
        ({"model_type": "llama"}, 1.0, None),
    ],
)
def test_logit_rule(config: dict, scale: float, softcap: float | None) -> None:
    from flashhead_edge.checkpoint.families import logit_rule

    assert logit_rule(config, "m") == (scale, softcap)


def test_unknown_scaling_is_refused() -> None:
    from flashhead_edge.checkpoint.families import logit_rule

    with pytest.raises(UnsupportedModelError, match=r"m: config.json has logits_scaling = 8.0, which model type 'llama' is not known to use"):
        logit_rule({"model_type": "llama", "logits_scaling": 8.0}, "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path, family, dtype)
    head = read_head(folder)
    assert head.weight.dtype == dtype and head.tied == (family == "llama_tied")
    assert torch.equal(load_model(folder).get_output_embeddings().weight, head.weight.float())
    assert load_model(folder, dtype=dtype).get_output_embeddings().weight.dtype == dtype


@pytest.mark.parametrize(("stored", "asked"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float16)])
def test_dtype_that_cannot_hold_the_head(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    names = str(stored).removeprefix("torch."), str(asked).removeprefix("torch.")
    with pytest.raises(SettingsError, match=rf"the head is stored in {names[0]}, expected a dtype that holds it exactly, found {names[1]}"):
        load_model(save_model(tmp_path, dtype=stored), dtype=asked)


def test_padding_rows_cannot_be_returned(model_folder: Path) -> None:
    head = read_head(model_folder)
    assert len(head.weight) == VOCAB and head.vocab_size == NAMED


def test_tokenizer_that_names_more_than_the_rows(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tokenizer=False)
    save_tokenizer(folder, named=VOCAB + 9)
    assert read_head(folder).vocab_size == VOCAB


def test_tokenizer_of_vocab_json(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tokenizer=False)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 99}))
    assert read_head(folder).vocab_size == 100
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 110}))
    assert read_head(folder).vocab_size == 111


def test_unigram_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tokenizer=False)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0]] * 90}, "added_tokens": [{"id": 95}]}))
    assert read_head(folder).vocab_size == 96


def test_damaged_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tokenizer=False)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": "b"}}}))
    with pytest.raises(CheckpointError, match="the tokenizer files do not have the expected form"):
        read_head(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 77, VOCAB - 1])
def test_rows_that_are_not_finite(value: float, row: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][row, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight has NaN or infinite values \(first in row {row}\), expected finite numbers"):
        read_head(folder)


def test_bias_that_is_not_finite(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "phi")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][9] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the bias of lm_head\.weight has NaN or infinite values \(first in row 9\)"):
        read_head(folder)


@pytest.mark.parametrize(
    ("replacement", "sentence"),
    [
        ({"lm_head.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, r"the head is quantised \(lm_head\.weight_packed\)"),
        ({"lm_head.qweight": torch.zeros(4, 4, dtype=torch.int32)}, r"the head is quantised \(lm_head\.qweight\)"),
        ({"lm_head.weight": torch.zeros(VOCAB, 32, dtype=torch.int8)}, r"lm_head\.weight is I8 \[131, 32\], expected an unquantised matrix"),
        ({"lm_head.weight": torch.zeros(VOCAB)}, r"lm_head\.weight is F32 \[131\], expected an unquantised matrix"),
    ],
)
def test_head_that_is_no_matrix_of_floats(replacement: dict, sentence: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors | replacement, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        read_head(folder)


def test_untied_without_a_head(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"no lm_head\.weight, and config\.json says that model\.embed_tokens\.weight is not tied to it"):
        read_head(folder)


def test_missing_body_weight(tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    folder = save_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights are missing \(first model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(folder)


def test_fingerprint_tells_heads_apart() -> None:
    weight = small_model("llama").lm_head.weight.detach()
    other = weight.clone()
    other[130, 31] += 1e-6
    bias = torch.zeros(VOCAB)
    names = [fingerprint(w) for w in (weight, other, weight.bfloat16(), weight.view(262, 16))] + [fingerprint(weight, bias), fingerprint(weight, bias + 1)]
    assert len(set(names)) == len(names)
    assert fingerprint(weight.clone()) == names[0] and names[0].startswith("sha256:")
    assert fingerprint(weight.T.contiguous().T) == names[0]


def test_reading_the_head_reads_the_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other tensor is taken from the file."""
    from flashhead_edge.checkpoint import weights

    folder, taken = save_model(tmp_path), []
    real = weights._read
    monkeypatch.setattr(weights, "_read", lambda file, name: taken.append(name) or real(file, name))
    read_head(folder)
    assert taken == ["lm_head.weight"]
    assert SIZES["vocab_size"] == VOCAB
