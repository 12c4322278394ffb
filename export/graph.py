"""Writing ONNX graphs: a recorder of operators, and functions made from a Python body. onnx-ir only.

A function's weights are declared where they are used (`Ops.weight`), become its inputs, and are handed over as
initializers by whoever calls it: ONNX functions cannot hold initializers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "flashhead"
DOMAIN_VERSION = 1
ORT = "com.microsoft"


class Ops:
    """Records operators: `ops.Add(a, b)` adds a node and returns its value, a tuple where it has several outputs.

    Attributes of a node are keyword arguments; `_outputs` is how many outputs it has, `_domain` its domain.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self.arrays: dict[str, np.ndarray | ir.TensorProtocol] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def record(*inputs: ir.Value | None, _outputs: int = 1, _domain: str = "", **attributes: Any) -> Any:
            node = ir.node(op_type, inputs, attributes, domain=_domain, num_outputs=_outputs, name=f"{op_type}_{len(self.nodes)}")
            for i, value in enumerate(node.outputs):
                value.name = f"{node.name}_out{i}" if _outputs > 1 else f"{node.name}_out"
            self.nodes.append(node)
            return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

        return record

    def const(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        """A number or a short list that belongs to the graph itself."""
        return self.Constant(value=ir.tensor(np.asarray(value, dtype)))  # type: ignore[no-any-return]

    def ints(self, *values: int) -> ir.Value:
        """A shape, axes or the like: [n] int64."""
        return self.const(list(values), np.int64)

    def weight(self, name: str, array: Any) -> ir.Value:
        """An array of the head: an input of the function, an initializer of the graph that calls it. Declared twice, it is one."""
        if name not in self.weights:
            self.arrays[name] = array
            dtype = ir.tensor(array[:0]).dtype if isinstance(array, np.ndarray) else array.dtype
            self.weights[name] = ir.val(name, dtype=dtype, shape=tuple(array.shape))
        return self.weights[name]

    def rename(self, prefix: str) -> None:
        """Give every node and value a name that a person finds in a viewer."""
        for node in self.nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"


@dataclass(frozen=True, eq=False)
class Function:
    """An ONNX function, and the arrays that its caller must hand it after its own inputs."""

    ir: ir.Function
    arrays: dict[str, Any]
    outputs: tuple[str, ...]


def opset(version: int, *domains: str) -> dict[str, int]:
    """Opset imports: ai.onnx at `version`, others at 1."""
    return {"": version} | dict.fromkeys(domains, 1)


def function(name: str, inputs: Sequence[str], body: Callable[..., dict[str, ir.Value]], imports: dict[str, int], doc: str) -> Function:
    """Run `body(ops, *inputs)`, whose result names the outputs, and make a function of what it recorded."""
    ops = Ops()
    values = [ir.val(i) for i in inputs]
    outputs = body(ops, *values)
    for key, value in list(outputs.items()):
        again = any(value is other for name, other in outputs.items() if name != key)
        if value.producer() is None or again:  # each output of a function needs a node of its own
            outputs[key] = ops.Identity(value)
    ops.rename(name)  # values too: a parser that inlines functions may keep all names in one table
    for key, value in outputs.items():
        value.name = key
    graph = ir.Graph([*values, *ops.weights.values()], list(outputs.values()), nodes=ops.nodes, opset_imports=imports, name=name, doc_string=doc)
    return Function(ir.Function(DOMAIN, name, graph=graph, attributes=[]), ops.arrays, tuple(outputs))


@dataclass(eq=False)
class Main:
    """The main graph in the making: its functions, nodes and initializers."""

    ops: Ops = field(default_factory=Ops)
    functions: dict[str, ir.Function] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)

    def initializer(self, name: str, array: Any) -> ir.Value:
        """A tensor of the graph; the same name is the same tensor."""
        if name not in self.initializers:
            tensor: Any = ir.tensor(np.ascontiguousarray(array), name=name) if isinstance(array, np.ndarray) else array
            self.initializers[name] = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self.initializers[name]

    def call(self, f: Function, *inputs: ir.Value, prefix: str = "head") -> dict[str, ir.Value]:
        """A node of a function, its arrays as initializers `prefix`.name: outputs by name."""
        self.functions.setdefault(f.ir.name, f.ir)
        arrays = [self.initializer(f"{prefix}.{name}", array) for name, array in f.arrays.items()]
        node = ir.node(f.ir.name, [*inputs, *arrays], domain=DOMAIN, num_outputs=len(f.outputs), name=f"{prefix}/{f.ir.name}")
        for name, value in zip(f.outputs, node.outputs):
            value.name = f"{prefix}/{f.ir.name}/{name}"
        self.ops.nodes.append(node)
        return dict(zip(f.outputs, node.outputs))

    def model(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], imports: dict[str, int], metadata: dict[str, str]) -> ir.Model:
        """Close the graph."""
        graph = ir.Graph(
            list(inputs), list(outputs), nodes=self.ops.nodes, initializers=list(self.initializers.values()),
            opset_imports=imports | {DOMAIN: DOMAIN_VERSION}, name=name,
        )  # fmt: skip
        return ir.Model(graph, ir_version=10, producer_name="flashhead-edge", functions=list(self.functions.values()), metadata_props=dict(metadata))
