"""Replacing operators by others, one rule an operator: how a dialect that lacks an operator says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from flashhead_edge.export.graph import Ops

Rule = Callable[[Ops, ir.Node], Sequence[ir.Value | None]]  # a value for each output of the node that is used


def lower(model: ir.Model, rules: Mapping[tuple[str, str], Rule]) -> None:
    """Put what `rules[domain, operator]` records in the place of each such node, in the main graph and in the branches of its operators."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        rule = rules.get((node.domain, node.op_type))
        if rule is None:
            continue
        op = Ops()
        made = rule(op, node)
        op.rename(node.name or node.op_type)
        pairs = [(old, new) for old, new in zip(node.outputs, made) if new is not None]
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], op.nodes, [old for old, _ in pairs], [new for _, new in pairs])


def remove_unused(model: ir.Model) -> None:
    """Take out the nodes and initializers that nothing reads."""
    RemoveUnusedNodesPass()(model)
