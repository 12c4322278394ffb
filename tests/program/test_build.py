"""Programs of every family against transformers' own models of the same values, and what is coded anew or refused. No GPU: the nodes run in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plugin_interpreter import KINDS
from small_heads import everything_open
from small_programs import (
    MODELS,
    ORIN,
    VOCAB,
    ProgramInterpreter,
    built,
    made_code,
    nearest,
    program_of,
    put,
    put_codes,
    small_model,
    states_of,
    text_names,
    values_of,
)  # fmt: skip

from flashhead_edge.errors import FlashHeadError
from flashhead_edge.packed.coded import Coded4, Coded8, dense, requantised
from flashhead_edge.program.build import build_program
from flashhead_edge.program.nodes import Stored
from flashhead_edge.program.recoding import with_zeros

LENGTHS = [20, 15, 1, 1, 1, 1, 1]  # a prompt longer than the window of 16, a piece onto its cache, and steps of one token
ROUNDING = 3e-5  # of values about 4, after three layers of float32 sums of up to 256 terms in another order


def ids_of(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 120, (batch, sum(LENGTHS)))


def error_of(folder: Path, model: Any, weights: Any, **options: Any) -> float:
    """The largest difference of hidden states."""
    program = program_of(folder / "program", model, weights, **options)
    return float(np.abs(ProgramInterpreter(program).decode(ids_of(), LENGTHS) - states_of(model, ids_of())).max())


@pytest.mark.parametrize("family", MODELS)
def test_family_has_transformers_states(family: str, tmp_path: Path) -> None:
    model, weights = small_model(family)
    error = error_of(tmp_path, model, weights)
    assert error < ROUNDING


def as_stored(code: Coded4) -> Coded4:
    """A matrix that has been coded anew, its scales as the file has them."""
    return replace(code, scales=nearest(code.scales))


def changed(code: Coded4, order: np.ndarray) -> Coded4:
    return replace(code, order=order.astype(np.int32))


def shuffled(*blocks: int) -> np.ndarray:
    """Numbers from 0 on, shuffled within blocks of these lengths."""
    random, starts = np.random.default_rng(7), np.cumsum([0, *blocks])
    return np.concatenate([start + random.permutation(n) for start, n in zip(starts, blocks)])


@pytest.mark.parametrize("family", ["llama", "llama_biased", "phi3", "gemma3"])
def test_orders_of_inputs_that_rows_before_them_can_take_are_kept(family: str, tmp_path: Path) -> None:
    """down's order becomes that of the rows of gate and up, o's that of the rows of values, biases with them: not a bit is coded anew."""
    model, weights = small_model(family)
    heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
    within = np.random.default_rng(8).permutation(kv * 64).reshape(kv, 64).argsort(1)  # one order for each head of keys
    for name, code in weights.coded.items():
        if name.endswith("down_proj"):
            weights.coded[name] = changed(code, shuffled(192))
        elif name.endswith("o_proj"):
            weights.coded[name] = changed(code, (within.repeat(heads // kv, 0) + 64 * np.arange(heads)[:, None]).reshape(-1))
    put_codes(model, weights.coded)
    assert built(model, weights).notices == ()
    assert error_of(tmp_path, model, weights) < ROUNDING


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_orders_are_coded_anew(family: str, tmp_path: Path) -> None:
    """Those of inputs that come from a norm, and those of o that cross its heads or differ among heads with the same keys."""
    model, weights = small_model(family)
    first = "qkv_proj" if family == "phi3" else "k_proj"
    crossing, differing = shuffled(weights.coded["model.layers.0.self_attn.o_proj"].codes.shape[1] * 2), shuffled(*[64] * model.config.num_attention_heads)
    asked = {
        f"model.layers.0.self_attn.{first}": shuffled(128),
        "model.layers.0.self_attn.o_proj": crossing,
        "model.layers.1.self_attn.o_proj": differing,
        "model.layers.2.mlp.gate_up_proj" if family == "phi3" else "model.layers.2.mlp.up_proj": shuffled(128),
    }
    weights.coded |= {name: changed(weights.coded[name], order) for name, order in asked.items()}
    found = built(model, weights, group=32)
    assert len(found.notices) == 1
    assert found.notices[0].startswith(f"4 matrices (model.layers.0.self_attn.{first} to ") and "act-order" in found.notices[0]
    put_codes(model, weights.coded | {name: as_stored(requantised(weights.coded[name], 32)) for name in asked})
    assert error_of(tmp_path, model, weights, group=32) < ROUNDING


def test_what_has_no_kernel_is_counted_and_named(tmp_path: Path) -> None:
    model, weights = small_model("llama")
    random = np.random.default_rng(0)
    for name, code in list(weights.coded.items()):
        if ".layers.0." in name:
            weights.coded[name] = dense(code)
        elif "layers.1.self_attn" in name:
            n, k = dense(code).shape
            weights.coded[name] = Coded8(random.integers(-127, 128, (n, k), dtype=np.int8), np.full((n, k // 32), 0.014 / k**0.5, np.float32), 32)
        elif name.endswith("layers.1.mlp.up_proj"):
            weights.coded[name] = replace(code, zeros=None, minima=-7.4 * code.scales)
    assert built(model, weights).notices == (
        "7 matrices (model.layers.0.self_attn.q_proj to model.layers.0.mlp.down_proj) stored as floats, coded in 4 bits here to the nearest "
        "(flashhead quantize codes them better)",
        "4 matrices (model.layers.1.self_attn.q_proj to model.layers.1.self_attn.o_proj) stored in 8 bits, coded in 4 bits here to the nearest",
        "1 matrix (model.layers.1.mlp.up_proj) with a minimum for each group, which became a zero point to the nearest sixteenth of a step",
    )
    coded = {name: code for name, code in weights.coded.items() if not isinstance(code, Coded4)}
    up = "model.layers.1.mlp.up_proj"
    fine = with_zeros(weights.coded[up])
    put_codes(
        model,
        weights.coded
        | {name: as_stored(requantised(code, 64)) for name, code in coded.items()}
        | {up: values_of(fine.codes, nearest(fine.scales), fine.zeros)},
    )
    assert error_of(tmp_path, model, weights) < ROUNDING


def test_bfloat16_program_has_the_states_of_bfloat16_values(tmp_path: Path) -> None:
    """Gemma's norms are stored about 0, where bfloat16 has fine steps; scales of 8 bits move weights by 2^-9 of themselves."""
    model, weights = small_model("gemma3")
    exact = {name: nearest(array, "bfloat16") for name, array in weights.arrays.items()}
    weights.arrays |= exact
    weights.coded |= {name: replace(code, scales=nearest(code.scales, "bfloat16")) for name, code in weights.coded.items()}
    for name, parameter in text_names(model).items():
        if name in exact:
            put(parameter, exact[name])
    put_codes(model, weights.coded)
    assert error_of(tmp_path, model, weights, precision="bfloat16") < ROUNDING


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_head_s_rows_and_bias_are_those_of_the_checkpoint(precision: str, tmp_path: Path) -> None:
    """A tied head shares the embedding's tensor, another one has rows of its own; a bias comes with it."""
    model, weights = small_model("qwen3")
    tied = program_of(tmp_path / "tied", model, weights, precision=precision)
    assert "head.rows" not in tied.places and tied.nodes[-1].attributes["rows"] == tied.nodes[0].attributes["rows"] == Stored("embedding")
    weights.arrays["lm_head.weight"] = 2 * weights.arrays["model.embed_tokens.weight"]
    weights.arrays["lm_head.bias"] = nearest(np.random.default_rng(0).standard_normal(VOCAB), precision)
    own = program_of(tmp_path / "own", model, weights, precision=precision)
    p = ProgramInterpreter(own)
    kind = KINDS[precision]
    assert own.nodes[-1].attributes["rows"] == Stored("head.rows") and own.nodes[-1].attributes["bias"] == Stored("head.bias")
    assert np.array_equal(p.at("head.rows").view(kind).astype(np.float32).reshape(VOCAB, -1), nearest(weights.arrays["lm_head.weight"], precision))
    assert np.array_equal(p.at("head.bias").view(kind).astype(np.float32), weights.arrays["lm_head.bias"])


