"""The decoder's nodes with what stands around a product taken into its `W4A16Linear`: fewer launches of a step, fewer layers for TensorRT to time."""

from __future__ import annotations

from collections.abc import Sequence

from flashhead_edge.program.fuse import ATTENTION, LINEAR, NONE, fused
from flashhead_edge.program.nodes import Attribute, Node


def plugin_nodes(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes of a decoder, the head's the last, as plugins take them.

    What a plugin launches for its rows it decides itself: up to eight are one launch, a prompt's a launch for each step, and so `DecodeAttention` stays.
    """
    found: list[Node] = []
    for step in fused(nodes):
        if step.node.op == ATTENTION:
            found += nodes[step.first : step.last + 1]
        elif step.node.op == LINEAR:
            found.append(_linear(step.node))
        else:
            found.append(step.node)
    return tuple(found)


def _linear(n: Node) -> Node:
    (x, residual), (y, total) = n.inputs, n.outputs
    around: dict[str, Attribute] = {"residual": int(bool(residual)), "early": int(n.attributes["norm"] == NONE)}
    names = (x, residual), (y, total)
    inputs, outputs = (tuple(name for name in pair if name) for pair in names)
    return Node("W4A16Linear", f"{y}/W4A16Linear", inputs, outputs, dict(n.attributes) | around, n.domain)
