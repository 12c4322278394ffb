"""What config.json says of a model's layers: equal to what transformers reads from the same file, in its form of today and of before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.program.families import Layout, Rope, describe, rotations
from flashhead_edge.program.nodes import GELU_TANH, SILU

# What stands in the config.json of released models, shortened to what describes layers.
LLAMA32 = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 128256, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "no_rope_layer_interval": 4,
    "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN25 = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "max_window_layers": 21, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_VL = {
    "model_type": "qwen3_vl", "tie_word_embeddings": True,
    "text_config": QWEN3 | {
        "model_type": "qwen3_vl_text", "hidden_size": 2048, "rope_theta": 5000000, "max_position_embeddings": 262144,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
}  # fmt: skip
GEMMA3_270M = {
    "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "vocab_size": 262144,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False,
}  # fmt: skip
OTHER = {  # settings that released ones leave off
    "smollm3_interval": SMOLLM3 | {"no_rope_layer_interval": 3}, "smollm3_windows": SMOLLM3 | {"use_sliding_window": True, "sliding_window": 128},
    "smollm3_types": SMOLLM3 | {"layer_types": ["sliding_attention", "full_attention"] * 18, "use_sliding_window": True, "sliding_window": 64},
    "qwen2_windows": QWEN25 | {"use_sliding_window": True},
    "qwen3_windows": QWEN3 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 9},
    "qwen3_types": QWEN3 | {"layer_types": ["sliding_attention"] * 28, "sliding_window": 512}, "mistral_all": MISTRAL | {"sliding_window": None},
    "gemma3_pattern": {k: v for k, v in GEMMA3_270M.items() if k != "layer_types"} | {"sliding_window_pattern": 3},
}  # fmt: skip
RELEASED = {
    "llama": LLAMA32, "smollm2": SMOLLM2, "smollm3": SMOLLM3, "mistral": MISTRAL, "qwen2": QWEN25, "qwen3": QWEN3, "qwen3_vl": QWEN3_VL,
    "gemma3": GEMMA3_270M, "gemma3_4b": GEMMA3_4B, "phi3": PHI3,
}  # fmt: skip


def of_transformers(raw: dict[str, Any]) -> tuple[Any, Layout]:
    """transformers' reading of a config, and what we make of its own writing of it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**raw)
    return config.get_text_config(), describe(config.to_dict())


@pytest.mark.parametrize("name", [*RELEASED, *OTHER])
def test_config_is_read_as_transformers_reads_it(name: str) -> None:
    """All that a config leaves out, and the form of its rotary positions, is filled in alike."""
    raw = (RELEASED | OTHER)[name]
    config, want = of_transformers(raw)
    found = describe(raw)
    assert found == want
    window = config.sliding_window if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) else 0
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    assert found.windows == tuple(window if kind == "sliding_attention" else 0 for kind in types)
    assert (found.hidden, found.intermediate, found.layers) == (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert (found.q_heads, found.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert found.head_size == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert (found.epsilon, found.vocab, found.positions) == (config.rms_norm_eps, config.vocab_size, config.max_position_embeddings)
    assert found.activation == (GELU_TANH if "gemma" in name else SILU)
    turned = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    assert [rope is not None for rope in found.ropes] == [bool(turn) for turn in turned]


@pytest.mark.parametrize("name", ["llama", "smollm2", "smollm3", "qwen3_vl", "gemma3", "gemma3_4b", "phi3"])
def test_rotations_are_those_of_transformers(name: str) -> None:
    """The tables of every layer, at the first positions and at late ones."""
    import transformers.models as models

    config, layout = of_transformers(RELEASED[name])
    kind = config.model_type.removesuffix("_text")
    module = getattr(getattr(models, kind), f"modeling_{kind}")
    name_of = {"smollm3": "SmolLM3", "qwen3_vl": "Qwen3VLText", "gemma3": "Gemma3", "phi3": "Phi3", "llama": "Llama"}[kind]
    embedding = getattr(module, f"{name_of}RotaryEmbedding")(config)
    context = 2048
    positions = torch.arange(context)[None]
    types = getattr(config, "layer_types", None) or [None] * layout.layers
    for rope, layer_type in {(rope, t if kind == "gemma3" else None) for rope, t in zip(layout.ropes, types) if rope is not None}:
        asked = (torch.zeros(1), positions if kind != "qwen3_vl" else positions[None].expand(3, -1, -1))
        cos, sin = (t[0].numpy() for t in (embedding(*asked) if layer_type is None else embedding(*asked, layer_type)))
        want_cos, want_sin = rotations(rope, layout.head_size, context)
        half = layout.head_size // 2
        # transformers makes frequencies and angles in float32: relative errors of some 2^-23 each, so 2^-21 of a position's angle
        bound = 1e-6 + np.arange(context)[:, None] * 2.0**-21
        assert (np.abs(cos[:, :half] - want_cos) < bound).all() and (np.abs(sin[:, :half] - want_sin) < bound).all()
        assert np.array_equal(cos[:, :half], cos[:, half:])


def test_llama3_has_all_three_ranges() -> None:
    """Waves that stay, waves between, and waves that are 32 times as long."""
    rope = describe(LLAMA32).ropes[0]
    assert rope is not None
    frequencies = [np.arcsin(rotations(r, 64, 2)[1][1].astype(np.float64)) for r in (Rope(rope.theta), rope)]  # the angles of position 1
    ratio = frequencies[0] / frequencies[1]
    assert (np.diff(ratio) > -1e-5).all() and ratio[0] == 1 and ratio[-1] == pytest.approx(32) and ((ratio > 1.1) & (ratio < 31)).any()


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        ({"model_type": "gpt2"}, UnsupportedModelError, "model type 'gpt2', expected one whose decoder becomes a program, Llama, SmolLM3, Mistral"),
        ({"model_type": "qwen3_moe"}, UnsupportedModelError, "'qwen3_moe'"),
        (PHI3 | {"rope_scaling": {"type": "longrope"}}, UnsupportedModelError, "rotary positions of type 'longrope', expected default, linear or llama3"),
        (QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedModelError, "'yarn'"),
        (SMOLLM2 | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, UnsupportedModelError, "'dynamic'"),
        (PHI3 | {"partial_rotary_factor": 0.75}, UnsupportedModelError, "75% of a head's values are turned, expected all of them"),
        (SMOLLM2 | {"hidden_act": "relu"}, UnsupportedModelError, "activation 'relu', expected silu or gelu_pytorch_tanh"),
        (GEMMA3_270M | {"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping is 50.0 (scores capped)"),
        (GEMMA3_270M | {"use_bidirectional_attention": True}, UnsupportedModelError, "attention in both directions"),
        (GEMMA3_270M | {"layer_types": ["chunked_attention"] * 18}, UnsupportedModelError, "layers of the kinds ['chunked_attention']"),
        (GEMMA3_270M | {"layer_types": ["full_attention"]}, CheckpointError, "layer_types"),
        (SMOLLM2 | {"hidden_size": None}, CheckpointError, "a size of 'llama' is missing or is none (KeyError('hidden_size'))"),
        (SMOLLM2 | {"num_hidden_layers": "many"}, CheckpointError, "is missing or is none"),
        (SMOLLM2 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, CheckpointError, "low_freq_factor"),
    ],
)
def test_what_has_no_program_is_refused_in_a_sentence(raw: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as found:
        describe(raw)
    assert words in str(found.value) and str(found.value).startswith("config.json: ") and "; " in str(found.value)
