"""A decoder program on a GPU: its memory, its launches, and the graph of a decode step from token to token. See docs/cuda.md.

Everything lies in one range of device memory: weights, cache, activations, what the head leaves. The values of the nodes share a few places, as their lives
allow. A step reads its tokens, lengths and draw settings on the device, and leaves them there for the next: the host only launches graphs, and reads results
from a mailbox of pinned memory while the next step runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashhead_edge.errors import DeviceError, EngineError
from flashhead_edge.jetson import cuda_library as native
from flashhead_edge.jetson.cuda_kernels import Readied, ready
from flashhead_edge.jetson.cuda_library import AttentionShape, DeviceLimits, attention_plan, launch
from flashhead_edge.jetson.cuda_memory import Mailbox, Range, fill, laid_out
from flashhead_edge.jetson.driver import Device, DeviceFacts, Graph, Pinned, Stream, device_facts
from flashhead_edge.kernels.packing import Arguments, DecodeArguments, Layout, Widen, layout_of
from flashhead_edge.program.nodes import PLAIN, Attention, Node, Stored
from flashhead_edge.progress import Progress, silent

CHUNK = 256  # tokens of a prompt that are read together
SLOTS = 64  # of the mailbox: more than steps that the host leaves unread
DRY = 1 << 40  # where memory is said to begin while nothing is launched
SETTINGS: dict[str, type] = {  # what a step reads of each row
    "ids": np.int32, "lengths": np.int32, "step": np.int32, "temperature": np.float32, "top_p": np.float32, "min_p": np.float32, "top_k": np.int32,
    "seed": np.uint64,
}  # fmt: skip
WAIT_SECONDS = 2.0  # for a step's results, before the stream is asked what is wrong


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
    graphs: dict[tuple[int, bool], Graph] = field(default_factory=dict)
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
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
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


def value_sizes(program: Program, tokens: int) -> dict[str, int]:
    """Bytes of each value that a node writes into memory of its own."""
    return {
        name: 2 * tokens * program.widths[name] for node in program.nodes[:-1] for name in node.outputs if not name.startswith("present.")
    }  # fmt: skip


def placed_values(program: Program, tokens: int) -> tuple[dict[str, int], int]:
    """Where values lie, and how many bytes that takes: a value's place is free again behind its last reader. The head's state stays."""
    sizes = {name: -(-size // 256) * 256 for name, size in value_sizes(program, tokens).items()}
    last = {name: at for at, node in enumerate(program.nodes) for name in (*node.outputs, *node.inputs)}
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
    rows, tokens = program.batch, max(chunk, program.batch)
    attentions = attentions_of(program)
    partials, items = 0, 1
    for a in set(attentions):
        shapes = [attention_shape(program, a, n, 1, dtype) for n in range(1, rows + 1)]
        shapes += [attention_shape(program, a, 1, n, dtype) for n in range(1, min(chunk, program.context) + 1)]
        for shape in shapes:
            plan = attention_plan(shape, limits)
            partials, items = max(partials, plan.workspace_bytes), max(items, plan.items)
    weights, weight_bytes = laid_out({name: size for name, (_, size) in program.places.items()})
    caches = {f"cache.{i}.{part}": 2 * rows * a.kv_heads * program.context * a.head_size for i, a in enumerate(attentions) for part in ("key", "value")}
    kept = {name: rows * np.dtype(dtype_).itemsize for name, dtype_ in SETTINGS.items()} | {"number": 4}
    read = {"prompt": 4 * program.context, "prompt_lengths": 4 * (-(-program.context // chunk) + 1)}
    written = {
        "token": 8 * rows, "counts": 8 * rows * head.counted, "capped": rows, "logprob": 4 * rows,
        "candidate_ids": 8 * rows * head.candidates, "candidate_logits": 4 * rows * head.candidates,
    }  # fmt: skip
    scratch = {f"wide_{name}": 8 * rows for name in ("temperature", "top_p", "min_p", "top_k", "step")} | {"best_ids": 8 * rows, "best_logprobs": 4 * rows}
    if head.scales:
        scratch["final_logits"] = 4 * rows * head.candidates
    scratch |= {"states": 2 * rows * head.hidden, "head": rows * head.plans[0].row_bytes, "arrivals": 4 * items, "partials": partials}
    scratch["queries"] = 2 * tokens * max((a.q_heads * a.head_size for a in attentions), default=0)
    blocks, after = laid_out(kept | read | written | scratch | caches, weight_bytes)
    values, size = placed_values(program, tokens)
    return MemoryPlan(weights, blocks, {name: after + at for name, at in values.items()}, weight_bytes, sum(caches.values()), after + size)


# ---- launches: each kind of node


def _embedding(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    m.put("fh_embedding", run.ids, m.weight(a["rows"]), a["scale"], m.value(node.outputs[0]), run.tokens, a["vocab"], a["d"], m.dtype)


def _norm(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    residual, total = (m.value(node.inputs[1]), m.value(node.outputs[1])) if len(node.inputs) == 2 else (None, None)
    y = m.value(node.outputs[0])
    m.put("fh_rms_norm", m.value(node.inputs[0]), residual, total, m.weight(a["weight"]), a["offset"], a["epsilon"], y, run.tokens, a["d"], m.dtype)


def _linear(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    weight = native.Linear(m.weight(a["codes"]), m.weight(a["scales"]), m.weight(a["zeros"]), a["n"], a["k"], a["group"], m.dtype)
    m.put("fh_w4a16_linear", weight, m.value(node.inputs[0]), m.value(node.outputs[0]), run.tokens)


def _gated(m: Model, node: Node, run: Run) -> None:
    y, width = node.outputs[0], m.program.widths[node.outputs[0]]
    m.put("fh_gated_product", m.value(node.inputs[0]), m.value(y), run.tokens, width, node.attributes["activation"], m.dtype)


def _attention(m: Model, node: Node, run: Run) -> None:
    a: Mapping[str, Any] = node.attributes
    which = Attention(a["q_heads"], a["kv_heads"], a["head_size"], a["window"], a["scale"])
    shape = attention_shape(m.program, which, run.rows, run.queries, m.dtype)
    plan = attention_plan(shape, m.limits)
    layer = node.inputs[1].split(".")[1]
    row = 2 * which.kv_heads * m.program.context * which.head_size
    key, value = (m.block(f"cache.{layer}.{part}", run.first * row) for part in ("key", "value"))
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


OPERATORS: dict[str, Callable[[Model, Node, Run], None]] = {
    "TokenEmbedding": _embedding, "RmsNorm": _norm, "W4A16Linear": _linear, "GatedProduct": _gated, "DecodeAttention": _attention, "Add": _combine,
    "Mul": _combine,
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


def put_step(m: Model, rows: int, drawn: bool, without: Collection[str] = ()) -> None:
    """A decode step of the first rows. A measurement leaves kinds of nodes out: `without` their names; Draw and Advance are two."""
    run = Run(rows, 1, 0, m.block("ids"), m.block("lengths"))
    put_body(m, run, [n for n in m.program.nodes[:-1] if n.op not in without])
    if "FlashHead" not in without:
        put_head(m, m.value(m.head.node.inputs[0]), rows, 0)
    if drawn and "Draw" not in without:
        put_draw(m, rows, 0)
    if "Advance" not in without:
        put_advance(m, rows, 0, drawn)


def slot_words(m: Model) -> int:
    return -(-(native.MAIL_HEAD + m.program.batch * (native.MAIL_ROW + m.head.counted)) // 16) * 16


def dry_pass(m: Model) -> None:
    """Every launch that the model can make, once for each shape."""
    kinds: dict[Any, Node] = {}
    for node in m.program.nodes[:-1]:
        said = tuple((k, bool(v.name) if isinstance(v, Stored) else v) for k, v in node.attributes.items())
        kinds.setdefault((node.op, said, len(node.inputs), m.program.widths.get(node.outputs[0])), node)
    for rows in range(1, m.program.batch + 1):
        put_body(m, Run(rows, 1, 0, DRY, DRY), list(kinds.values()))
        put_head(m, DRY, rows, 0, DRY)
        put_draw(m, rows, 0)
        put_advance(m, rows, 0, True)
    for queries in range(2, min(m.chunk, m.program.context) + 1):
        put_body(m, Run(1, queries, 0, DRY, DRY), list(kinds.values()))


# ---- opening


def check_program(program: Program, head: Head, facts: DeviceFacts) -> None:
    """Whether this GPU can run the program.

    Raises:
        EngineError: the head was planned for another GPU, or a node has no kernel here.
    """
    if facts.capability < 80:
        raise EngineError(f"{facts.name}: capability {facts.capability / 10}, expected 8.0 or more, which the kernels are for; use the onnxruntime backend")
    plan, shared = head.plans[0], max(p.shared_bytes for p in head.plans)
    if plan.multiprocessors != facts.multiprocessors or shared > facts.shared_bytes:
        raise EngineError(
            f"{program.weights.parent}: the head is planned for {plan.multiprocessors} multiprocessors and {shared:,} bytes of shared memory a block, this GPU "
            f"has {facts.multiprocessors} and {facts.shared_bytes:,}; write the program on this machine"
        )
    unknown = sorted({n.op for n in program.nodes[:-1] if n.op not in OPERATORS or (n.domain == PLAIN) != (n.op in ("Add", "Mul"))})
    if unknown:
        raise EngineError(f"{program.weights.parent}: nodes of kind {', '.join(unknown)}, expected {', '.join(OPERATORS)}; write the program again")
    if len(head.plans) < program.batch or program.batch > native.MOST_ROWS:
        raise EngineError(f"{program.weights.parent}: {program.batch} texts at once, expected 1 to {len(head.plans)}; write the program again")


def open_model(
    program: Program, *, chunk: int = CHUNK, stream: int | None = None, overlap: bool | None = None, progress: Progress = silent
) -> Model:  # fmt: skip
    """Put a program on this machine's GPU, its kernels compiled where the cache has none.

    Args:
        chunk: tokens of a prompt that are read together.
        stream: the handle of a stream to work in, such as pycuda's; None: one of its own.
        overlap: whether launches begin while the one before them ends; None: where the GPU can.
    Raises:
        DeviceError: no GPU, or too little memory; nothing stays allocated.
        EngineError: the program is another GPU's, or a kernel does not compile.
    """
    facts, head = device_facts(), head_of(program)
    check_program(program, head, facts)
    limits = native.limits_of(facts, overlap=overlap)
    chunk = min(chunk, program.context)
    dtype = native.BF16 if program.precision == "bfloat16" else native.FP16
    m = Model(program, head, facts, limits, memory_plan(program, head, limits, chunk, dtype), chunk)
    m.readied = ready(lambda: dry_pass(m), facts, progress)
    m.device = Device()
    try:
        m.stream = Stream(stream)
        m.stream_handle = m.stream.handle
        m.memory = Range(m.device, m.plan.size)
        m.base = m.memory.pointer
        m.stream.fill(m.base + m.plan.weight_bytes, m.plan.size - m.plan.weight_bytes)
        progress("weights to the GPU", None)
        fill(m.stream, {name: m.base + at for name, at in m.plan.weights.items()}, program.weights, program.places)
        m.mail = Mailbox(4 * SLOTS * slot_words(m))
        m.mail_address = m.mail.device
        m.settings = Pinned(settings_bytes(m))
        m.prompts = Pinned(4 * program.batch * (program.context + -(-program.context // chunk) + 1))
        m.results = Pinned(results_extent(m)[1] + 2 * head.hidden * program.batch)
        setting(m, "top_p")[:] = 1
        send_settings(m)
        m.stream.wait()
    except BaseException:
        m.close()
        raise
    return m


# ---- the host's side of settings, prompts and results


def settings_bytes(m: Model) -> int:
    """Of the block of settings, which begins with the first of `SETTINGS`."""
    return m.plan.blocks["number"] - m.plan.blocks["ids"]


def setting(m: Model, name: str) -> np.ndarray:
    """The host's side of a setting, [batch]; `send_settings` takes it to the device."""
    assert m.settings is not None
    start = m.plan.blocks[name] - m.plan.blocks["ids"]
    dtype = np.dtype(SETTINGS[name])
    return m.settings.array[start : start + m.program.batch * dtype.itemsize].view(dtype)


