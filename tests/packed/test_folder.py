"""Model folders of each format: packed here one code at a time, or by the format's own library, read back to the number."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flashhead_edge.checkpoint.tensors import ITEM_BITS
from flashhead_edge.errors import CheckpointError, FlashHeadError, UnsupportedModelError
from flashhead_edge.packed import Coded4, dense, open_weights

N, K, GROUP = 24, 64, 32
LAYER = "model.layers.0.self_attn.q_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
MLX = {"group_size": 32, "bits": 4}


def words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8)), signed: bool = True) -> np.ndarray:
    """Codes [..., 8 w] in words of 32 bits along the last axis: code order[i] of eight at bits 4 i. One at a time, in Python's own integers."""
    out = np.empty((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for at in np.ndindex(out.shape):
        eight = codes[at[:-1]][8 * at[-1] : 8 * at[-1] + 8]
        out[at] = sum(int(eight[order[i]]) << (4 * i) for i in range(8))
    return out.view(np.int32) if signed else out


def made(seed: int = 0, n: int = N, k: int = K, group: int = GROUP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, k], zeros and scales [n, k / group] of a matrix."""
    rng = np.random.default_rng(seed)
    shape = (n, k // group)
    return rng.integers(0, 16, (n, k)), rng.integers(0, 16, shape), rng.normal(size=shape).astype(np.float16)


def value(codes: np.ndarray, zeros: np.ndarray | int, scales: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """(code - zero) * scale in float32, [n, k]; `groups` gives each input's."""
    index = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1]) if groups is None else groups
    zero = np.broadcast_to(zeros, scales.shape)[:, index]
    return (codes - zero).astype(np.float32) * scales.astype(np.float32)[:, index]


