"""Packed weights, made here by hand in the documented layouts, come out as the floats that were packed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import save_checkpoint, save_model
from torch import Tensor

from flashhead_edge.checkpoint import load_model, open_source, quantised, read_head
from flashhead_edge.errors import CheckpointError, UnsupportedModelError

N, K, GROUP = 24, 64, 16
GROUPS = K // GROUP
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: Tensor, bits: int, axis: int, order: list[int] | None = None) -> Tensor:
    """Pack codes along an axis into int32 words, one field after another from the lowest bit: plain Python, slow."""
    fields = 32 // bits
    moved = codes.movedim(axis, -1)
    lines = moved.reshape(-1, moved.shape[-1]).tolist()
    packed = []
    for line in lines:
        line = line + [0] * (-len(line) % fields)
        values = []
        for start in range(0, len(line), fields):
            group = line[start : start + fields]
            word = sum(group[order[i] if order else i] << (bits * i) for i in range(fields))
            values.append(word - 2**32 if word >= 2**31 else word)
        packed.append(values)
    return torch.tensor(packed, dtype=torch.int32).reshape(*moved.shape[:-1], -1).movedim(-1, axis).contiguous()


def random_parts(bits: int, seed: int = 0, n: int = N, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, k], zeros and scales [n, groups], and the floats [n, k] that they stand for."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    zeros = torch.randint(0, 2**bits, (n, k // GROUP), generator=g)
    scales = (torch.rand(n, k // GROUP, generator=g) + 0.5).half()
    wide = lambda x: x.repeat_interleave(GROUP, 1)  # noqa: E731
    return codes, zeros, scales, (codes - wide(zeros)).float() * wide(scales).float()


def compressed(bits: int, symmetric: bool, n: int = N, k: int = K, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, floats = random_parts(bits, seed, n, k)
    if symmetric:
        floats = (codes - 2 ** (bits - 1)).float() * scales.float().repeat_interleave(GROUP, 1)
    packed = {"weight_packed": words(codes, bits, 1), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
    if not symmetric:
        packed["weight_zero_point"] = words(zeros, bits, 0)
    return packed, floats


def awq(n: int = N, k: int = K, seed: int = 0, zero_point: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, floats = random_parts(4, seed, n, k)
    packed = {"qweight": words(codes.T, 4, 1, ORDER), "scales": scales.T.contiguous(), "qzeros": words(zeros.T, 4, 1, ORDER)}
    if not zero_point:
        del packed["qzeros"]
        floats = (codes - 8).float() * scales.float().repeat_interleave(GROUP, 1)
    return packed, floats


def gptq(bits: int = 4, version: int = 1, shuffled: bool = False, n: int = N, k: int = K, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, floats = random_parts(bits, seed, n, k)
    group = torch.arange(k) // GROUP
    if shuffled:
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(9))]
        floats = (codes - zeros[:, group]).float() * scales.float()[:, group]
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    packed = {"qweight": words(codes.T, bits, 0), "qzeros": words(stored.T, bits, 1), "scales": scales.T.contiguous(), "g_idx": group.int()}
    return packed, floats


def unpacked(packed: dict[str, Tensor], scheme: dict) -> Tensor:
    tensors = {f"a.{name}": tensor for name, tensor in packed.items()}
    out = dict(quantised.dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, "m"))
    assert set(out) == {"a.weight"}
    return out["a.weight"]


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    packed, floats = compressed(bits, symmetric)
    assert torch.equal(unpacked(packed, CT), floats)


def test_compressed_tensors_with_columns_that_do_not_fill_words() -> None:
    packed, floats = compressed(4, True)
    packed = packed | {"weight_packed": words(torch.randint(0, 16, (3, 20), generator=torch.Generator().manual_seed(1)), 4, 1)}
    codes = torch.randint(0, 16, (3, 20), generator=torch.Generator().manual_seed(1))
    packed |= {"weight_shape": torch.tensor([3, 20]), "weight_scale": torch.full((3, 1), 0.5)}
    assert torch.equal(unpacked(packed, CT), (codes - 8) * 0.5)
    assert floats.shape == (N, K)


def test_compressed_tensors_in_the_order_of_activations() -> None:
    packed, _ = compressed(4, True)
    group = torch.randint(0, GROUPS, (K,), generator=torch.Generator().manual_seed(3))
    codes = random_parts(4)[0]
    want = (codes - 8).float() * packed["weight_scale"].float()[:, group]
    assert torch.equal(unpacked(packed | {"weight_g_idx": group.int()}, CT), want)
    assert torch.equal(unpacked(packed | {"weight_g_idx": torch.full((K,), -1)}, CT), compressed(4, True)[1])  # -1: not used


@pytest.mark.parametrize("scale", [torch.full((N, 1), 0.25), torch.full((1,), 0.25), torch.full((N, GROUPS), 0.25)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_compressed_tensors_of_8_bits_that_are_not_packed(scale: Tensor, dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(unpacked({"weight": codes, "weight_scale": scale}, CT | {"format": "int-quantized"}), codes.float() * 0.25)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("scheme", [{"quant_method": "awq", "bits": 4}, {"quant_method": "awq", "w_bit": 4, "version": "GEMM"}])
def test_awq(zero_point: bool, scheme: dict) -> None:
    packed, floats = awq(zero_point=zero_point)
    assert torch.equal(unpacked(packed, scheme), floats)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(bits: int, version: int, shuffled: bool) -> None:
    packed, floats = gptq(bits, version, shuffled)
    scheme = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    assert torch.equal(unpacked(packed, scheme), floats)
    if not shuffled:
        del packed["g_idx"]
        assert torch.equal(unpacked(packed, scheme), floats)


@pytest.mark.parametrize("stored", [7, 8])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_symmetric_gptq_tells_its_version_by_its_zeros(stored: int, said: str) -> None:
    """GPTQModel wrote version 2 zeros under the name of version 1."""
    packed, _ = gptq()
    codes, _, scales, _ = random_parts(4)
    packed["qzeros"] = words(torch.full((GROUPS, N), stored), 4, 1)
    want = (codes - 8).float() * scales.float().repeat_interleave(GROUP, 1)
    assert torch.equal(unpacked(packed, {"quant_method": "gptq", "bits": 4, "checkpoint_format": said}), want)


def test_auto_round_names_its_layout() -> None:
    packed, floats = awq()
    assert torch.equal(unpacked(packed, {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"}), floats)


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ({"quant_method": "bitsandbytes"}, "m: the weights are quantised as bitsandbytes, expected compressed-tensors"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantised as awq, gemv"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "quantised as compressed-tensors, nvfp4-pack-quantized"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "quantised as auto-round, auto_round"),
        ({"quant_method": "gptq", "bits": 3}, "a has codes of 3 bits, expected 2, 4 or 8"),
        ({"quant_method": "awq", "bits": 8}, "a has codes of 8 bits, expected 4"),
    ],
)
def test_layouts_that_are_not_read(scheme: dict, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        unpacked(gptq()[0], scheme)


def test_packed_weight_of_another_shape() -> None:
    packed, _ = gptq()
    packed["scales"] = packed["scales"][:, :5]
    with pytest.raises(CheckpointError, match="m: the packed weight a does not have the form that its config says"):
        unpacked(packed, {"quant_method": "gptq", "bits": 4})


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
MAKERS: dict[str, tuple[Callable[..., tuple[dict[str, Tensor], Tensor]], dict]] = {
    "compressed-tensors": (
        lambda n, k, seed: compressed(4, True, n, k, seed),
        CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}, "ignore": ["lm_head"], "quantization_status": "compressed"},
    ),
    "awq": (lambda n, k, seed: awq(n, k, seed), {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (lambda n, k, seed: gptq(4, 1, False, n, k, seed), {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_whole_model(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model with every linear layer packed gives the logits of the same model in floats, converted or not, and that is said."""
    make, scheme = MAKERS[kind]
    folder, plain = save_model(tmp_path / "model", dtype=torch.float32), save_model(tmp_path / "plain", dtype=torch.float32)
    tensors, floats = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for seed, name in enumerate(n for n in list(tensors) if n.endswith("_proj.weight")):
        n, k = tensors[name].shape
        packed, floats[name] = make(n, k, seed)
        del tensors[name]
        stem = name.removesuffix("weight")
        tensors |= {stem + part: tensor for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    out = save_checkpoint(folder, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        want = load_model(plain)(ids).logits
        got = [load_model(f)(ids).logits for f in (folder, out)]
    # where transformers' own quantiser runs it may round otherwise; where it does not the floats are the same
    native = "turned into floats in memory" not in caplog.text
    for logits in got:
        assert torch.allclose(logits, want, atol=0.05) if native else torch.equal(logits, want)
    assert torch.equal(read_head(out).weight, load_model(out).get_output_embeddings().weight)


def test_older_gptq_config_file(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert quantised.quantisation({}, tmp_path) == {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert quantised.quantisation(open_source(model_folder).config, model_folder) is None
    assert quantised.quantisation({"text_config": {"quantization_config": {"quant_method": "awq"}}}) == {"quant_method": "awq"}
