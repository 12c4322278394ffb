"""The body as one node of our own operator (jetson/native/decoder_step.c), for ONNX Runtime on a CPU.

The node holds a list of instructions over rows of floats, made from the graph of the standard body, operator by operator, so that
a family is data, and over the same initializers. A body with an operator that has no instruction has no such node.

An instruction is 16 whole numbers (operation, floats of a piece, pieces a token, places of the result and of three operands as slot
and offset, five of its own) and two floats. A slot is a row of floats for each token. Instructions are made with a slot for each
result; `assigned` then lets a slot be used again once nobody reads what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.dialects import OPSET
from flashhead_edge.export.graph import ORT, opset
from flashhead_edge.export.native import NATIVE_DOMAIN

# as in decoder.h and layers.h
EMBED, RMS_NORM, LAYER_NORM, LINEAR, ADD, MULTIPLY, ADD_ROW, MULTIPLY_ROW, SCALE, ACTIVATE, ATTEND = range(11)
SILU, GELU_TANH, GELU_ERF = range(3)
MOST_SLOTS = 64
HEAD = 16  # floats: a head's size is a multiple of it
LINE = 16  # floats: a slot's rows begin on a cache line
GROUPS = (32, 64, 128)
RECORD = 16  # whole numbers of an instruction


class NotNative(Exception):
    """The native operator does not have something of this body; the message says what."""


@dataclass(frozen=True)
class Place:
    """A value: `n` columns of a slot, as pieces side by side."""

    slot: int
    offset: int
    n: int
    piece: int


@dataclass(frozen=True)
class Instruction:
    operation: int
    n: int  # floats of a piece
    repeat: int  # pieces a token
    out: Place
    operands: tuple[Place | None, ...]
    own: tuple[int, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation that is not made yet: what it is multiplied with may come with it."""

    kind: int
    x: ir.Value


@dataclass(eq=False)
class Program:
    """Instructions in the making."""

    graph: ir.Graph
    layers: dict[str, int]  # by the name of the input of its keys
    instructions: list[Instruction] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    places: dict[ir.Value, Place] = field(default_factory=dict)
    sigmoids: dict[ir.Value, ir.Value] = field(default_factory=dict)  # what each is of
    activations: dict[ir.Value, Activation] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)

    def index(self, value: ir.Value) -> int:
        """The number of an initializer."""
        if value.const_value is None or value.name is None:
            raise NotNative(f"{value.name} is no initializer")
        self.initializers.setdefault(value.name, value)
        return list(self.initializers).index(value.name)

    def place(self, value: ir.Value | None) -> Place:
        """Where a value lies; an activation that was put off is made now."""
        if value is not None and value not in self.places and value in self.activations:
            waiting = self.activations.pop(value)
            x = self.place(waiting.x)
            self.emit(ACTIVATE, value, x.n, [waiting.x], [waiting.kind])
        if value is None or value not in self.places:
            raise NotNative(f"{None if value is None else value.name} is no row of floats")
        return self.places[value]

    def emit(
        self, operation: int, out: ir.Value, n: int, operands: Sequence[ir.Value | None] = (), own: Sequence[int] = (), numbers: Sequence[float] = (),
        *, repeat: int = 1, width: int | None = None,
    ) -> None:  # fmt: skip
        """An instruction whose result has n * repeat columns, or `width`."""
        sources = tuple(None if v is None else self.place(v) for v in operands)
        columns = n * repeat if width is None else width
        self.places[out] = Place(len(self.widths), 0, columns, columns)
        self.widths.append(columns)
        self.instructions.append(Instruction(operation, n, repeat, self.places[out], sources, tuple(own), tuple(map(float, numbers))))


