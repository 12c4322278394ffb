"""Which models have a head that FlashHead can replace, and what happens to the logits after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flashhead_edge.errors import UnsupportedModelError

PREFIX = "FlashHead"
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
ENCODERS = ("bert", "roberta", "electra", "camembert", "deberta", "deberta-v2", "albert", "distilbert", "xlm-roberta", "mpnet")
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")

# Model types whose logits are multiplied after the head: the config's key, and whether its value divides.
SCALES = {
    "cohere": ("logit_scale", False),
    "granite": ("logits_scaling", True),
    "hyperclovax": ("logits_scaling", False),
    "falcon_h1": ("lm_head_multiplier", False),
    "muse": ("output_multiplier", False),
}
CAPPED = ("gemma", "vaultgemma", "recurrent_gemma", "nanochat", "xlstm")  # families whose soft-cap has a default
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: itself, or the nested one of a multimodal model."""
    for key in NESTED:
        if isinstance(config.get(key), Mapping):
            return text_config(config[key])
    return config


def original_architecture(name: str) -> str:
    """`FlashHeadLlamaForCausalLM` -> `LlamaForCausalLM`."""
    return name.removeprefix(PREFIX)


def flash_architecture(name: str) -> str:
    """`LlamaForCausalLM` -> `FlashHeadLlamaForCausalLM`."""
    return PREFIX + original_architecture(name)


def architecture(config: Mapping[str, Any], name: str) -> str:
    """The original class of a model, `LlamaForCausalLM`.

    Args:
        config: the model's config.json.
        name: what error messages call the model.
    Raises:
        UnsupportedModelError: an encoder, an encoder-decoder, or a model without a language head.
    """
    model_type = config.get("model_type")
    found = config.get("architectures") or []
    if not found and isinstance(model_type, str):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        entry = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        found = [entry] if isinstance(entry, str) else list(entry or [])
    what = original_architecture(str(found[0])) if found else f"model_type {model_type!r}"
    ask = "expected a causal language model such as LlamaForCausalLM; choose another model"
    if not found or not what.endswith(HEADED):
        raise UnsupportedModelError(f"{name}: {what} has no head that writes the next token, {ask}")
    if model_type in ENCODERS:
        raise UnsupportedModelError(f"{name}: {what} is an encoder, {ask}")
    if config.get("is_encoder_decoder") or text_config(config).get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{name}: {what} is an encoder-decoder model, {ask}")
    return what


def _value(text: Mapping[str, Any], kind: str, key: str) -> Any:
    """A key's value; where the config leaves it out, what transformers takes for this model type."""
    if key in text or not kind.startswith((*SCALES, *CAPPED)):
        return text.get(key)
    from transformers import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[kind](), key, None) if kind in CONFIG_MAPPING else None


def logit_rule(config: Mapping[str, Any], name: str) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits after the head: softcap * tanh(scale * logits / softcap).

    Raises:
        UnsupportedModelError: the config scales its logits in a way that this version does not know.
    """
    text = text_config(config)
    outer, kind = str(config.get("model_type")), str(text.get("model_type") or config.get("model_type"))
    used = next((rule for family, rule in SCALES.items() if kind.startswith(family) or outer.startswith(family)), None)
    scale = 1.0
    if used is not None:
        value = float(_value(text, kind, used[0]) or 1.0)
        scale = 1.0 / value if used[1] else value
    for key in {key for key, _ in SCALES.values()} - {used[0] if used else ""}:
        if text.get(key) not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"{name}: config.json has {key} = {text[key]}, which model type {kind!r} is not known to use, "
                f"expected one of the families {', '.join(SCALES)}; choose another model"
            )
    caps = [float(cap) for cap in (_value(text, kind, key) for key in SOFTCAPS) if cap]
    softcap = caps[0] if caps else None
    if not (math.isfinite(scale) and scale > 0 and (softcap is None or (math.isfinite(softcap) and softcap > 0))):
        raise UnsupportedModelError(f"{name}: logits are scaled by {scale} and capped at {softcap}, expected positive numbers; correct config.json")
    return scale, softcap
