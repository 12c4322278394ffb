"""The process in which ONNX Runtime GenAI's model builder runs: `python -m flashhead_edge.export.run_builder JSON`.

A process of its own, because the builder prints, and keeps the model's memory. The JSON object names `source`, `out`,
`cache` (folders), `precision` and `options` (the builder's own extra options).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def flatten_rope(config: Any) -> None:
    """Say the rotary settings of layer types as the builder reads them: transformers 5 nests them, builder 0.18 expects them flat."""
    nested = getattr(config, "rope_parameters", None)
    if isinstance(nested, dict) and "full_attention" in nested:
        config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(nested["full_attention"])


def main(source: str, out: str, cache: str, precision: str, options: dict[str, str]) -> None:
    from onnxruntime_genai.models import builder

    prepared = builder.parse_extra_options(None, source, out, precision, "cpu", cache, [f"{k}={v}" for k, v in options.items()])
    flatten_rope(prepared["hf_details"]["hf_config"])
    builder.create_model(None, source, out, precision, "cpu", cache, **prepared)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
