"""A decoder in TensorRT's own operators, weights and all in the engine: the ONNX export's `tensorrt` dialect under the names of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashhead_edge
from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.source import Source
from flashhead_edge.export.body import Body
from flashhead_edge.export.body_dialects import to_dialect
from flashhead_edge.export.dialects import DIALECTS
from flashhead_edge.export.head import head_functions
from flashhead_edge.export.onnx import CONTRACT, metadata
from flashhead_edge.export.parts import head_model, whole_decoder
from flashhead_edge.export.passes.attention import attention_nodes
from flashhead_edge.export.storage import bytes_of, write_models
from flashhead_edge.index import HeadIndex
from flashhead_edge.program.head import settings_of


def native_parts(
    source: Source, body: Body, index: HeadIndex, rows: Any, bias: Any, scale: float, softcap: float | None
) -> tuple[int, Callable[[Path], dict[str, Any]]]:  # fmt: skip
    """Bytes that will be written, and the function that writes the models into a new folder and says what its manifest says of them.

    Args:
        rows: the head's matrix [V or more, d], read when it is written.
    Raises:
        ExportError: an operator or a code that the dialect cannot say.
    """
    first = attention_nodes(body.model)[0].attributes
    q_heads, kv_heads = first["num_heads"].as_int(), first["kv_num_heads"].as_int()
    layers = len(attention_nodes(body.model))
    key = next(v for v in body.model.graph.inputs if v.name == "past_key_values.0.key")
    assert key.shape is not None
    head_size = int(key.shape[3])  # type: ignore[arg-type]
    to_dialect(body, "tensorrt")
    dialect = DIALECTS["tensorrt"]
    functions = head_functions(index, rows, bias, dialect)
    text = text_config(source.config)
    settings = settings_of(index, scale, softcap, text.get("max_position_embeddings"), int(text.get("vocab_size") or index.vocab_size))
    settings |= {"layers": layers, "kv_heads": kv_heads, "head_size": head_size, "q_heads": q_heads, "cache": "growing", "body_parameters": 0}
    about = metadata(index, "tensorrt", settings)
    models = {
        "decoder.onnx": whole_decoder(body.model, functions, index, scale, softcap, about | {"flashhead.part": "decoder"}),
        "head.onnx": head_model(functions, index, dialect, about | {"flashhead.part": "head"}, logits=False),
        "head_logits.onnx": head_model(functions, index, dialect, about | {"flashhead.part": "head_logits"}, logits=True),
    }

    def write(new: Path) -> dict[str, Any]:
        write_models(new, models)
        return {
            "version": flashhead_edge.__version__,
            "fingerprint": index.fingerprint,
            "weights_fingerprint": None,
            "weights_bytes": None,
            "weights_sha256": None,
            "settings": settings,
            "agreement": {name: index.summary.get(name) for name in CONTRACT},
        }

    return bytes_of(models.values()), write
