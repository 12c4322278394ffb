"""The decoder layers that become programs, as data: what config.json says of a model, with what its family fixes and leaves out. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.program.nodes import GELU_TANH, SILU

ACTIVATIONS = {"silu": SILU, "gelu_pytorch_tanh": GELU_TANH}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SLIDING = "sliding_attention"
INSTEAD = "choose another model, or export it with flashhead export onnx"


@dataclass(frozen=True)
class Rope:
    """Rotary positions, their angles scaled or not."""

    theta: float
    factor: float = 1.0  # positions are divided by it; under llama3 those of low frequencies alone
    llama3: tuple[float, float, float] | None = None  # low and high frequency factor, positions of the first training


@dataclass(frozen=True)
class Layout:
    """A decoder of equal layers that differ in what they see alone."""

    family: str  # the model type
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_size: int
    vocab: int  # rows of the embedding
    positions: int  # that the model was made for
    epsilon: float  # of the norms
    activation: int  # SILU or GELU_TANH
    scale: float  # of attention's scores
    windows: tuple[int, ...]  # of each layer: the last positions that a query sees, 0 all
    ropes: tuple[Rope | None, ...]  # of each layer; None: nothing is turned
    tied: bool  # the head is the embedding, unless the weights have a head of their own
    embedding_scale: float = 1.0
    norm_offset: float = 0.0  # added to a norm's weight
    biases: frozenset[str] = frozenset()  # linear layers that have one: q_proj ...
    fused: bool = False  # qkv_proj and gate_up_proj
    head_norms: bool = False  # of queries and keys
    four_norms: bool = False  # before and after each branch, else before it alone


@dataclass(frozen=True)
class Family:
    """What a model type fixes, and what its config.json may leave out."""

    windows: Callable[[Mapping[str, Any], int], list[bool]] | None = None  # layers with a window, from the config and their number; None: all
    biases: tuple[str, ...] = ()
    fused: bool = False
    head_norms: bool = False
    gemma: bool = False  # four norms with an offset of 1, a scaled embedding, a theta for layers with a window
    unturned: bool = False  # some layers turn nothing
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _late(text: Mapping[str, Any], layers: int) -> list[bool]:
    """Qwen: from some layer on, where windows are asked for."""
    return [layer >= int(text.get("max_window_layers", 28)) for layer in range(layers)]


def _patterned(text: Mapping[str, Any], layers: int) -> list[bool]:
    """Gemma 3: all but each sixth."""
    return [(layer + 1) % int(text.get("sliding_window_pattern", 6)) != 0 for layer in range(layers)]


def _turned(text: Mapping[str, Any], layers: int) -> list[bool]:
    """SmolLM3: layers whose queries and keys are turned, by a list or all but each so many."""
    return [bool(turn) for turn in text.get("no_rope_layers") or ((layer + 1) % int(text["no_rope_layer_interval"]) for layer in range(layers))]


def _unturned(text: Mapping[str, Any], layers: int) -> list[bool]:
    return [not turn for turn in _turned(text, layers)]


def _never(text: Mapping[str, Any], layers: int) -> list[bool]:
    return [False] * layers


GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
FAMILIES = {
    "llama": Family(windows=_never),
    "smollm3": Family(
        _unturned, unturned=True, defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4, "no_rope_layer_interval": 4}
    ),
    "mistral": Family(defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(_late, biases=ATTENTION[:3], defaults={"sliding_window": 4096}),
    "qwen3": Family(_late, head_norms=True, defaults={"sliding_window": 4096, "head_dim": 128}),
    "qwen3_vl_text": Family(_never, head_norms=True, defaults={"rope_theta": 5e5, "head_dim": 128}),
    "gemma3_text": Family(_patterned, head_norms=True, gemma=True, defaults=GEMMA3),
    "phi3": Family(fused=True, defaults={"rms_norm_eps": 1e-5}),
}
WITHIN = {"qwen3_vl": "qwen3_vl_text", "gemma3": "gemma3_text"}  # what a config around a text part may leave unsaid
NAMES = "Llama, SmolLM3, Mistral, Qwen2, Qwen3, Qwen3-VL, Gemma 3 and Phi-3"


def describe(config: Mapping[str, Any]) -> Layout:
    """A model's layers, from its config.json.

    Raises:
        UnsupportedModelError: another family, or something in it that the kernels do not have. CheckpointError: a size is missing or is no number.
    """
    text = text_config(config)
    outer = str(config.get("model_type")).removeprefix("flash_head_")  # as older released checkpoints have it
    kind = str(text.get("model_type") or WITHIN.get(outer, outer)).removeprefix("flash_head_")
    kind = WITHIN.get(kind, kind)
    family = FAMILIES.get(kind)
    if family is None:
        raise UnsupportedModelError(f"config.json: model type {kind!r}, expected one whose decoder becomes a program, {NAMES}; {INSTEAD}")
    said = dict(family.defaults) | {key: value for key, value in text.items() if value is not None or key in ("sliding_window", "rope_scaling")}
    try:
        return _layout(kind, family, said, config)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"config.json: a size of {kind!r} is missing or is none ({error!r}), expected those of its family; fetch the model again"
        ) from error


def _layout(kind: str, family: Family, said: Mapping[str, Any], config: Mapping[str, Any]) -> Layout:
    layers, heads, hidden = int(said["num_hidden_layers"]), int(said["num_attention_heads"]), int(said["hidden_size"])
    size = int(said.get("head_dim") or hidden // heads)
    activation = str(said.get("hidden_activation" if family.gemma else "hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"config.json: activation {activation!r}, expected {' or '.join(ACTIVATIONS)}, which have a kernel; {INSTEAD}")
    for key, word in (("attn_logit_softcapping", "scores capped"), ("use_bidirectional_attention", "attention in both directions")):
        if said.get(key):
            raise UnsupportedModelError(f"config.json: {key} is {said[key]!r} ({word}), expected none, as the attention kernel has it; {INSTEAD}")
    slides = _slides(family, said, layers)
    window = int(said.get("sliding_window") or 0)
    turned = _turned(said, layers) if family.unturned else [True] * layers
    far, near = _ropes(said, family)
    biases = {*family.biases, *(ATTENTION if said.get("attention_bias") else ()), *(MLP if said.get("mlp_bias") else ())}
    if len(slides) != layers or len(turned) != layers:
        raise ValueError(f"layer_types or no_rope_layers for {layers} layers")
    return Layout(
        family=kind,
        layers=layers,
        hidden=hidden,
        intermediate=int(said["intermediate_size"]),
        q_heads=heads,
        kv_heads=int(said.get("num_key_value_heads") or heads),
        head_size=size,
        vocab=int(said["vocab_size"]),
        positions=int(said["max_position_embeddings"]),
        epsilon=float(said.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[activation],
        scale=float(said["query_pre_attn_scalar"] if family.gemma else size) ** -0.5,
        windows=tuple(window if slide else 0 for slide in slides),
        ropes=tuple((near if slide else far) if turn else None for slide, turn in zip(slides, turned)),
        tied=bool(config.get("tie_word_embeddings", said.get("tie_word_embeddings", False))),
        embedding_scale=math.sqrt(hidden) if family.gemma else 1.0,
        norm_offset=1.0 if family.gemma else 0.0,
        biases=frozenset(biases),
        fused=family.fused,
        head_norms=family.head_norms,
        four_norms=family.gemma,
    )


def _slides(family: Family, said: Mapping[str, Any], layers: int) -> list[bool]:
    """Layers that see a window."""
    if family.windows is None:
        return [True] * layers
    if family.windows is _never or (family.windows in (_late, _unturned) and not said.get("use_sliding_window")):
        return [False] * layers
    types = said.get("layer_types")
    if types is None:
        return family.windows(said, layers)
    if not set(types) <= {SLIDING, "full_attention"}:
        raise UnsupportedModelError(f"config.json: layers of the kinds {sorted(set(types))}, expected {SLIDING} and full_attention; {INSTEAD}")
    return [kind == SLIDING for kind in types]


def _ropes(said: Mapping[str, Any], family: Family) -> tuple[Rope, Rope]:
    """Of layers that see all, and of layers with a window: the form of transformers 5, or that of before."""
    given = said.get("rope_parameters")
    theta, local = float(said.get("rope_theta", 1e4)), float(said.get("rope_local_base_freq", 1e4))
    if isinstance(given, Mapping) and family.gemma and (SLIDING in given or "full_attention" in given):
        return _rope(given.get("full_attention") or {}, theta, said), _rope(given.get(SLIDING) or {}, local, said)
    far = _rope(given or said.get("rope_scaling") or {}, theta, said)
    return far, (Rope(local) if family.gemma else far)


def _rope(given: Mapping[str, Any], theta: float, said: Mapping[str, Any]) -> Rope:
    kind = str(given.get("rope_type") or given.get("type") or "default")
    share = float(given.get("partial_rotary_factor", said.get("partial_rotary_factor", 1.0)))
    if share != 1.0:
        raise UnsupportedModelError(f"config.json: {share:.0%} of a head's values are turned, expected all of them, as the attention kernel does it; {INSTEAD}")
    theta = float(given.get("rope_theta", theta))
    if kind in ("default", "mrope"):  # mrope: text's three positions are equal
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, float(given["factor"]))
    if kind == "llama3":
        first = given.get("original_max_position_embeddings") or said["max_position_embeddings"]
        return Rope(theta, float(given["factor"]), (float(given["low_freq_factor"]), float(given["high_freq_factor"]), float(first)))
    raise UnsupportedModelError(f"config.json: rotary positions of type {kind!r}, expected default, linear or llama3, which are one table; {INSTEAD}")


def rotations(rope: Rope, head_size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, [context, head_size / 2] float32 each, made in float64.

    Source: RoPE, Su et al. 2021, equation 15; llama3's scaling as `_compute_llama3_parameters` of transformers has it.
    """
    turns = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.llama3 is None:
        turns = turns / rope.factor
    else:
        low, high, first = rope.llama3
        share = np.clip((first * turns / (2 * math.pi) - low) / (high - low), 0, 1)  # 0: a wave longer than the first training's positions / low
        turns = turns * (share + (1 - share) / rope.factor)
    angles = np.arange(context, dtype=np.float64)[:, None] * turns
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
