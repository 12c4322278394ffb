"""A decoder program on a GPU: where everything lies, and which launches its nodes, its head and the end of a step are. See docs/cuda.md.

Everything lies in one range of device memory: weights, cache, activations, what the head leaves. The values of the nodes share a few places, as their lives
allow. Nothing here waits or copies, so that a graph can capture it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson import cuda_library as native
from flashhead_edge.jetson.cuda_kernels import Readied
from flashhead_edge.jetson.cuda_library import AttentionShape, DeviceLimits, attention_plan, launch
from flashhead_edge.jetson.cuda_memory import Mailbox, Range, laid_out
from flashhead_edge.jetson.driver import Device, DeviceFacts, Graph, Pinned, Stream
from flashhead_edge.kernels.packing import Arguments, DecodeArguments, Layout, Widen, layout_of
from flashhead_edge.program import fuse
from flashhead_edge.program.nodes import Attention, Node, Stored

SLOTS = 64  # of the mailbox: more than steps that the host leaves unread
DRY = 1 << 40  # where memory is said to begin while nothing is launched
SETTINGS: dict[str, type] = {  # what a step reads of each row
    "ids": np.int32, "lengths": np.int32, "step": np.int32, "temperature": np.float32, "top_p": np.float32, "min_p": np.float32, "top_k": np.int32,
    "seed": np.uint64,
}  # fmt: skip


class Program(Protocol):
    """A decoder as nodes, the head's last, and its file of weights (`flashhead_edge.program`)."""

    @property
    def nodes(self) -> Sequence[Node]: ...

    @property
    def constants(self) -> Mapping[str, str]:
        """Values that are tensors of the file, by name."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Columns of each value."""
        ...

    @property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """Byte offset and byte length of each tensor of the file."""
        ...

    @property
    def weights(self) -> Path:
        """The file."""
        ...

    @property
    def precision(self) -> str: ...

    @property
    def context(self) -> int: ...

    @property
    def batch(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Head:
    """The head's node, taken apart."""

    node: Node
    plans: tuple[Layout, ...]  # of 1, 2, ... rows
    vocab: int
    hidden: int
    candidates: int
    counted: int  # numbers of a row
    scale: float
    softcap: float

    @property
    def rows(self) -> int:
        """States that it takes at once."""
        return len(self.plans)

    @property
    def scales(self) -> bool:
        """Whether a draw reads other logits than the step writes."""
        return self.scale != 1 or self.softcap != 0


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """Where everything lies, in bytes from the start of the range."""

    weights: Mapping[str, int]
    blocks: Mapping[str, int]  # caches (cache.LAYER.key), settings, results and scratch
    values: Mapping[str, int]  # of nodes; those that do not live together may share bytes
    weight_bytes: int  # which come first
    cache_bytes: int
    exchange_bytes: int  # where rows of the cache change places; 0: there is one
    size: int


@dataclass(frozen=True)
class Run:
    """What a pass over the nodes computes."""

    rows: int  # texts
    queries: int  # tokens of each
    first: int  # the cache's row of the first text
    ids: int  # addresses: int32 [rows, queries]
    lengths: int  # int32 [rows]

    @property
    def tokens(self) -> int:
        return self.rows * self.queries


@dataclass(eq=False)
class Model:
    """A program on the device. Used from one thread at a time; `close` frees everything."""

    program: Program
    head: Head
    facts: DeviceFacts
    limits: DeviceLimits
    plan: MemoryPlan
    chunk: int
    fuses: bool = True  # whether steps run fused nodes, where they take their rows
    cut: int = 0  # texts that a step's attention is cut for; 0: as many as the program has rows, so that a row's bits are the same beside any others
    base: int = DRY  # address of the range
    stream_handle: int = 0
    mail_address: int = DRY
    device: Device | None = None
    stream: Stream | None = None
    memory: Range | None = None
    mail: Mailbox | None = None
    settings: Pinned | None = None
    prompts: Pinned | None = None
    results: Pinned | None = None
    graphs: dict[tuple[int, bool], Graph] = field(default_factory=dict)  # of steps
    drafts: dict[int, Graph] = field(default_factory=dict)  # of several tokens of a text, by their number
    captures: int = 0
    number: int = 0  # steps that were put into the stream
    readied: Readied | None = None

    def weight(self, stored: Any) -> int | None:
        """Address of a tensor of the file; None where a node has none."""
        assert isinstance(stored, Stored)
        return self.base + self.plan.weights[stored.name] if stored.name else None

    def block(self, name: str, offset: int = 0) -> int:
        return self.base + self.plan.blocks[name] + offset

    def value(self, name: str) -> int:
        """Address of what a node reads or writes."""
        if name in self.program.constants:
            return self.base + self.plan.weights[self.program.constants[name]]
        return self.base + self.plan.values[name]

    def put(self, function: str, *arguments: Any) -> None:
        launch(function, *arguments, device=self.limits, stream=self.stream_handle)

    @property
    def dtype(self) -> int:
        return native.BF16 if self.program.precision == "bfloat16" else native.FP16

    def close(self) -> None:
        """Free graphs, memory, stream and context; harmless when called twice."""
        if self.device is None or not self.device.open:
            return
        self.device.use()
        if self.stream is not None:
            self.stream.finish()
        for graph in (*self.graphs.values(), *self.drafts.values()):
            graph.close()
        self.graphs.clear()
        self.drafts.clear()
        for held in (self.memory, self.mail, self.settings, self.prompts, self.results, self.stream, self.device):
            if held is not None:
                held.close()


# ---- what is where


def head_of(program: Program) -> Head:
    """The head's node.

    Raises:
        EngineError: the last node is none.
    """
    node = program.nodes[-1]
    if node.op != "FlashHead":
        raise EngineError(f"{node.name}: the last node is {node.op}, expected FlashHead; write the program again")
    a: Mapping[str, Any] = node.attributes
    words, each = a["plans"], int(a["plan_words"])
    if each * 4 != ctypes.sizeof(Layout) or len(words) != each * int(a["max_rows"]):
        raise EngineError(f"{node.name}: {len(words)} words of plans, {each} each, expected {ctypes.sizeof(Layout) // 4} for each row; write the program again")
    plans = tuple(layout_of(list(words[i : i + each])) for i in range(0, len(words), each))
    return Head(
        node, plans, int(a["vocab"]), int(a["hidden"]), int(a["candidates"]), 2 + int(a["stages"]), float(a["logit_scale"]), float(a["softcap"])
    )  # fmt: skip


def attentions_of(program: Program) -> list[Attention]:
    """What the attentions do, in the order of their caches."""
    nodes = [n for n in program.nodes if n.op == "DecodeAttention"]
    return [Attention(*(n.attributes[k] for k in ("q_heads", "kv_heads", "head_size", "window", "scale"))) for n in nodes]  # type: ignore[arg-type]


def attention_shape(program: Program, a: Attention, rows: int, queries: int, dtype: int) -> AttentionShape:
    return AttentionShape(rows, queries, a.q_heads, a.kv_heads, a.head_size, program.context, a.window, a.scale, dtype)


def row_bytes(program: Program, a: Attention) -> int:
    """Of a text's keys, or of its values, in one layer's cache."""
    return 2 * a.kv_heads * program.context * a.head_size


def value_sizes(program: Program, tokens: int) -> dict[str, int]:
    """Bytes of each value that a node writes into memory of its own."""
    return {
        name: 2 * tokens * program.widths[name] for node in program.nodes[:-1] for name in node.outputs if not name.startswith("present.")
    }  # fmt: skip


def placed_values(program: Program, tokens: int) -> tuple[dict[str, int], int]:
    """Where values lie, and how many bytes that takes: a value's place is free again behind its last reader. The head's state stays.

    A fused node reads its inputs until it has written its outputs, so that these live as long.
    """
    sizes = {name: -(-size // 256) * 256 for name, size in value_sizes(program, tokens).items()}
    last = {name: at for at, node in enumerate(program.nodes) for name in (*node.outputs, *node.inputs)}
    last |= {name: max(last.get(name, 0), step.last) for step in fuse.fused(program.nodes) for name in step.node.inputs}
    last[program.nodes[-1].inputs[0]] = len(program.nodes)
    found: dict[str, int] = {}
    living: dict[str, tuple[int, int]] = {}  # name: start, end
    most = 0
    for at, node in enumerate(program.nodes[:-1]):
        for name in node.outputs:
            if name not in sizes:
                continue
            start = 0
            for begin, end in sorted(living.values()):
                if begin - start >= sizes[name]:
                    break
                start = max(start, end)
            found[name] = start
            living[name] = start, start + sizes[name]
            most = max(most, start + sizes[name])
        living = {name: extent for name, extent in living.items() if last[name] > at}
    return found, most


def memory_plan(program: Program, head: Head, limits: DeviceLimits, chunk: int, dtype: int) -> MemoryPlan:
    """Lay out the range.

    Raises:
        EngineError: a kernel does not take an attention's shape.
    """
    rows, states, tokens = program.batch, head.rows, max(chunk, program.batch, head.rows)
    attentions = attentions_of(program)
    partials, items = 0, 1
    for a in set(attentions):
        shapes = [attention_shape(program, a, n, 1, dtype) for n in range(1, rows + 1)]
        shapes += [attention_shape(program, a, 1, n, dtype) for n in range(1, min(chunk, program.context) + 1)]
        for shape in shapes:
            plan = attention_plan(shape, limits)
            partials, items = max(partials, plan.workspace_bytes), max(items, plan.items)
    weights, weight_bytes = laid_out({name: size for name, (_, size) in program.places.items()})
    caches = {f"cache.{i}.{part}": rows * row_bytes(program, a) for i, a in enumerate(attentions) for part in ("key", "value")}
    exchange = max((row_bytes(program, a) for a in attentions), default=0) if rows > 1 else 0
    kept = {name: rows * np.dtype(dtype_).itemsize for name, dtype_ in SETTINGS.items()} | {"number": 4}
    read = {"prompt": 4 * program.context, "prompt_lengths": 4 * (-(-program.context // chunk) + 1)}
    written = {
        "token": 8 * states, "counts": 8 * states * head.counted, "capped": states, "logprob": 4 * states,
        "candidate_ids": 8 * states * head.candidates, "candidate_logits": 4 * states * head.candidates,
    }  # fmt: skip
    scratch = {f"wide_{name}": 8 * rows for name in ("temperature", "top_p", "min_p", "top_k", "step")} | {"best_ids": 8 * rows, "best_logprobs": 4 * rows}
    if head.scales:
        scratch["final_logits"] = 4 * rows * head.candidates
    scratch |= {"states": 2 * states * head.hidden, "head": states * head.plans[0].row_bytes, "arrivals": 4 * items, "partials": partials}
    scratch["queries"] = 2 * tokens * max((a.q_heads * a.head_size for a in attentions), default=0)
    scratch["exchange"] = exchange
    blocks, after = laid_out(kept | read | written | scratch | caches, weight_bytes)
    values, size = placed_values(program, tokens)
    return MemoryPlan(weights, blocks, {name: after + at for name, at in values.items()}, weight_bytes, sum(caches.values()), exchange, after + size)


# ---- launches: each kind of node


def _embedding(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    m.put("fh_embedding", run.ids, m.weight(a["rows"]), a["scale"], m.value(node.outputs[0]), run.tokens, a["vocab"], a["d"], m.dtype)


def _norm(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    residual, total = (m.value(node.inputs[1]), m.value(node.outputs[1])) if len(node.inputs) == 2 else (None, None)
    y = m.value(node.outputs[0])
    m.put("fh_rms_norm", m.value(node.inputs[0]), residual, total, m.weight(a["weight"]), a["offset"], a["epsilon"], y, run.tokens, a["d"], m.dtype)


def weight_of(m: Model, node: Node) -> native.Linear:
    """A product's matrix."""
    a: Mapping[str, Any] = node.attributes
    return native.Linear(m.weight(a["codes"]), m.weight(a["scales"]), m.weight(a["zeros"]), a["n"], a["k"], a["group"], m.dtype)


def _linear(m: Model, node: Node, run: Run) -> None:
    m.put("fh_w4a16_linear", weight_of(m, node), m.value(node.inputs[0]), m.value(node.outputs[0]), run.tokens)


def _gated(m: Model, node: Node, run: Run) -> None:
    y, width = node.outputs[0], m.program.widths[node.outputs[0]]
    m.put("fh_gated_product", m.value(node.inputs[0]), m.value(y), run.tokens, width, node.attributes["activation"], m.dtype)


def attention_arguments(m: Model, node: Node, run: Run) -> tuple[AttentionShape, native.AttentionPlan, int, int]:
    """Shape and plan of an attention's launch, and the addresses of its keys and values. A step's plan is that of all rows, whichever of them it takes."""
    a: Mapping[str, Any] = node.attributes
    which = Attention(a["q_heads"], a["kv_heads"], a["head_size"], a["window"], a["scale"])
    shape = attention_shape(m.program, which, run.rows, run.queries, m.dtype)
    planned = shape if run.queries > 1 else attention_shape(m.program, which, m.cut or m.program.batch, 1, m.dtype)
    layer = node.inputs[1].split(".")[1]
    row = row_bytes(m.program, which)
    key, value = (m.block(f"cache.{layer}.{part}", run.first * row) for part in ("key", "value"))
    return shape, attention_plan(planned, m.limits), key, value


def _attention(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    shape, plan, key, value = attention_arguments(m, node, run)
    q, norms = m.block("queries"), (m.weight(a["q_norm"]), m.weight(a["k_norm"]))
    m.put(
        "fh_attention_rope_write", shape, m.value(node.inputs[0]), m.weight(a["rotations"]), *norms, a["norm_offset"], a["epsilon"], run.lengths, q, key, value
    )
    m.put("fh_attention_decode", shape, plan, q, key, value, run.lengths, m.value(node.outputs[0]), m.block("partials"), m.block("arrivals"))


def _combine(m: Model, node: Node, run: Run) -> None:
    x, other = node.inputs
    y, width = node.outputs[0], m.program.widths[node.outputs[0]]
    constant = other in m.program.constants
    columns = m.program.places[m.program.constants[other]][1] // 2 if constant else m.program.widths[other]
    if columns != width:
        raise EngineError(f"{node.name}: {columns} values beside {width} columns, expected one for each; write the program again")
    combination = native.ADD if node.op == "Add" else native.MULTIPLY
    m.put("fh_combine", m.value(x), m.value(other), int(constant), combination, m.value(y), run.tokens, width, m.dtype)


def _fused_linear(m: Model, node: Node, run: Run) -> None:
    x, residual = node.inputs
    y, total = node.outputs
    weight, fusion = fused_arguments(m, node)
    if residual:
        fusion.residual, fusion.sum = m.value(residual), m.value(total)
    m.put("fh_w4a16_fused", weight, fusion, m.value(x), m.value(y), run.tokens)


def fused_arguments(m: Model, node: Node) -> tuple[native.Linear, native.Fusion]:
    """A fused product's structures, without its activations."""
    a: Mapping[str, Any] = node.attributes
    return weight_of(m, node), native.Fusion(None, None, m.weight(a["first_norm"]), m.weight(a["norm"]), a["offset"], a["epsilon"], a["gated"], a["activation"])


def _rope_attention(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    shape, plan, key, value = attention_arguments(m, node, run)
    fusion = native.AttentionFusion(
        m.value(node.inputs[0]), m.weight(a["rotations"]), m.weight(a["q_norm"]), m.weight(a["k_norm"]), a["norm_offset"], a["epsilon"]
    )  # fmt: skip
    out = m.value(node.outputs[0])
    m.put("fh_attention_rope_decode", shape, plan, fusion, key, value, run.lengths, out, m.block("partials"), m.block("arrivals"))


OPERATORS: dict[str, Callable[[Model, Node, Run], None]] = {
    "TokenEmbedding": _embedding, "RmsNorm": _norm, "W4A16Linear": _linear, "GatedProduct": _gated, "DecodeAttention": _attention, "Add": _combine,
    "Mul": _combine,
    fuse.LINEAR: _fused_linear, fuse.ATTENTION: _rope_attention,
}  # fmt: skip


def put_body(m: Model, run: Run, nodes: Sequence[Node] | None = None) -> None:
    """The nodes before the head."""
    for node in m.program.nodes[:-1] if nodes is None else nodes:
        OPERATORS[node.op](m, node, run)


# ---- launches: the head, the draw, the end of a step


def put_head(m: Model, hidden: int, rows: int, first: int, wide: int | None = None) -> None:
    """The head's step for states that lie one behind the other; with `wide`, an address of [rows, vocab] float32, full-width logits too."""
    h, a = m.head, m.head.node.attributes
    logits, ids = m.block("candidate_logits", 4 * first * h.candidates), m.block("candidate_ids", 8 * first * h.candidates)
    counts, image, work = m.block("counts", 8 * first * h.counted), m.weight(a["image"]), m.block("head")
    layout, bf16 = h.plans[rows - 1], int(m.dtype == native.BF16)
    step = Arguments(
        hidden, m.weight(a["rows"]), m.weight(a["bias"]), image, work, m.block("token", 8 * first), counts, m.block("capped", first), ids, logits, wide, None,
        rows, bf16, bf16, h.vocab, layout,
    )  # fmt: skip
    m.put("fh_head_step", step)
    if wide is not None:
        m.put("fh_head_widen", Widen(
            ids, logits, counts, image, work, wide, rows, h.vocab, h.vocab, h.candidates, h.counted,
            layout.cluster_of_at, layout.row_bytes, layout.row_scores, layout.row_opened, layout.tail_scale, layout.tail_offset,
        ))  # fmt: skip


def dense_states(m: Model) -> int:
    """States of which a launch gives all logits: as many as its shared memory takes."""
    return max(1, min(native.DENSE_STATES, m.limits.shared_bytes // (4 * m.head.hidden + 128)))


def put_dense(m: Model, hidden: int, states: int, logits: int) -> None:
    """All logits [states, vocab] float32 of some states by the model's own rows, to an address."""
    h, a = m.head, m.head.node.attributes
    m.put("fh_dense_rows", m.weight(a["rows"]), m.weight(a["bias"]), hidden, logits, states, h.hidden, h.vocab, m.dtype)


def put_draw(m: Model, rows: int, first: int) -> None:
    """A token from a step's candidates by each row's settings."""
    h = m.head

    def at(name: str, size: int) -> int:
        return m.block(name, first * size)

    logits, count = at("candidate_logits", 4 * h.candidates), at("counts", 8 * h.counted) + 8 * (h.counted - 1)
    final = at("final_logits", 4 * h.candidates) if h.scales else None
    wide = [at(f"wide_{name}", 8) for name in ("temperature", "top_p", "min_p", "top_k", "step")]
    m.put("fh_draw_settings", native.DrawSettings(
        *(at(name, 4) for name in ("temperature", "top_p", "min_p", "top_k", "step")), *wide, logits if h.scales else None, count, final,
        h.scale, h.softcap, rows, h.candidates, h.counted,
    ))  # fmt: skip
    m.put("fh_decode", DecodeArguments(
        at("candidate_ids", 8 * h.candidates), final if h.scales else logits, count, *wide[:4], at("seed", 8), wide[4],
        at("token", 8), at("logprob", 4), at("best_ids", 8), at("best_logprobs", 4), rows, h.candidates, h.counted, 1,
    ))  # fmt: skip


def put_advance(m: Model, rows: int, first: int, drawn: bool) -> None:
    """The end of a step: the next one's tokens and lengths, and the results' way to the host."""
    h = m.head
    m.put("fh_advance", native.Advance(
        m.block("token", 8 * first), m.block("counts", 8 * first * h.counted), m.block("capped", first), m.block("logprob", 4 * first) if drawn else None,
        m.block("ids", 4 * first), m.block("lengths", 4 * first), m.block("step", 4 * first), m.block("number"), m.mail_address,
        rows, h.counted, SLOTS, slot_words(m),
    ))  # fmt: skip


def step_nodes(m: Model, rows: int) -> tuple[Node, ...]:
    """The nodes before the head that a step of some rows runs: fused where all of them fit the device."""
    plain = tuple(m.program.nodes[:-1])
    if not m.fuses or rows > fuse.MOST_ROWS:
        return plain
    nodes = tuple(step.node for step in fuse.fused(plain))
    fits = all(native.fused_shared_bytes(*fused_arguments(m, n), rows, m.limits) <= m.limits.shared_bytes for n in nodes if n.op == fuse.LINEAR)
    return nodes if fits else plain


def put_step(m: Model, rows: int, drawn: bool, without: Collection[str] = ()) -> None:
    """A decode step of the first rows. A measurement leaves kinds of nodes out: `without` their names; Draw and Advance are two."""
    run = Run(rows, 1, 0, m.block("ids"), m.block("lengths"))
    put_body(m, run, [n for n in step_nodes(m, rows) if n.op not in without])
    if "FlashHead" not in without:
        put_head(m, m.value(m.head.node.inputs[0]), rows, 0)
    if drawn and "Draw" not in without:
        put_draw(m, rows, 0)
    if "Advance" not in without:
        put_advance(m, rows, 0, drawn)


def put_draft(m: Model, tokens: int) -> None:
    """Some tokens of row 0, at most as many as the head takes states, which block `prompt` holds: their states, and the head's step of each."""
    put_body(m, Run(1, tokens, 0, m.block("prompt"), m.block("prompt_lengths")), step_nodes(m, tokens))
    put_head(m, m.value(m.head.node.inputs[0]), tokens, 0)


def slot_words(m: Model) -> int:
    return -(-(native.MAIL_HEAD + m.program.batch * (native.MAIL_ROW + m.head.counted)) // 16) * 16


def dry_pass(m: Model) -> None:
    """Every launch that the model can make, once for each shape."""
    for rows in range(1, m.program.batch + 1):
        put_body(m, Run(rows, 1, 0, DRY, DRY), _kinds(m, step_nodes(m, rows)))
        put_draw(m, rows, 0)
        put_advance(m, rows, 0, True)
    for rows in range(1, m.head.rows + 1):
        put_head(m, DRY, rows, 0, DRY)
        put_body(m, Run(1, rows, 0, DRY, DRY), _kinds(m, step_nodes(m, rows)))
    for states in range(1, dense_states(m) + 1):
        put_dense(m, DRY, states, DRY)
    kinds = _kinds(m, m.program.nodes[:-1])
    for queries in range(1, min(m.chunk, m.program.context) + 1):
        put_body(m, Run(1, queries, 0, DRY, DRY), kinds)


def _kinds(m: Model, nodes: Sequence[Node]) -> list[Node]:
    """Of nodes that launch alike the first."""
    kinds: dict[Any, Node] = {}
    for node in nodes:
        said = tuple((k, bool(v.name) if isinstance(v, Stored) else v) for k, v in node.attributes.items())
        kinds.setdefault((node.op, said, tuple(map(bool, node.inputs)), m.program.widths.get(node.outputs[0])), node)
    return list(kinds.values())
