"""Tiny random models of the families, [vocabulary 131, hidden size 32]: 131 is a prime, so nothing divides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCAB = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}  # tied, a small random one repeats one token


def _gpt2(t: Any) -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2))


def _opt(t: Any) -> Any:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 24, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.OPTForCausalLM(t.OPTConfig(vocab_size=VOCAB, max_position_embeddings=256, **sizes))


def _phi(t: Any) -> Any:
    """Phi has a bias on its head; a random one, since the library's start at zero would hide a lost one."""
    model = t.PhiForCausalLM(t.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}))
    torch.nn.init.normal_(model.lm_head.bias, std=0.5)
    return model


def _qwen3_vl(t: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    text = SIZES | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}}
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def _qwen3_5(t: Any) -> Any:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    return t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(**SIZES, **linear, layer_types=["linear_attention", "full_attention"]))


FAMILIES: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "llama_tied": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=16)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "qwen3_moe": lambda t: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "qwen3_5": _qwen3_5,
    "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=3.0)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **GEMMA)),
    "phi": _phi,
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES)),
    "gpt2": _gpt2,
    "granite": lambda t: t.GraniteForCausalLM(t.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)),
    "cohere": lambda t: t.CohereForCausalLM(t.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)),
    "opt": _opt,
    "qwen3_vl": _qwen3_vl,
}


def small_model(family: str, seed: int = 0) -> Any:
    """A model of the family with random weights, in evaluation mode; its generation never stops at a token."""
    import transformers

    torch.manual_seed(seed)
    model = FAMILIES[family](transformers).eval()
    with torch.no_grad():  # the library's start is near zero: its logits are all alike, and a tied model repeats one token
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