def decoder_model(body: ir.Model, metadata: dict[str, str]) -> ir.Model:
    """input_ids [1, S], texts [M, 3], past of each layer -> hidden_states [1, S, d] and present, as the standard body has them.

    S are the tokens of M texts that stand side by side in one cache: decoder_step.c says what is in a row of `texts`.

    Args:
        body: in the `onnxruntime` dialect.
    Raises:
        NotNative: it has an operator or a size that the native operator does not have.
    """
    graph = body.graph
    inputs = {v.name: v for v in graph.inputs}
    keys = [name for name in inputs if name is not None and name.startswith("past_key_values.") and name.endswith(".key")]
    program = Program(graph, {name: layer for layer, name in enumerate(keys)})
    counts = _counts(graph)
    for node in graph:
        if node in counts or node.op_type == "Constant":
            continue
        rule = RULES.get((node.domain, node.op_type))
        if rule is None:
            raise NotNative(f"{node.op_type} has no instruction")
        rule(program, node)
    hidden = next(v for v in graph.outputs if v.name == "hidden_states")
    result = program.place(hidden)
    if program.instructions[-1].out != result:
        raise NotNative("the last operator does not make the hidden states")
    instructions, widths = assigned(program.instructions, program.widths)
    cache = [name.removesuffix("key") + part for name in keys for part in ("key", "value")]
    texts = ir.Value(name="texts", shape=ir.Shape(("M", 3)), type=ir.TensorType(ir.DataType.INT64))
    given = [_copy(inputs["input_ids"]), texts, *(_copy(inputs[name]) for name in cache)]
    arrays = [ir.Value(name=v.name, shape=v.shape, type=v.type, const_value=v.const_value) for v in program.initializers.values()]
    said = {v.name: v for v in graph.outputs}
    made = [said[name] for name in ("hidden_states", *(name.replace("past_key_values.", "present.") for name in cache))]
    node = ir.node(
        "DecoderStep",
        [*given, *arrays],
        {
            "layers": len(keys),
            "texts": 1,
            "widths": widths,
            "result": [instructions[-1].out.slot, instructions[-1].out.offset],
            "instructions": [x for i in instructions for x in record(i)],
            "numbers": [x for i in instructions for x in (*i.numbers, *[0.0] * (2 - len(i.numbers)))],
        },
        domain=NATIVE_DOMAIN,
        num_outputs=len(made),
        name="body/DecoderStep",
    )
    for value, like in zip(node.outputs, made):
        value.name, value.type, value.shape = like.name, like.type, like.shape
    native = ir.Graph(given, list(node.outputs), nodes=[node], initializers=arrays, opset_imports=opset(OPSET, NATIVE_DOMAIN), name="body")
    return ir.Model(native, ir_version=10, producer_name="flashhead-edge", metadata_props=dict(metadata))


def record(i: Instruction) -> list[int]:
    """An instruction's whole numbers, as decoder_step.c reads them."""
    places = [i.out, *i.operands, *[None] * (3 - len(i.operands))]
    return [i.operation, i.n, i.repeat, *(x for p in places for x in ((-1, 0) if p is None else (p.slot, p.offset))), *i.own, *[-1] * (5 - len(i.own))]


