"""Families as data: which linear layers share an input, and what stands before it that a scale of it can be folded into.

Scaling the columns of linear layers by s and what gives their input by 1 / s leaves a model as it is. It is exact where
that is a norm's weight, or the rows of a linear layer from which the input comes by products with other values alone:
up to down (beside the activated gate), v to o (attention's weights mix positions, not channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashhead_edge.checkpoint import families
from flashhead_edge.errors import UnsupportedModelError

SMALLEST = 1e-6  # of a norm's weight: what is smaller is not divided by


@dataclass(frozen=True)
class Site:
    """Linear layers of one decoder layer with one input."""

    linears: tuple[str, ...]
    before: str | None = None  # the module whose output is scaled back: a norm or a linear layer; None: no scaling
    rows: str = ""  # of a linear layer: "all", "last half", "values"; "" where `before` is a norm
    raised: bool = False  # the norm multiplies by 1 + weight


def _sites(
    first: tuple[str, ...], second: tuple[str, ...], norms: tuple[str, str], *, raised: bool = False, fused: bool = False, out: str = "o_proj"
) -> tuple[Site, ...]:
    """Attention and a gated mlp, each behind its norm."""
    return (
        Site((f"self_attn.{out}",), "self_attn.qkv_proj" if fused else "self_attn.v_proj", "values"),
        Site(("mlp.down_proj",), "mlp.gate_up_proj" if fused else "mlp.up_proj", "last half" if fused else "all"),
        Site(tuple(f"self_attn.{name}" for name in first), norms[0], raised=raised),
        Site(tuple(f"mlp.{name}" for name in second), norms[1], raised=raised),
    )


QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
USUAL, FOUR = ("input_layernorm", "post_attention_layernorm"), ("input_layernorm", "pre_feedforward_layernorm")
LLAMA = _sites(QKV, GATED, USUAL)
GEMMA3 = _sites(QKV, GATED, FOUR, raised=True)
LAYOUTS: dict[str, tuple[Site, ...]] = {
    **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM"), LLAMA),
    "Qwen3VLForConditionalGeneration": LLAMA,
    "GemmaForCausalLM": _sites(QKV, GATED, USUAL, raised=True),
    "Gemma2ForCausalLM": GEMMA3,
    "Gemma3ForCausalLM": GEMMA3,
    "Phi3ForCausalLM": _sites(("qkv_proj",), ("gate_up_proj",), USUAL, fused=True),
    "PhiForCausalLM": (  # attention and mlp behind one norm; an activation stands between its mlp's two layers
        Site(("self_attn.dense",), "self_attn.v_proj", "values"),
        Site(("mlp.fc2",)),
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), "input_layernorm"),
    ),
    "CohereForCausalLM": (
        *LLAMA[:2],
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), "input_layernorm"),
    ),
}


def layout(config: dict[str, Any], name: str) -> tuple[Site, ...]:
    """The sites of each decoder layer of a model, in the order in which they are to be scaled.

    Raises:
        UnsupportedModelError: a family that is not known here.
    """
    family = families.architecture(config, name)
    if family not in LAYOUTS:
        known = ", ".join(sorted(f.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration") for f in LAYOUTS))
        raise UnsupportedModelError(f"{name}: the linear layers of {family} are not known here, expected one of the families {known}; choose another model")
    return LAYOUTS[family]


def row_slice(site: Site, rows: int, columns: int, config: Any) -> slice:
    """The rows of `site.before` that give the input, out of `rows`."""
    if site.rows == "last half":
        return slice(rows // 2, rows)
    if site.rows == "values":
        return slice(rows - value_channels(config, columns), rows)
    return slice(0, rows)


def value_channels(config: Any, columns: int) -> int:
    """Channels of all value heads, of an attention with `columns` output channels."""
    heads = config.num_attention_heads
    return columns // heads * (getattr(config, "num_key_value_heads", None) or heads)


def shared(site: Site, columns: Tensor, config: Any) -> Tensor:
    """Figures of a site's inputs [K] as one a channel of what is before it: query heads that read one value head are averaged."""
    if site.rows != "values":
        return columns
    heads = config.num_attention_heads
    width = len(columns) // heads
    return columns.view(value_channels(config, len(columns)) // width, -1, width).mean(1).flatten()


def spread(site: Site, channels: Tensor, columns: int, config: Any) -> Tensor:
    """The other way round: a figure for each input, [columns]."""
    if site.rows != "values":
        return channels
    width = columns // config.num_attention_heads
    return channels.view(-1, 1, width).expand(-1, columns // len(channels), -1).flatten()


def divide_norm(weight: Tensor, scale: Tensor, raised: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's weight with its output divided by `scale`, as `dtype` holds it, and by what the output is then divided, exactly.

    Where the weight is about 0 nothing is divided.
    """
    one = 1.0 if raised else 0.0
    before = weight + one
    after = (before / scale - one).to(dtype).float() + one
    fine = (before.abs() > SMALLEST) & (after.abs() > SMALLEST) & ((before / after).isfinite())
    after = torch.where(fine, after, before)
    return torch.where(fine, after - one, weight), torch.where(fine, before / after, 1.0)
