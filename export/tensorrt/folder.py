"""The models and the weights of an export folder, from node records: for checkpoints and for made models alike. numpy and onnx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flashhead_edge
from flashhead_edge.errors import ExportError
from flashhead_edge.export.tensorrt.fusing import plugin_nodes
from flashhead_edge.export.tensorrt.graph import write_graph
from flashhead_edge.jetson.tensorrt_folder import WEIGHTS
from flashhead_edge.program.head import HeadPart, decoder_graph, dense_graph, head_graph, settings_of
from flashhead_edge.program.nodes import Decoder
from flashhead_edge.program.weights import Item, write_weights
from flashhead_edge.progress import Progress, silent

FORMAT = "1"  # of the models' metadata, as of every export
SPARE = 32 << 20  # bytes for models, manifest and copied files


def stored_items(d: Decoder, h: HeadPart) -> list[Item]:
    """All tensors in the order of the file: matrices of the vocabulary first, the head's last."""
    first = {name: d.items[name] for name in d.items if name == "embedding"} | {h.rows.name: h.rows}
    return [*first.values(), *(item for name, item in d.items.items() if name not in first), *h.items]


def write_parts(
    new: Path,
    final: Path,
    d: Decoder,
    h: HeadPart,
    *,
    context_length: int | None,
    embedding_rows: int,
    agreement: Mapping[str, Any],
    dense_head: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write weights.safetensors and the models into a new folder.

    Args:
        final: where the folder will lie.
        context_length: positions that the model was made for.
        dense_head: write decoder_dense.onnx too.
    Returns:
        What the manifest says of them.
    """
    if d.attentions == []:
        raise ExportError("decoder: it has no attention, expected one a layer; report this model")
    weights = write_weights(new / WEIGHTS, stored_items(d, h), h.index.fingerprint, progress)
    first = d.attentions[0]
    settings = settings_of(h.index, h.scale, h.softcap, context_length, embedding_rows) | {
        "body_parameters": d.parameters,
        "layers": len(d.attentions),
        "kv_heads": first.kv_heads,
        "head_size": first.head_size,
        "q_heads": first.q_heads,
    }
    about = {
        "flashhead.format": FORMAT,
        "flashhead.version": flashhead_edge.__version__,
        "flashhead.dialect": "tensorrt-plugins",
        "flashhead.fingerprint": h.index.fingerprint,
        "flashhead.settings": json.dumps(settings, sort_keys=True),
        "flashhead.agreement": json.dumps(dict(agreement), sort_keys=True),
    }
    graphs = {"decoder": decoder_graph(d, h), "head": head_graph(h, logits=False), "head_logits": head_graph(h, logits=True)}
    if dense_head:
        graphs["decoder_dense"] = dense_graph(d, h)
    for part, graph in graphs.items():
        progress(f"writing {part}.onnx", None)
        write_graph(new / f"{part}.onnx", replace(graph, nodes=plugin_nodes(graph.nodes)), weights, final, about | {"flashhead.part": part})
    return {
        "version": flashhead_edge.__version__,
        "fingerprint": h.index.fingerprint,
        "weights_fingerprint": weights.fingerprint,
        "weights_bytes": weights.size,
        "weights_sha256": weights.sha256,
        "layers": "plugin",
        "precision": d.precision,
        "max_batch": h.max_rows,
        "context": d.context,
        "settings": settings,
        "agreement": dict(agreement),
    }