def assigned(instructions: list[Instruction], widths: list[int]) -> tuple[list[Instruction], list[int]]:
    """The same instructions over few slots: instructions, and the slots' widths.

    Args:
        instructions: each with a slot of its own for its result.
        widths: of those slots.
    """
    last = {p.slot: at for at, i in enumerate(instructions) for p in (i.out, *i.operands) if p is not None}
    found: list[Instruction] = []
    wide: list[int] = []
    now: dict[int, int] = {}  # where what lives is

    def moved(place: Place | None) -> Place | None:
        return None if place is None else replace(place, slot=now[place.slot])

    for at, i in enumerate(instructions):
        width = -(-widths[i.out.slot] // LINE) * LINE
        free = [s for s in range(len(wide)) if s not in now.values()]
        if not free:
            wide.append(width)
            free = [len(wide) - 1]
        slot = min(free, key=lambda s: (wide[s] < width, abs(wide[s] - width)))
        wide[slot] = max(wide[slot], width)
        now[i.out.slot] = slot
        found.append(replace(i, out=replace(i.out, slot=slot), operands=tuple(map(moved, i.operands))))
        now = {virtual: real for virtual, real in now.items() if last[virtual] > at or at == len(instructions) - 1}
    if len(wide) > MOST_SLOTS:
        raise NotNative(f"more than {MOST_SLOTS} values live at once")
    return found, wide


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def _counts(graph: ir.Graph) -> set[ir.Node]:
    """Operators that count the mask's positions: the native operator sees how long it is."""
    known = {v for v in graph.inputs if v.name == "attention_mask"}
    found = set()
    for node in graph:
        values = [v for v in node.inputs if v is not None and constant(v) is None]
        if values and all(v in known for v in values):
            known.update(node.outputs)
            found.add(node)
    return found


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return node.attributes["value"].as_tensor().numpy() if node.op_type == "Constant" else None
    return None if value.const_value is None else value.const_value.numpy()


# ---- a rule for each operator


def _embed(p: Program, node: ir.Node) -> None:
    rows, ids = node.inputs
    if rows is None or ids is None or ids.name != "input_ids" or rows.const_value is None:
        raise NotNative("a Gather that is no embedding")
    width = int(rows.const_value.shape[1])  # type: ignore[arg-type]
    p.emit(EMBED, node.outputs[0], width, [], [p.index(rows)], [1.0])


def _same(p: Program, node: ir.Node) -> None:
    """A Cast of rows, which are float32 already."""
    p.places[node.outputs[0]] = p.place(node.inputs[0])


def _norm(p: Program, node: ir.Node) -> None:
    x, weight, *bias = node.inputs
    assert weight is not None
    place, n = p.place(x), _length(weight)
    if place.piece % n:
        raise NotNative("a norm over other columns than its weight has")
    _normed(p, node, x, weight, bias[0] if bias else None, place.n // n)


def _normed(p: Program, node: ir.Node, x: ir.Value | None, weight: ir.Value, bias: ir.Value | None, repeat: int) -> None:
    layer = "Simplified" not in node.op_type
    own = [p.index(weight), *([p.index(bias)] if bias is not None else [])]
    p.emit(LAYER_NORM if layer else RMS_NORM, node.outputs[0], _length(weight), [x], own, [node.attributes["epsilon"].as_float()], repeat=repeat)


def _skip_norm(p: Program, node: ir.Node) -> None:
    """The sum of two rows, and its norm."""
    x, skip, weight, *bias = node.inputs
    assert weight is not None
    if len(bias) > 1 and bias[1] is not None:
        raise NotNative("a sum of three rows")
    total = node.outputs[3] if len(node.outputs) > 3 else ir.Value(name=f"{node.name}/sum")
    p.emit(ADD, total, p.place(x).n, [x, skip])
    _normed(p, node, total, weight, bias[0] if bias else None, 1)


def _linear(p: Program, node: ir.Node) -> None:
    n, k, bits, group = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
    x, codes, scales, zeros, *rest = [*node.inputs, None][: max(4, len(node.inputs))]
    if bits != 4 or group not in GROUPS or any(v is not None for v in rest) or (zeros is not None and zeros.dtype != ir.DataType.UINT8):
        raise NotNative(f"a product of {bits} bits in groups of {group}")
    assert codes is not None and scales is not None
    p.emit(LINEAR, node.outputs[0], n, [x], [p.index(codes), p.index(scales), -1 if zeros is None else p.index(zeros), k, group])


def _length(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(np.prod(value.const_value.shape.numpy()))


def _add(p: Program, node: ir.Node) -> None:
    x, y = node.inputs
    if constant(y) is None:
        p.emit(ADD, node.outputs[0], p.place(x).n, [x, y])
        return
    assert y is not None
    if _length(y) != p.place(x).n:
        raise NotNative("an Add of a constant that is no row")
    p.emit(ADD_ROW, node.outputs[0], p.place(x).n, [x], [p.index(y)])


def _multiply(p: Program, node: ir.Node) -> None:
    x, y = node.inputs
    assert x is not None and y is not None
    out = node.outputs[0]
    factor = constant(y)
    if factor is not None and factor.size == 1:
        p.emit(SCALE, out, p.place(x).n, [x], (), [float(factor.reshape(()))])
    elif factor is not None and factor.size != p.place(x).n:
        raise NotNative("a Mul with a constant that is no row")
    elif factor is not None:
        p.emit(MULTIPLY_ROW, out, p.place(x).n, [x], [p.index(y)])
    elif p.sigmoids.get(y) is x:
        p.activations[out] = Activation(SILU, x)
    elif x in p.activations and len(list(x.uses())) == 1:
        waiting = p.activations.pop(x)
        p.emit(ACTIVATE, out, p.place(waiting.x).n, [waiting.x, y], [waiting.kind])
    else:
        p.emit(MULTIPLY, out, p.place(x).n, [x, y])


def _sigmoid(p: Program, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    p.sigmoids[node.outputs[0]] = node.inputs[0]


def _gelu(p: Program, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    kind = node.attributes.get("approximate")
    p.activations[node.outputs[0]] = Activation(GELU_TANH if kind is not None and kind.as_string() == "tanh" else GELU_ERF, node.inputs[0])


def _split(p: Program, node: ir.Node) -> None:
    x = p.place(node.inputs[0])
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    widths = [x.n // len(node.outputs)] * len(node.outputs) if sizes is None else [int(s) for s in sizes]
    if sum(widths) != x.n or x.piece != x.n:
        raise NotNative("a Split that is not of a whole row")
    at = x.offset
    for value, width in zip(node.outputs, widths):
        p.places[value] = Place(x.slot, at, width, width)
        at += width


def _reshape(p: Program, node: ir.Node) -> None:
    """Rows as heads side by side, or heads as rows."""
    x, shape = p.place(node.inputs[0]), constant(node.inputs[1])
    if shape is None or len(shape) != 3 or shape[0] != 0 or shape[1] != -1 or x.n % int(shape[2]):
        raise NotNative("a Reshape that does not part rows into heads")
    p.places[node.outputs[0]] = replace(x, piece=int(shape[2]))


def _attend(p: Program, node: ir.Node) -> None:
    q, k, v, past, _, _, _, cos, sin, *rest = [*node.inputs, *[None] * 9][: max(9, len(node.inputs))]
    a = node.attributes
    heads, kv = a["num_heads"].as_int(), a["kv_num_heads"].as_int()
    turned = a["do_rotary"].as_int() if "do_rotary" in a else 0
    if any(value is not None for value in rest) or ("rotary_interleaved" in a and a["rotary_interleaved"].as_int()):
        raise NotNative("attention with interleaved positions, sinks or a bias")
    assert past is not None and past.name is not None
    row = p.place(q)
    if k is None:  # queries, keys and values in one row
        size = row.n // (heads + 2 * kv)
        assert q is not None
        values = [ir.Value(name=f"{q.name}/{part}") for part in "qkv"]
        for value, at, n in zip(values, (0, heads * size, (heads + kv) * size), (heads * size, kv * size, kv * size)):
            p.places[value] = Place(row.slot, row.offset + at, n, n)
        q, k, v = values
    else:
        size = row.n // heads
    if size % HEAD:
        raise NotNative(f"attention heads of {size} values")
    window = a["local_window_size"].as_int() if "local_window_size" in a else -1
    tables = [p.index(cos), p.index(sin)] if turned and cos is not None and sin is not None else [-1, -1]
    numbers = [a["scale"].as_float(), a["softcap"].as_float() if "softcap" in a else 0.0]
    # queries and keys are turned where they are: nobody else reads them
    p.emit(ATTEND, node.outputs[0], size, [q, k, v], [p.layers[past.name], heads, kv, *tables], numbers, repeat=max(window, 0), width=heads * size)


RULES: dict[tuple[str, str], Callable[[Program, ir.Node], None]] = {
    ("", "Gather"): _embed,
    ("", "Cast"): _same,
    ("", "SimplifiedLayerNormalization"): _norm,
    ("", "LayerNormalization"): _norm,
    (ORT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (ORT, "SkipLayerNormalization"): _skip_norm,
    (ORT, "MatMulNBits"): _linear,
    ("", "Add"): _add,
    ("", "Mul"): _multiply,
    ("", "Sigmoid"): _sigmoid,
    ("", "Gelu"): _gelu,
    ("", "Split"): _split,
    ("", "Reshape"): _reshape,
    (ORT, "GroupQueryAttention"): _attend,
}
