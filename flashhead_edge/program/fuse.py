"""The nodes of a decode step with fewer launches: a norm before and a gate behind a product, rotation and cache inside attention. Data to data.

What a fused node computes is what the nodes that it stands for compute one after the other, bit for bit (w4a16_fused.h, attention.h); it takes up to eight
rows. Prompts run the program as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashhead_edge.program.nodes import Attribute, Node, Stored

LINEAR, ATTENTION = "FusedLinear", "RopeAttention"
MOST_ROWS = 8  # w4a16_fused.h, attention.h
NONE = Stored("")
# What may stand behind a launch that lets the next one begin before it has waited itself: until they wait, these read weights alone.
BEHIND_EARLY = (LINEAR, "W4A16Linear", "RmsNorm", "GatedProduct", "Add", "Mul", "FlashHead")


@dataclass(frozen=True)
class Step:
    """A node, and which nodes of the program it stands for: first to last."""

    node: Node
    first: int
    last: int


def fused(nodes: Sequence[Node]) -> tuple[Step, ...]:
    """The nodes of a decoder with its products and attentions fused where the kernels take them; the head's node stays the last.

    A `FusedLinear` has inputs (x, residual) and outputs (y, sum), "" where there is none; of its attributes `norm` and `first_norm` are tensors or
    `Stored("")`, `gated` is 0 or 1. A `RopeAttention` is a DecodeAttention by its attributes.
    """
    readers: dict[str, list[int]] = {}
    for at, node in enumerate(nodes):
        for name in node.inputs:
            readers.setdefault(name, []).append(at)
    found: list[Step] = []
    at = 0
    while at < len(nodes):
        step = next((s for s in (_linear(nodes, readers, at, behind) for behind in (2, 1, 0)) if s is not None), None)
        if step is None and nodes[at].op == "DecodeAttention":
            n = nodes[at]
            step = Step(Node(ATTENTION, n.name, n.inputs, n.outputs, n.attributes, n.domain), at, at)
        found.append(step or Step(nodes[at], at, at))
        at = found[-1].last + 1
    return tuple(_checked(nodes, found))


def _linear(nodes: Sequence[Node], readers: Mapping[str, list[int]], at: int, norms: int) -> Step | None:
    """A product with so many norms before it, the first of which is node `at`; None where this is something else."""
    end = at + norms
    if end >= len(nodes) or nodes[end].op != "W4A16Linear" or any(n.op != "RmsNorm" for n in nodes[at:end]):
        return None
    linear, before = nodes[end], nodes[at:end]
    x, residual, total = linear.inputs[0], "", ""
    attributes: dict[str, Attribute] = dict(linear.attributes) | {
        "norm": NONE, "first_norm": NONE, "offset": 0.0, "epsilon": 0.0, "gated": 0, "activation": 0,
    }  # fmt: skip
    for name, norm in zip(("norm", "first_norm"), reversed(before)):
        if norm.outputs[0] != x or len(readers[x]) != 1:
            return None
        if name == "first_norm" and (len(norm.inputs) == 2 or not residual or x == residual or _scales(norm) != (attributes["offset"], attributes["epsilon"])):
            return None
        attributes |= {name: norm.attributes["weight"], "offset": norm.attributes["offset"], "epsilon": norm.attributes["epsilon"]}
        x = norm.inputs[0]
        if len(norm.inputs) == 2:
            residual, total = norm.inputs[1], norm.outputs[1]
    y, last = linear.outputs[0], end
    gate = nodes[end + 1] if end + 1 < len(nodes) else linear
    n = linear.attributes["n"]
    if norms and gate.op == "GatedProduct" and readers.get(y) == [end + 1] and isinstance(n, int) and n % 32 == 0:
        attributes |= {"gated": 1, "activation": gate.attributes["activation"]}
        y, last = gate.outputs[0], end + 1
    return Step(Node(LINEAR, f"{y}/{LINEAR}", (x, residual), (y, total), attributes, linear.domain), at, last)


def _scales(norm: Node) -> tuple[Attribute, Attribute]:
    return norm.attributes["offset"], norm.attributes["epsilon"]


def _checked(nodes: Sequence[Node], steps: list[Step]) -> list[Step]:
    """With the nodes themselves where the launch behind would begin too early for what it reads."""
    found: list[Step] = []
    for at, step in enumerate(steps):
        a = step.node.attributes
        early = step.node.op == LINEAR and (a["gated"] == 1 or a["norm"] == NONE)
        behind = steps[at + 1].node.op if at + 1 < len(steps) else "FlashHead"
        if early and behind not in BEHIND_EARLY:
            found += [Step(nodes[i], i, i) for i in range(step.first, step.last + 1)]
        else:
            found.append(step)
    return found