def test_biases_of_zeros_are_none() -> None:
    """Older GPTQ checkpoints have one for every layer."""
    model, weights = small_model("llama")
    nodes = [node.op for node in built(model, weights).decoder.nodes]
    weights.arrays |= {f"{name}.bias": np.zeros(2 * code.codes.shape[1], np.float32) for name, code in weights.coded.items()}
    found = built(model, weights)
    assert [node.op for node in found.decoder.nodes] == nodes and found.notices == ()


# ---- what is refused


def refused(family: str, change: Any, **options: Any) -> str:
    """The sentence with which a changed checkpoint is refused."""
    model, weights = small_model(family)
    change(model, weights)
    with pytest.raises(FlashHeadError) as error:
        built(model, weights, **options)
    return f"{type(error.value).__name__}: {error.value}"


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", lambda m, w: w.coded.pop(Q), f"CheckpointError: {Q}.weight: it is not among the weights, expected the parameter of a llama model"),
        ("llama", lambda m, w: w.arrays.pop("model.norm.weight"), "CheckpointError: model.norm.weight: it is not among the weights"),
        ("llama", lambda m, w: w.arrays.pop("model.embed_tokens.weight"), "CheckpointError: embed_tokens.weight: no parameter has this name"),
        ("qwen2", lambda m, w: w.arrays.pop(f"{Q}.bias"), f"CheckpointError: {Q}.bias: it is not among the weights, expected the parameter of a qwen2 model"),
        ("llama", lambda m, w: w.coded.update({Q: made_code("x", 128, 128)}), f"CheckpointError: {Q}.weight: its shape is [128, 128], expected [256, 128]"),
        (
            "llama", lambda m, w: w.arrays.update({"model.norm.weight": np.ones(64, np.float32)}),
            "CheckpointError: model.norm.weight: its shape is [64], expected [128] as config.json says",
        ),
        (
            "llama", lambda m, w: w.arrays.update({f"{Q}.bias": np.ones(256, np.float32)}),
            f"UnsupportedModelError: {Q}.bias: a parameter that llama models do not have (1 of them)",
        ),
        (
            "qwen3", lambda m, w: setattr(m.config, "vocab_size", 200),
            "CheckpointError: model.embed_tokens.weight: its shape is [131, 128], expected [200, 128] as config.json says",
        ),
        ("qwen3", lambda m, w: setattr(m.config, "tie_word_embeddings", False), "UnsupportedModelError: lm_head.weight: it is not among the weights, and"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(family: str, change: Any, words: str) -> None:
    assert words in refused(family, change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "float32"}, "SettingsError: program: the precision is float32, expected float16 or bfloat16; choose another"),
        ({"group": 16}, "SettingsError: program: the group is 16, expected one of 32, 64, 128; choose another"),
        ({"context": 257}, "SettingsError: program: the context is 257, expected 2 to the model's 256 positions"),
        ({"batch": 33}, "ExportError: head: 33 rows at once, expected 1 to 32"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    assert words in refused("llama", lambda m, w: None, **options)


def test_floats_in_a_group_that_does_not_fit_are_refused() -> None:
    def floats(model: Any, weights: Any) -> None:
        weights.coded["model.layers.0.mlp.down_proj"] = dense(weights.coded["model.layers.0.mlp.down_proj"])

    words = "ExportError: model.layers.0.mlp.down_proj: 192 inputs to be coded in groups of 128, expected a multiple of it; pass a smaller --group"
    assert words in refused("llama", floats, group=128)


def test_index_of_another_head_is_refused() -> None:
    model, weights = small_model("qwen3")
    index = everything_open(torch.zeros(VOCAB, 64))
    with pytest.raises(FlashHeadError, match=r"head index: it is for a head \[131, 64\], expected one for \[131, 128\]"):
        build_program(weights, model.config.to_dict(), index, precision="float16", context=64, group=64, device=ORIN)