def send_settings(m: Model) -> None:
    """The whole block to the device. The host's side may change again once the stream has come so far."""
    assert m.stream is not None and m.settings is not None
    m.stream.to_device(m.block("ids"), m.settings.pointer, settings_bytes(m))


def put_prompt(m: Model, ids: Sequence[int], length: int, row: int) -> int:
    """Tokens of a row after `length` positions, in chunks: the address of the last one's state. The row's pinned ids must be free."""
    assert m.stream is not None and m.prompts is not None
    n, room = len(ids), m.program.context
    chunks = -(-room // m.chunk) + 1
    words = m.prompts.array.view(np.int32)[row * (room + chunks) : (row + 1) * (room + chunks)]
    words[:n] = ids
    ends = [length + min(at + m.chunk, n) for at in range(0, n, m.chunk)]
    words[room : room + len(ends)] = ends
    pinned = m.prompts.pointer + 4 * row * (room + chunks)
    m.stream.to_device(m.block("prompt"), pinned, 4 * n)
    m.stream.to_device(m.block("prompt_lengths"), pinned + 4 * room, 4 * len(ends))
    for i in range(len(ends)):
        queries = min(m.chunk, n - i * m.chunk)
        put_body(m, Run(1, queries, row, m.block("prompt", 4 * i * m.chunk), m.block("prompt_lengths", 4 * i)))
    return m.value(m.head.node.inputs[0]) + 2 * m.head.hidden * (queries - 1)


def step_graph(m: Model, rows: int, drawn: bool) -> Graph:
    """The decode step of the first rows. When it is made its first run writes into the cache: no text may be in it."""
    key = rows, drawn
    if key not in m.graphs:
        assert m.stream is not None
        put_step(m, rows, drawn)  # once outside of a graph: what is done at a first run is no part of it
        m.number += 1
        m.stream.wait()
        with m.stream.captured() as graph:
            put_step(m, rows, drawn)
        m.captures += 1
        m.graphs[key] = graph
    return m.graphs[key]


def take_number(m: Model) -> None:
    """Ask the device how many steps it has made: a measurement replays graphs without counting."""
    assert m.stream is not None and m.results is not None
    m.stream.to_host(m.results.pointer, m.block("number"), 4)
    m.stream.wait()
    m.number = int(m.results.array[:4].view(np.uint32)[0])


def launch_step(m: Model, graph: Graph) -> int:
    """Put a step into the stream: its number in the mailbox."""
    assert m.stream is not None
    graph.launch(m.stream)
    m.number += 1
    return m.number


@dataclass(frozen=True, eq=False)
class Mail:
    """What a step says of itself, a row each."""

    token: np.ndarray  # int32
    capped: np.ndarray  # uint32, 0 or 1
    logprob: np.ndarray  # float32; 0 where the token was not drawn
    counts: np.ndarray  # [rows, 2 + stages] int32


def read_mail(m: Model, number: int, rows: int) -> Mail:
    """Wait for a step and read its results.

    Raises:
        DeviceError: the GPU has stopped.
    """
    assert m.stream is not None and m.mail is not None
    start = (number % SLOTS) * slot_words(m)
    while not native.library().fh_wait(m.mail.pointer + 4 * start, number % 2**32, WAIT_SECONDS):
        if m.stream.done() and not native.library().fh_wait(m.mail.pointer + 4 * start, number % 2**32, 0.1):
            raise DeviceError(
                f"GPU: step {number} is done and its results did not arrive, expected them in pinned memory; report this with the driver's version"
            )
    width = native.MAIL_ROW + m.head.counted
    first = start + native.MAIL_HEAD
    words = m.mail.array.view(np.uint32)[first : first + rows * width].copy().reshape(rows, width)
    return Mail(words[:, 0].view(np.int32), words[:, 1], words[:, 2].copy().view(np.float32), words[:, native.MAIL_ROW :].view(np.int32))


RESULTS: tuple[tuple[str, type], ...] = (
    ("token", np.int64), ("counts", np.int64), ("capped", np.uint8), ("logprob", np.float32), ("candidate_ids", np.int64), ("candidate_logits", np.float32),
)  # fmt: skip


def results_extent(m: Model) -> tuple[int, int]:
    """Where the block of results begins in the range, and its bytes."""
    begin = m.plan.blocks["token"]
    return begin, m.plan.blocks["wide_temperature"] - begin


def fetch(m: Model, rows: int, hidden: int | None) -> dict[str, np.ndarray]:
    """Results of the first rows, and states [rows, d] in 16 bits from an address. Waits; the arrays are copies."""
    assert m.stream is not None and m.results is not None
    begin, size = results_extent(m)
    shapes = {name: (rows, *_columns(m.head, name)) for name, _ in RESULTS}
    extents = {name: (m.plan.blocks[name] - begin, int(np.prod(shapes[name])) * np.dtype(kind).itemsize) for name, kind in RESULTS}
    wanted = [(0, m.plan.blocks["candidate_ids"] - begin), extents["candidate_ids"], extents["candidate_logits"]]  # the small ones in one copy
    for start, count in wanted:
        m.stream.to_host(m.results.pointer + start, m.base + begin + start, count)
    if hidden is not None:
        m.stream.to_host(m.results.pointer + size, hidden, 2 * rows * m.head.hidden)
    m.stream.wait()
    found = {}
    for name, kind in RESULTS:
        start, count = extents[name]
        found[name] = m.results.array[start : start + count].view(kind).reshape(shapes[name]).copy()
    if hidden is not None:
        half = np.float16 if m.program.precision == "float16" else np.uint16
        found["hidden_states"] = m.results.array[size : size + 2 * rows * m.head.hidden].view(half).reshape(rows, -1).copy()
    return found


def _columns(head: Head, name: str) -> tuple[int, ...]:
    return (head.counted,) if name == "counts" else (head.candidates,) if name.startswith("candidate") else ()


def decode(m: Model, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[Mail]:
    """Continue texts by tokens that are chosen on the device; the first `Mail` is of the prompts' ends. Settings are in the host's block already.

    A step is put into the stream before the one before it is read: where the caller stops early, one step more has run.
    """
    assert m.stream is not None
    rows, drawn = len(prompts), bool((setting(m, "temperature")[: len(prompts)] > 0).any())
    graph = step_graph(m, rows, drawn) if steps > 1 else None
    take_number(m)
    setting(m, "lengths")[:rows] = [len(p) for p in prompts]
    setting(m, "step")[:rows] = 0
    send_settings(m)
    try:
        numbers = []
        for row, prompt in enumerate(prompts):
            state = put_prompt(m, prompt, 0, row)
            put_head(m, state, 1, row)
            if drawn:
                put_draw(m, 1, row)
            put_advance(m, 1, row, drawn)
            m.number += 1
            numbers.append(m.number)
        waiting = [launch_step(m, graph)] if graph is not None else []
        mails = [read_mail(m, number, 1) for number in numbers]
        yield Mail(*(np.concatenate([getattr(mail, part) for mail in mails]) for part in ("token", "capped", "logprob", "counts")))
        for done in range(1, steps):
            if graph is not None and done + 1 < steps:
                waiting.append(launch_step(m, graph))
            yield read_mail(m, waiting.pop(0), rows)
    finally:
        if m.device is not None and m.device.open:
            m.stream.wait()
