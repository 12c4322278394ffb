"""The nodes that an export hands to the plugins: what goes into a product, and what stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from flashhead_edge.export.tensorrt.fusing import plugin_nodes
from flashhead_edge.export.tensorrt.made import MODELS, record_layers
from flashhead_edge.program.nodes import Decoder, Node, Stored
from flashhead_edge.program.weights import Item

HEAD = Node("FlashHead", "head", ("hidden_states",), ("token",), {})


def layers_of(post_norms: bool) -> list[Node]:
    """A decoder of three layers in the smallest made model's shape, its weights unread."""
    decoder = Decoder("float16", 64)
    model = replace(MODELS["Qwen3-0.6B"], hidden=128, intermediate=256, q_heads=2, kv_heads=1, post_norms=post_norms)
    record_layers(decoder, model, Item("embedding", np.float16, (64, 128), lambda: iter(())), 3, 64, 0)
    return [*decoder.nodes, HEAD]


@pytest.mark.parametrize("post_norms", [False, True])
def test_a_layer_is_five_plugins(post_norms: bool) -> None:
    nodes = layers_of(post_norms)
    found = plugin_nodes(nodes)
    layer = ["W4A16Linear", "DecodeAttention", "W4A16Linear", "W4A16Linear", "W4A16Linear"]
    assert [n.op for n in found] == ["TokenEmbedding", *layer * 3, *["RmsNorm"] * (1 + post_norms), "FlashHead"]
    written = {"input_ids", "lengths"}
    for n in found:
        assert {name for name in n.inputs if not name.startswith("past")} <= written and "" not in (*n.inputs, *n.outputs), n.name
        assert not written & set(n.outputs)
        written |= set(n.outputs)
    products = [n.attributes for n in found if n.op == "W4A16Linear"]
    behind_a_norm = [False, False, post_norms, False, *[post_norms, False, post_norms, False] * 2]  # the first layer reads the embedding
    assert [bool(a["first_norm"].name) for a in products] == behind_a_norm
    assert [(a["residual"], a["gated"], a["early"]) for a in products[4:]] == [(1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 0, 1)] * 2
    assert [(a["residual"], a["gated"], a["early"]) for a in products[:4]] == [(0, 0, 0), (0, 0, 1), (1, 1, 0), (0, 0, 1)]
    read = [v.name for n in nodes for v in n.attributes.values() if isinstance(v, Stored) and v.name]
    again = [v.name for n in found for v in n.attributes.values() if isinstance(v, Stored) and v.name]
    assert Counter(read) == Counter(again)  # each tensor as often as before


def test_attention_keeps_its_node_and_nothing_early_stands_before_it() -> None:
    linear = {"codes": Stored("c"), "scales": Stored("s"), "zeros": Stored(""), "n": 128, "k": 64, "group": 64, "bf16": 0}
    product = Node("W4A16Linear", "p", ("x",), ("qkv",), linear)
    attention = Node("DecodeAttention", "a", ("qkv", "past_key_values.0.key", "past_key_values.0.value", "lengths"), ("a", "k", "v"), {"q_heads": 1})
    assert plugin_nodes([product, attention, HEAD]) == (product, attention, HEAD)  # no norm before the product, as OLMo 2 has it
    behind = Node("Add", "b", ("qkv", "bias"), ("biased",), {}, "")
    found = plugin_nodes([product, behind, HEAD])
    assert found[1:] == (behind, HEAD) and found[0].attributes["early"] == 1
