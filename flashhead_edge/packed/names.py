"""Names of a language model's parameters: as a plain text model has them, whatever stands around it in the file."""

from __future__ import annotations

# Where multimodal models keep their text part (Qwen3-VL, Gemma 3, LLaVA, SmolVLM as transformers 5 and earlier ones write them; mlx-vlm).
PREFIXES = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def text_name(stored: str) -> str:
    """`model.language_model.layers.0...` -> `model.layers.0...`; names of other parts stay as they are."""
    for prefix, plain in PREFIXES:
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored
