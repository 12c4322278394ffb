"""What a GGUF file says in the terms of config.json, and its tensors by Hugging Face's names: families as data.

Source: llama.cpp's converter (https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and conversion/), read backwards: which
metadata a config becomes, whose q and k rows it reorders, whose norms it adds 1 to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashhead_edge.errors import CheckpointError, UnsupportedModelError

LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
USUAL = {**ATTENTION, **GATED, "ffn_norm": "post_attention_layernorm"}
FOUR = {**ATTENTION, **GATED, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
FUSED = {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
DROPPED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # no parameters: the config says what they are

# Metadata behind the architecture's name, and the config's key.
KEYS = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta", "rope.freq_base_swa": "rope_local_base_freq", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings")
GELU = "gelu_pytorch_tanh"
THETA = 10000.0  # of rotary positions, where the file names none, as llama.cpp takes it
# Llama 3's stretched rotary positions are a tensor of factors in GGUF. Its makers' settings but for the factor, which is the largest of them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTOR_ERROR = 1e-4  # relative: factors were made in float32, and are at most some rounding errors off


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF."""

    architecture: str  # transformers' class
    model_type: str
    names: Mapping[str, str]
    permuted: bool = False  # the rows of q and k are stored pair by pair within a head
    raised: bool = False  # 1 was added to the weights of the norms
    activation: str = "silu"
    full_every: int = 0  # one layer of so many, the last, sees the whole context; the others a sliding window
    unturned_every: int = 0  # one layer of so many, the last, has no rotary positions
    averaged: int = 0  # layers of the one size whose queries are scaled by hidden size / heads, not by the head size


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", USUAL, permuted=True),
    "granite": Family("GraniteForCausalLM", "granite", USUAL, permuted=True),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3", USUAL, permuted=True, unturned_every=4),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", USUAL),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", USUAL),
    "gemma": Family("GemmaForCausalLM", "gemma", USUAL, raised=True, activation=GELU),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", FOUR, raised=True, activation=GELU, full_every=2, averaged=46),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", FOUR, raised=True, activation=GELU, full_every=6, averaged=62),
    "phi3": Family("Phi3ForCausalLM", "phi3", FUSED),
}


def family_of(values: Mapping[str, Any], name: str) -> tuple[str, Family]:
    """A file's architecture.

    Raises:
        UnsupportedModelError: one that is not known here, or a part of a model.
    """
    kind = str(values.get("general.architecture"))
    if values.get("split.count") not in (None, 0, 1):
        raise UnsupportedModelError(
            f"{name}: one of {values['split.count']} parts of a model, expected a single file; merge them with llama-gguf-split --merge"
        )
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"{name}: a GGUF file of the architecture {kind}, expected one of {', '.join(FAMILIES)}; choose another file")
    return kind, FAMILIES[kind]


def huggingface_name(stored: str, family: Family) -> str | None:
    """A tensor's name in a Hugging Face model; None where it is no parameter of one."""
    stem, _, end = stored.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{end}"
    at = LAYER.fullmatch(stored)
    if at is None or at[2] not in family.names:
        return None
    return f"model.layers.{at[1]}.{family.names[at[2]]}.{at[3]}"