def write(folder: Path, tensors: dict[str, np.ndarray | Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() if isinstance(v, Tensor) else torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def layer(parts: dict[str, np.ndarray | Tensor], stem: str = LAYER) -> dict[str, np.ndarray | Tensor]:
    return {f"{stem}.{name}": part for name, part in parts.items()}


def quantised(scheme: dict[str, Any]) -> dict[str, Any]:
    return {**CONFIG, "quantization_config": scheme}


def check(folder: Path, want: np.ndarray, stem: str = LAYER) -> Coded4:
    """The matrix that a folder gives, in every way that it gives it."""
    n, k = want.shape
    with open_weights(folder) as weights:
        coded = weights.linear(stem)
        assert isinstance(coded, Coded4)
        assert coded.codes.shape == (n, k // 2) and coded.codes.dtype == np.uint8 and coded.codes.flags.c_contiguous
        assert coded.scales.dtype == np.float32 and coded.scales.shape == (n, k // coded.group)
        assert coded.zeros is None or (coded.zeros.dtype == np.uint8 and coded.zeros.shape == coded.scales.shape and coded.zeros.max() < 16)
        name = f"{stem}.weight"
        assert name in set(weights.names()) and weights.shape(name) == (n, k)
        assert not any(end in other for other in weights.names() for end in ("packed", "qweight", "scale", "zero", "biases", "g_idx"))
        assert np.array_equal(dense(coded), want) and np.array_equal(weights.floats(name), want)
        for start, stop in ((0, 1), (3, 11), (n - 1, n), (8, 16), (0, n)):
            assert np.array_equal(weights.rows(name, start, stop), want[start:stop])
    assert np.array_equal(dense(coded), want)  # after close too
    return coded


# ---- compressed-tensors


def compressed(symmetric: bool, group: int, dtype: torch.dtype = torch.float16, n: int = N, k: int = 256, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """What the format's own library packs, and what it unpacks and dequantises that to, both by its own code."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g).to(dtype)
    strategy = "channel" if group == -1 else "group"
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=None if group == -1 else group)
    groups = 1 if group == -1 else k // group
    scale = (torch.rand(n, groups, generator=g) / 4 + 0.1).to(dtype)
    zero = torch.randint(-8, 8, (n, groups), generator=g, dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    parts = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    floats = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    parts["weight_shape"] = torch.as_tensor(parts["weight_shape"], dtype=torch.int64)
    assert ("weight_zero_point" in parts) != symmetric
    return parts, floats


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors_as_its_library_reads_it(symmetric: bool, group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    parts, theirs = compressed(symmetric, group, dtype)
    scheme = json.loads(json.dumps(COMPRESSED))
    scheme["config_groups"]["group_0"]["weights"] |= {"symmetric": symmetric, "strategy": "channel" if group == -1 else "group", "group_size": group}
    folder = write(tmp_path, layer(parts), quantised(scheme))
    with open_weights(folder) as weights:
        ours = weights.floats(f"{LAYER}.weight")
    # the library multiplies in the scales' 16 bits; our product is exact, so that rounding it gives the library's, bit for bit
    assert torch.equal(torch.from_numpy(ours).to(dtype), theirs)
    coded = check(folder, ours)
    assert coded.group == (256 if group == -1 else group)
    assert torch.equal(torch.from_numpy(coded.scales), parts["weight_scale"].float())
    assert (coded.zeros is None) == symmetric and coded.order is coded.minima is None


def hand_compressed(groups: np.ndarray | None = None, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    codes, zeros, scales = made(seed)
    parts: dict[str, Any] = {
        "weight_packed": words(codes),
        "weight_scale": scales,
        "weight_zero_point": words(zeros.T).T,
        "weight_shape": np.array([N, K]),
    }
    if groups is not None:
        parts["weight_g_idx"] = groups.astype(np.int32)
    return parts, value(codes, zeros, scales, groups)


def test_compressed_tensors_with_inputs_in_another_order(tmp_path: Path) -> None:
    groups = np.random.default_rng(1).permutation(np.arange(K) // GROUP)
    parts, want = hand_compressed(groups)
    coded = check(write(tmp_path, layer(parts), quantised(COMPRESSED)), want)
    assert coded.order is not None and coded.order.dtype == np.int32
    parts["weight_g_idx"][:] = -1  # as older versions write it where there is no order
    codes, zeros, scales = made()
    assert check(write(tmp_path, layer(parts), quantised(COMPRESSED)), value(codes, zeros, scales)).order is None


def test_compressed_tensors_with_zero_points_one_number_each(tmp_path: Path) -> None:
    parts, want = hand_compressed()
    parts["weight_zero_point"] = (made()[1] - 8).astype(np.int8)
    check(write(tmp_path, layer(parts), quantised(COMPRESSED)), want)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_quantize_writes(symmetric: bool, tmp_path: Path) -> None:
    from flashhead_edge.quantize.grid import nearest, packed

    coded = nearest(torch.randn(N, 256, generator=torch.Generator().manual_seed(4)), 64, symmetric, torch.bfloat16)
    scheme = json.loads(json.dumps(COMPRESSED))
    scheme["config_groups"]["group_0"]["weights"] |= {"symmetric": symmetric, "group_size": 64}
    check(write(tmp_path, layer(packed(coded)), quantised(scheme)), coded.values().numpy())


# ---- AWQ, GPTQ: the formulas of AutoAWQ's and GPTQModel's dequantisation, which llama.cpp's converter writes out too
# (convert_hf_to_gguf.py, dequant_gptq): (code - zero) * scale, version 1 with zero = stored + 1


def awq(n: int = N, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    codes, zeros, scales = made(seed, n)
    return {"qweight": words(codes.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER), "scales": scales.T}, value(codes, zeros, scales)


def test_awq(tmp_path: Path) -> None:
    parts, want = awq()
    coded = check(write(tmp_path, layer(parts), quantised(AWQ)), want)
    assert coded.zeros is not None and np.array_equal(coded.zeros, made()[1])
    del parts["qzeros"]
    codes, _, scales = made()
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": False, "version": "GEMM"}
    assert check(write(tmp_path, layer(parts), quantised(old)), value(codes, 8, scales)).zeros is None


def test_awq_without_the_zeros_that_its_config_has_is_refused(tmp_path: Path) -> None:
    parts, _ = awq()
    del parts["qzeros"]
    with pytest.raises(CheckpointError, match=r"qzeros: no such tensor"):
        open_weights(write(tmp_path, layer(parts), quantised(AWQ)))


def test_compressed_tensors_without_the_zeros_that_their_config_has_are_refused(tmp_path: Path) -> None:
    parts, _ = hand_compressed()
    del parts["weight_zero_point"]
    config = copy.deepcopy(COMPRESSED)
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False
    with pytest.raises(CheckpointError, match=r"weight_zero_point: no such tensor"):
        open_weights(write(tmp_path, layer(parts), quantised(config)))


def test_mlx_codes_without_scales_are_refused(tmp_path: Path) -> None:
    parts, _ = mlx(32)
    other, _ = mlx(32)
    del parts["scales"]
    config = {**CONFIG, "quantization": MLX, "quantization_config": MLX}
    with pytest.raises(CheckpointError, match=r"scales: no such tensor"):
        open_weights(write(tmp_path, {**layer(parts), **layer(other, "model.embed_tokens")}, config))


def gptq(version: int, zeros: np.ndarray | None = None, groups: np.ndarray | None = None) -> tuple[dict[str, Any], np.ndarray]:
    codes, found, scales = made()
    zeros = found if zeros is None else zeros
    parts = {"qweight": words(codes.T.T).T, "qzeros": words(((zeros - (version == 1)) % 16).T), "scales": scales.T}
    parts["g_idx"] = (np.arange(K) // GROUP if groups is None else groups).astype(np.int32)
    return parts, value(codes, zeros, scales, groups)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq(version: int, tmp_path: Path) -> None:
    parts, want = gptq(version)
    scheme = {**GPTQ, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    coded = check(write(tmp_path, layer(parts), quantised(scheme)), want)
    assert coded.order is None and coded.zeros is not None and np.array_equal(coded.zeros, made()[1])
    del parts["g_idx"]
    check(write(tmp_path, layer(parts), quantised(scheme)), want)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_symmetric_gptq_tells_its_version_by_its_zeros(version: int, said: str, tmp_path: Path) -> None:
    """Writers have labelled version 2 as version 1; a symmetric matrix has the zero 8 in either."""
    parts, want = gptq(version, np.full((N, K // GROUP), 8))
    assert check(write(tmp_path, layer(parts), quantised({**GPTQ, "sym": True, "checkpoint_format": said})), want).zeros is None


def test_asymmetric_gptq_is_what_its_config_says(tmp_path: Path) -> None:
    parts, want = gptq(1, np.full((N, K // GROUP), 9))  # stored as 8, which in a symmetric file would be version 2
    assert check(write(tmp_path, layer(parts), quantised({**GPTQ, "sym": False})), want).zeros is not None


def test_gptq_in_the_order_of_activations(tmp_path: Path) -> None:
    groups = np.random.default_rng(2).permutation(np.arange(K) // GROUP)
    parts, want = gptq(1, groups=groups)
    coded = check(write(tmp_path, layer(parts), quantised({**GPTQ, "desc_act": True})), want)
    assert coded.order is not None and sorted(coded.order) == list(range(K))
    assert (groups[coded.order] == np.arange(K) // GROUP).all()


def test_gptq_of_the_first_kind_has_its_own_config_file(tmp_path: Path) -> None:
    parts, want = gptq(1)
    folder = write(tmp_path, layer(parts), CONFIG)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False}))
    check(folder, want)


@pytest.mark.parametrize(("packing", "parts"), [("auto_round:auto_gptq", gptq(1)), ("auto_round:auto_awq", awq())])
def test_auto_round_writes_the_two_layouts(packing: str, parts: tuple[dict[str, Any], np.ndarray], tmp_path: Path) -> None:
    scheme = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False}
    check(write(tmp_path, layer(parts[0]), quantised(scheme)), parts[1])


# ---- MLX: code * scale + bias (https://ml-explore.github.io/mlx, mlx.core.quantize, "affine")


def mlx(group: int, dtype: torch.dtype = torch.float16, n: int = N, k: int = 256) -> tuple[dict[str, Any], np.ndarray]:
    g = torch.Generator().manual_seed(3)
    codes = np.random.default_rng(3).integers(0, 16, (n, k))
    scales, biases = (torch.randn(n, k // group, generator=g).to(dtype) for _ in range(2))
    wide = [x.float().numpy().repeat(group, 1) for x in (scales, biases)]
    return {"weight": words(codes, signed=False), "scales": scales, "biases": biases}, codes.astype(np.float32) * wide[0] + wide[1]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mlx(group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    parts, want = mlx(group, dtype)
    sizes = {"group_size": group, "bits": 4}
    config = {**CONFIG, "quantization": sizes, "quantization_config": sizes}  # mlx-lm writes it twice
    coded = check(write(tmp_path, {**layer(parts), **layer(mlx(group, dtype)[0], "model.embed_tokens")}, config), want)
    assert coded.group == group and coded.zeros is None and coded.minima is not None
    check(tmp_path, want, "model.embed_tokens")


def test_mlx_with_a_layer_of_its_own_size(tmp_path: Path) -> None:
    first, second = mlx(64), mlx(32)
    other = "model.layers.1.mlp.down_proj"
    config = {**CONFIG, "quantization": {"group_size": 64, "bits": 4, "mode": "affine", other: {"group_size": 32, "bits": 4}, "lm_head": False}}
    tensors = {**layer(first[0]), **layer(second[0], other), "lm_head.weight": torch.randn(4, 8)}
    check(write(tmp_path, tensors, config), first[1])
    assert check(tmp_path, second[1], other).group == 32
    with open_weights(tmp_path) as weights:
        assert isinstance(weights.linear("lm_head"), np.ndarray)


# ---- what stands around the matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_come_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix, vector = torch.randn(6, 10).to(dtype), torch.randn(7).to(dtype)
    folder = write(tmp_path, {"lm_head.weight": matrix, "model.norm.weight": vector, f"{LAYER}.bias": vector.clone()}, CONFIG)
    with open_weights(folder) as weights:
        assert weights.config == CONFIG and set(weights.names()) == {"lm_head.weight", "model.norm.weight", f"{LAYER}.bias"}
        found = weights.linear("lm_head")
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert np.array_equal(found, matrix.float().numpy()) and np.array_equal(weights.floats("model.norm.weight"), vector.float().numpy())
        assert np.array_equal(weights.rows("lm_head.weight", 2, 5), matrix[2:5].float().numpy())
        assert weights.shape("model.norm.weight") == (7,)


def test_shards_are_one_model(tmp_path: Path) -> None:
    parts, want = awq()
    tensors = layer(parts)
    write(tmp_path, {}, quantised(AWQ))
    (tmp_path / "model.safetensors").unlink()
    where = {}
    for i, (name, part) in enumerate(tensors.items()):
        where[name] = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: torch.from_numpy(np.ascontiguousarray(part))}, tmp_path / where[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check(tmp_path, want)


@pytest.mark.parametrize(
    ("before", "head"),
    [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head."), ("model.text_model.", "lm_head."), ("model.", "lm_head.")],
    ids=["Qwen3-VL", "Gemma 3 before transformers 5", "SmolVLM", "text alone"],
)
def test_multimodal_models_give_the_names_of_their_text(before: str, head: str, tmp_path: Path) -> None:
    parts, want = awq()
    stem = f"{before}layers.0.self_attn.q_proj"
    tensors = {
        **layer(parts, stem),
        f"{head}weight": torch.ones(3, 4),
        f"{before}norm.weight": torch.ones(4),
        "model.visual.patch_embed.weight": torch.ones(2, 2),
    }
    text = {"model_type": "qwen3_vl_text", "quantization_config": AWQ}
    check(write(tmp_path, tensors, {"model_type": "qwen3_vl", "text_config": text}), want)
    with open_weights(tmp_path) as weights:
        assert set(weights.names()) == {f"{LAYER}.weight", "lm_head.weight", "model.norm.weight", "model.visual.patch_embed.weight"}


def test_what_was_asked_wrongly(tmp_path: Path) -> None:
    folder = write(tmp_path, {**layer(awq()[0]), "model.norm.weight": torch.ones(4)}, quantised(AWQ))
    name = folder.name
    with open_weights(folder) as weights:
        for ask, sentence in (
            (lambda: weights.linear("model.layers.9.mlp.up_proj"), f"^{name}: no parameter model.layers.9.mlp.up_proj.weight, expected one of 2 such as"),
            (lambda: weights.linear("model.norm"), rf"^{name}: model.norm.weight has the shape \[4\], expected a matrix; name a linear layer$"),
            (lambda: weights.rows(f"{LAYER}.weight", 20, 25), rf"rows 20 to 25 of {LAYER}.weight \[24, 64\], expected rows within it; pass others$"),
            (lambda: weights.rows(f"{LAYER}.weight", 5, 5), "rows 5 to 5"),
        ):
            with pytest.raises(CheckpointError, match=sentence):
                ask()
    with pytest.raises(CheckpointError, match="the files have been closed, expected open ones; open the model again$"):
        weights.floats("model.norm.weight")


# ---- refusals


PLAIN = {"model.norm.weight": torch.ones(4)}


@pytest.mark.parametrize(
    ("scheme", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao, int4_weight_only"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8, e4m3"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"bits": None}, "something that its config does not name"),
        ({"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4}, "auto-round, auto_round"),
        ({**AWQ, "version": "gemv"}, "AWQ of version gemv"),
        ({**AWQ, "bits": 8}, "AWQ of 8 bits"),
        ({**GPTQ, "bits": 3}, "GPTQ of 3 bits"),
        ({"quant_method": "gptq"}, "GPTQ of an unnamed number of bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ of checkpoint_format marlin"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "compressed-tensors in the format nvfp4-pack-quantized"),
        ({**COMPRESSED, "format": "float-quantized"}, "compressed-tensors in the format float-quantized"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "channel"}}}}, "compressed-tensors of 8 bits"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "compressed-tensors with weights of type float"),
        (
            {**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
            r"compressed-tensors with a scale for each tensor \(None\)",
        ),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "MLX in the mode mxfp4"),
        ({"group_size": 64, "bits": 4, "lm_head": {"mode": "nvfp4", "bits": 4, "group_size": 16}}, r"MLX in the mode nvfp4 \(lm_head\)"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_other_formats_are_refused_by_name(scheme: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = write(tmp_path, dict(PLAIN), quantised(scheme))
    sentence = (
        rf"^{folder.name}: the weights are quantised as {named}, expected 4-bit compressed-tensors \(pack-quantized\), AWQ .*; choose another checkpoint$"
    )
    with pytest.raises(UnsupportedModelError, match=sentence):
        open_weights(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        (f"{LAYER}.weight.quant_state.bitsandbytes__nf4", torch.zeros(8, dtype=torch.uint8), "bitsandbytes NF4"),
        (f"{LAYER}.weight.absmax", torch.ones(4), "bitsandbytes"),
        (f"{LAYER}.weight", torch.ones(2, 2).to(torch.float8_e4m3fn), "fp8"),
        (f"{LAYER}.weight_scale_inv", torch.ones(2), "fp8 in blocks"),
        (f"{LAYER}.weight_scale_2", torch.ones(1), "nvfp4"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.zeros(2, 2, dtype=torch.uint8), "mxfp4"),
    ],
)
def test_other_formats_are_known_by_their_tensors(name: str, tensor: Tensor, named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"the weights are quantised as {named}, expected"):
        open_weights(write(tmp_path, {**PLAIN, name: tensor}, CONFIG))


def test_integers_that_are_not_packed_are_refused(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": torch.zeros(4, 8, dtype=torch.int8), f"{LAYER}.weight_scale": torch.ones(4, 1)}
    with pytest.raises(UnsupportedModelError, match=rf"quantised as {LAYER}.weight_scale over I8 \(one number each, not packed\), expected"):
        open_weights(write(tmp_path, tensors, quantised(COMPRESSED)))


def test_a_config_and_files_that_disagree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"packed weights \(.qweight\), but no quantization_config, expected one in config.json; fetch the model again$"):
        open_weights(write(tmp_path, layer(awq()[0]), CONFIG))
    with pytest.raises(CheckpointError, match=r"config.json says awq, but there is no .qweight, expected packed weights; fetch the model again$"):
        open_weights(write(tmp_path, dict(PLAIN), quantised(AWQ)))


Parts = dict[str, Any]


def dropped(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.pop(name)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Parts], None]:
    return lambda parts: parts.update({name: change(parts[name])})


@pytest.mark.parametrize(
    ("scheme", "parts", "damage", "kind", "sentence"),
    [
        (COMPRESSED, hand_compressed, dropped("weight_scale"), CheckpointError, "q_proj.weight_scale: no such tensor in the files"),
        (COMPRESSED, hand_compressed, dropped("weight_shape"), CheckpointError, "q_proj.weight_shape: no such tensor in the files"),
        (COMPRESSED, hand_compressed, changed("weight_packed", lambda x: x[1:]), CheckpointError, r"weight_packed: I32 \[23, 8\], expected I32 \[24, 8\]"),
        (COMPRESSED, hand_compressed, changed("weight_shape", lambda x: np.array([24, 32])), UnsupportedModelError, "8 words for 32 codes, expected 4 bits"),
        (COMPRESSED, hand_compressed, changed("weight_scale", lambda x: x[:, :1]), CheckpointError, "1 groups of scales for 64 inputs, expected groups of 32"),
        (COMPRESSED, hand_compressed, changed("weight_scale", lambda x: x[1:]), CheckpointError, r"weight_scale: F16 \[23, 2\], expected floats \[24, 2\]"),
        (COMPRESSED, hand_compressed, changed("weight_scale", lambda x: x.astype(np.int32)), CheckpointError, r"weight_scale: I32 \[24, 2\], expected floats"),
        (COMPRESSED, hand_compressed, changed("weight_zero_point", lambda x: x[1:]), CheckpointError, r"zero_point: I32 \[2, 2\], expected I32 \[3, 2\]"),
        (COMPRESSED, hand_compressed, changed("weight_packed", lambda x: x[None]), UnsupportedModelError, r"weight_packed: 3 dimensions \[1, 24, 8\]"),
        (AWQ, awq, dropped("scales"), CheckpointError, "q_proj.scales: no such tensor in the files"),
        (AWQ, awq, changed("qzeros", lambda x: x[:1]), CheckpointError, r"qzeros: I32 \[1, 3\], expected I32 \[2, 3\]"),
        (AWQ, awq, changed("scales", lambda x: x[:, :8]), CheckpointError, r"scales: F16 \[2, 8\], expected floats \[2, 24\]"),
        ({"quant_method": "awq", "bits": 4}, awq, changed("qweight", lambda x: x[:0]), CheckpointError, "2 groups of scales for 0 inputs"),
        ({**AWQ, "group_size": 64}, awq, lambda parts: None, CheckpointError, "q_proj: 2 groups of scales for 64 inputs, expected groups of 64"),
        ({**GPTQ, "desc_act": True}, lambda: gptq(1), dropped("g_idx"), CheckpointError, "q_proj.g_idx: no such tensor in the files"),
        (GPTQ, lambda: gptq(1), dropped("qzeros"), CheckpointError, "q_proj.qzeros: no such tensor in the files"),
        (GPTQ, lambda: gptq(1), changed("g_idx", lambda x: x[:32]), UnsupportedModelError, "8 words of codes for the 32 inputs of g_idx, expected 4 bits"),
        (GPTQ, lambda: gptq(1), changed("qweight", lambda x: x[:, :20]), UnsupportedModelError, "20 outputs, expected a multiple of 8"),
    ],
)  # fmt: skip
def test_damaged_matrices_are_refused_when_opened(
    scheme: dict[str, Any], parts: Callable[[], tuple[Parts, np.ndarray]], damage: Callable[[Parts], None], kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    made_parts = parts()[0]
    damage(made_parts)
    with pytest.raises(kind, match=sentence):
        open_weights(write(tmp_path, layer(made_parts), quantised(scheme)))


@pytest.mark.parametrize("index", [np.zeros(K), np.arange(K) // 16, np.where(np.arange(K) < 3, -1, np.arange(K) // 32)])
def test_groups_of_unequal_size_are_refused(index: np.ndarray, tmp_path: Path) -> None:
    parts, _ = gptq(1)
    parts["g_idx"] = index.astype(np.int32)
    with open_weights(write(tmp_path, layer(parts), quantised(GPTQ))) as weights:
        with pytest.raises(
            CheckpointError, match=r"q_proj.g_idx: groups -?\d to \d of unequal size, expected 2 groups of 32 inputs each; fetch the model again$"
        ):
            weights.linear(LAYER)


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"bits": 8}, UnsupportedModelError, f"^{LAYER}: MLX codes of 8 bits, expected 4; choose another checkpoint$"),
        ({"group_size": 64}, CheckpointError, r"scales: F16 \[24, 8\], expected floats \[24, 4\]; fetch the model again$"),
        ({"group_size": 0}, CheckpointError, "256 inputs in groups of 0, expected a divisor of them"),
    ],
)
def test_mlx_of_other_sizes_is_refused(change: dict[str, int], kind: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=sentence):
        open_weights(write(tmp_path, layer(mlx(32)[0]), {**CONFIG, "quantization": {**MLX, **change}}))


def parts_of(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A matrix of each format with every part that it can have, and its config."""
    groups = np.random.default_rng(2).permutation(np.arange(K) // GROUP)
    if kind == "mlx":
        return mlx(32)[0], {**CONFIG, "quantization": MLX}
    made_parts = {"compressed": lambda: hand_compressed(groups), "awq": awq, "gptq": lambda: gptq(1, groups=groups)}[kind]()[0]
    return made_parts, quantised({"compressed": COMPRESSED, "awq": AWQ, "gptq": GPTQ}[kind])


@pytest.mark.parametrize("kind", ["compressed", "awq", "gptq"])
def test_the_reader_with_torch_agrees(kind: str, tmp_path: Path) -> None:
    """`checkpoint.quantised` turns the same folders into floats for torch."""
    from flashhead_edge.checkpoint.quantised import dequantised

    parts, config = parts_of(kind)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in layer(parts).items()}
    theirs = dict(dequantised(config["quantization_config"], set(tensors), tensors.__getitem__, torch.float32, kind))
    with open_weights(write(tmp_path, dict(tensors), config)) as weights:
        assert set(theirs) == set(weights.names()) == {f"{LAYER}.weight"}
        assert np.array_equal(weights.floats(f"{LAYER}.weight"), theirs[f"{LAYER}.weight"].numpy())


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 24, 32, 64, 128]), max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["compressed", "awq", "gptq", "mlx"]),
    nth=st.integers(0, 4),
    shape=SHAPES,
    dtype=st.sampled_from(sorted(ITEM_BITS)),
    fill=st.integers(0, 255),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scales of any bytes may overflow
def test_a_part_of_any_shape_and_type_is_read_or_refused_in_a_sentence(kind: str, nth: int, shape: list[int], dtype: str, fill: int, tmp_path: Path) -> None:
    """One tensor of a matrix becomes another: of any dtype and shape, its bytes whole. Nothing else than a sentence is raised."""
    made_parts, config = parts_of(kind)
    names = list(made_parts)
    write(tmp_path, layer(made_parts), config)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    changed_name = f"{LAYER}.{names[nth % len(names)]}"
    pieces, start = [], 0
    for name, entry in header.items():
        piece = body[slice(*entry["data_offsets"])]
        if name == changed_name:
            piece = bytes([fill]) * ((math.prod(shape) * ITEM_BITS[dtype] + 7) // 8)
            entry |= {"dtype": dtype, "shape": shape}
        entry["data_offsets"] = [start, start + len(piece)]
        start += len(piece)
        pieces.append(piece)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))
    try:
        with open_weights(tmp_path) as weights:
            for name in weights.names():
                assert weights.floats(name).shape == weights.shape(name)
    except FlashHeadError as error:
        said = str(error)
    else:
        said = "read; as it is"
    assert "; " in said and len(said.splitlines()) == 1


def test_nothing_there(tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path / "absent", "absent: no such file or folder, expected a model folder or a .gguf file; check the path$"),
        (tmp_path, "the folder has no config.json, expected a Hugging Face model folder or one .gguf file; name another folder or the file$"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            open_weights(path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a single file of type .bin, expected a model folder or a .gguf file; name the folder$"):
        open_weights(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list, expected an object; fetch the model again$"):
        open_weights(tmp_path)
