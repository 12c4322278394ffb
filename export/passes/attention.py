"""What each layer's attention sees, set on the builder's attention operators."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from flashhead_edge.errors import ExportError
from flashhead_edge.export.graph import ORT

COS, SIN = 7, 8  # inputs of GroupQueryAttention


@dataclass(frozen=True)
class LayerRule:
    """The attention of one layer."""

    window: int | None  # keys that a query sees, itself included; None: all before it
    rotary: bool  # queries and keys are turned by their positions


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The attention operators, in the order of the layers."""
    return [n for n in model.graph if (n.domain, n.op_type) == (ORT, "GroupQueryAttention")]


def apply_layer_rules(model: ir.Model, rules: list[LayerRule]) -> None:
    """Give each layer its window, and take rotary positions from the layers without.

    Raises:
        ExportError: the model has another number of attention operators, or one that turns nothing although its rule says so.
    """
    nodes = attention_nodes(model)
    if len(nodes) != len(rules):
        raise ExportError(f"the body has {len(nodes)} attention operators, expected {len(rules)}, one a layer; report this model")
    for node, rule in zip(nodes, rules):
        node.attributes.add(ir.AttrInt64("local_window_size", rule.window or -1))
        turned = bool(node.attributes.get_int("do_rotary", 0))
        if rule.rotary and not turned and node.inputs[0].producer().op_type != "RotaryEmbedding":  # type: ignore[union-attr]
            raise ExportError(f"the body's {node.name} turns neither queries nor keys, expected rotary positions; report this model")
        if turned and not rule.rotary:
            node.attributes.add(ir.AttrInt64("do_rotary", 0))
            node.replace_input_with(COS, None)
            node.replace_input_with(SIN, None)


def name_cache_width(model: ir.Model, width: int) -> None:
    """Write the width of a head into the shapes of keys and values, [B, KV, positions, width]."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and value.name.startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], width])