def row_order(rows: int, heads: int) -> np.ndarray:
    """The stored row of each row of a q or k matrix, [rows] int64: halves of a head lie side by side in the model, in pairs in the file."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def config_of(
    values: Mapping[str, Any], embedding: tuple[int, ...], tied: bool, biased: bool, factors: np.ndarray | None, layers: int, name: str
) -> dict[str, Any]:
    """What config.json would say.

    Args:
        values: the file's metadata.
        embedding: its shape, [tokens, hidden size].
        tied: it has no head of its own.
        biased: q, k and v have biases.
        factors: of its rotary frequencies, [head size / 2], where it has them.
        layers: how many its tensors are of.
    Raises:
        CheckpointError: a value is missing or of another kind.
        UnsupportedModelError: positions or layers that are not told by a config here.
    """
    kind, family = family_of(values, name)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type, "vocab_size": embedding[0]}
    found = {ours: _number(values, f"{kind}.{key}", name) for key, ours in KEYS.items()}
    config |= {ours: value for ours, value in found.items() if value}  # 0, as of a sliding window, says that there is none
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise CheckpointError(f"{name}: the header does not say {', '.join(missing)}, expected a whole language model; fetch the file again")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", THETA)
    wrong = next((key for key in COUNTS if not isinstance(config[key], int) or config[key] <= 0), None)
    if wrong is not None:
        raise CheckpointError(f"{name}: {wrong} is {config[wrong]}, expected a count; fetch the file again")
    if config["num_hidden_layers"] != layers:
        raise CheckpointError(f"{name}: tensors of {layers} layers, expected {config['num_hidden_layers']} as the header says; fetch the file again")
    if config["hidden_size"] != embedding[1]:
        raise CheckpointError(f"{name}: an embedding of {embedding[1]} columns, expected {config['hidden_size']} as the header says; fetch the file again")
    config |= {"tie_word_embeddings": tied, "hidden_act": family.activation, "attention_bias": biased, "mlp_bias": False}
    if family.raised:
        config["hidden_activation"] = family.activation  # Gemma's name for it
    tokens = {ours: values.get(f"tokenizer.ggml.{key}") for key, ours in TOKENS.items()}
    config |= {ours: value for ours, value in tokens.items() if isinstance(value, int)}
    turned = _number(values, f"{kind}.rope.dimension_count", name) or config["head_dim"]
    if turned != config["head_dim"]:
        config["partial_rotary_factor"] = turned / config["head_dim"]
    config |= _layers(family, config)
    scaling = _scaling(values, kind, config, factors, name)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _number(values: Mapping[str, Any], key: str, name: str) -> int | float | None:
    """A number of the metadata, or one that all layers have in common; None where there is none."""
    value = values.get(key)
    if isinstance(value, np.ndarray):
        if not len(value) or bool((value != value[0]).any()):
            raise UnsupportedModelError(f"{name}: {key} differs from layer to layer, expected one number; choose another file")
        value = value[0].item()
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
        raise CheckpointError(f"{name}: {key} is {value!r}, expected a number; fetch the file again")
    return value


def _layers(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from layer to layer, which files leave to the family."""
    count, more = int(config["num_hidden_layers"]), dict[str, Any]()
    if family.unturned_every:
        more["no_rope_layers"] = [int((i + 1) % family.unturned_every != 0) for i in range(count)]
    if family.full_every:
        more["layer_types"] = ["full_attention" if (i + 1) % family.full_every == 0 else "sliding_attention" for i in range(count)]
        more["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if count == family.averaged else config["head_dim"]
    if family.model_type == "gemma3_text":
        more["rope_local_base_freq"] = config.get("rope_local_base_freq", THETA)
    return more


def _scaling(values: Mapping[str, Any], kind: str, config: Mapping[str, Any], factors: np.ndarray | None, name: str) -> dict[str, Any] | None:
    """How rotary positions are stretched, or None."""
    if factors is not None:
        largest = float(factors.max())
        known = factors.shape == (config["head_dim"] // 2,) and 1 <= largest < math.inf
        if not known or not np.allclose(factors, llama3_factors(config["rope_theta"], config["head_dim"], largest), rtol=FACTOR_ERROR, atol=0):
            raise UnsupportedModelError(
                f"{name}: rotary frequencies divided by factors {float(factors.min()):.4g} to {largest:.4g}, "
                f"expected Llama 3's ({', '.join(f'{k} {v:g}' for k, v in LLAMA3.items())}); choose another file"
            )
        return None if largest == 1 else {"rope_type": "llama3", "factor": largest, **LLAMA3}
    said = str(values.get(f"{kind}.rope.scaling.type") or "none")
    factor, original = (_number(values, f"{kind}.rope.scaling.{key}", name) for key in ("factor", "original_context_length"))
    if said == "none" or (said == "linear" and factor in (None, 0, 1)):
        return None
    if said == "linear":
        return {"rope_type": "linear", "factor": factor}
    if said == "yarn" and factor and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModelError(f"{name}: rotary positions stretched as {said}, expected none, linear, yarn or Llama 3's; choose another file")


def llama3_factors(theta: float, head_size: int, factor: float) -> np.ndarray:
    """What Llama 3 divides its rotary frequencies by, [head_size / 2] float64: 1 for short waves, `factor` for long ones, between them in between.

    Source: rope_type "llama3" of transformers, modeling_rope_utils.py.
    """
    length = LLAMA3["original_max_position_embeddings"]
    turns = length / (2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size))  # of each frequency within the original length
    smooth = np.clip((turns - LLAMA3["low_freq_factor"]) / (LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
