"""The process in which ONNX Runtime GenAI's model builder runs: `python -m flashhead_edge.export.run_builder JSON`.

A process of its own, because the builder prints, and keeps the model's memory. The JSON object names `source`, `out`,
`cache` (folders), `precision` and `options` (the builder's own extra options).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def say_rope_as_before(config: Any) -> None:
    """Say the rotary settings as builder 0.18 reads them, in transformers 4's terms: flat where 5 nests layer types, the kind also as `type`."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return
    if "full_attention" in settings:
        config.rope_local_base_freq = settings["sliding_attention"]["rope_theta"]
        settings = settings["full_attention"]
    config.rope_parameters = dict(settings) | {"type": settings.get("rope_type")}


def name_epsilon(config: Any) -> None:
    """Give the norms' epsilon the one name that the builder looks for; where it is missing it takes 1e-6."""
    epsilon = getattr(config, "layer_norm_eps", None)
    if epsilon is not None and not hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = epsilon


def main(source: str, out: str, cache: str, precision: str, options: dict[str, str]) -> None:
    from onnxruntime_genai.models import builder

    prepared = builder.parse_extra_options(None, source, out, precision, "cpu", cache, [f"{k}={v}" for k, v in options.items()])
    say_rope_as_before(prepared["hf_details"]["hf_config"])
    name_epsilon(prepared["hf_details"]["hf_config"])
    builder.create_model(None, source, out, precision, "cpu", cache, **prepared)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
