"""A program that is open on a GPU: memory filled, prompts read, steps captured and launched, results fetched. See docs/cuda.md.

A step reads its tokens, lengths and draw settings on the device, and leaves them there for the next: the host only launches graphs, and reads results
from a mailbox of pinned memory while the next step runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import DeviceError, EngineError
from flashhead_edge.jetson import cuda_library as native
from flashhead_edge.jetson.cuda_kernels import ready
from flashhead_edge.jetson.cuda_memory import Mailbox, Range, fill
from flashhead_edge.jetson.cuda_plan import CHUNK, need_of_plan
from flashhead_edge.jetson.cuda_program import (
    OPERATORS,
    SETTINGS,
    SLOTS,
    Head,
    Model,
    Program,
    Run,
    attentions_of,
    dry_pass,
    head_of,
    memory_plan,
    put_advance,
    put_body,
    put_draft,
    put_draw,
    put_head,
    put_step,
    row_bytes,
    slot_words,
)
from flashhead_edge.jetson.driver import Device, DeviceFacts, Graph, Pinned, Stream, device_facts
from flashhead_edge.jetson.plan import check_fits, free_gpu
from flashhead_edge.program.nodes import PLAIN
from flashhead_edge.progress import Progress, silent

WAIT_SECONDS = 2.0  # for a step's results, before the stream is asked what is wrong

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


def planned_model(program: Program, facts: DeviceFacts, *, chunk: int = CHUNK, overlap: bool | None = None, fuses: bool = True) -> Model:
    """A program laid out for a GPU, which need not be at hand; nothing is done on one. Arguments and errors as of `open_model`."""
    head = head_of(program)
    check_program(program, head, facts)
    limits, chunk = native.limits_of(facts, overlap=overlap), min(chunk, program.context)
    dtype = native.BF16 if program.precision == "bfloat16" else native.FP16
    return Model(program, head, facts, limits, memory_plan(program, head, limits, chunk, dtype), chunk, fuses)


def open_model(
    program: Program, *, chunk: int = CHUNK, stream: int | None = None, overlap: bool | None = None, fuses: bool = True, progress: Progress = silent
) -> Model:  # fmt: skip
    """Put a program on this machine's GPU, its kernels compiled where the cache has none.

    Args:
        chunk: tokens of a prompt that are read together.
        stream: the handle of a stream to work in, such as pycuda's; None: one of its own.
        overlap: whether launches begin while the one before them ends; None: where the GPU can.
        fuses: whether steps of up to eight rows run fused nodes, with the same bits; a measurement compares both.
    Raises:
        DeviceError: no GPU, or too little memory, which is looked at before anything is compiled or allocated.
        EngineError: the program is another GPU's, or a kernel does not compile.
    """
    facts = device_facts()
    m = planned_model(program, facts, chunk=chunk, overlap=overlap, fuses=fuses)
    head = m.head
    need = replace(need_of_plan(program, m.plan, program.weights.parent.name), limit=None)
    check_fits(need, free_gpu(facts.free_bytes), program.context, program.batch)
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
        m.prompts = Pinned(4 * program.batch * (program.context + -(-program.context // m.chunk) + 1))
        m.results = Pinned(results_extent(m)[1] + 2 * head.hidden * head.rows)
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


def set_draw(m: Model, row: int, s: Sampling, seed: int) -> None:
    """Write a row's draw settings to the host's block."""
    for name, value in (("temperature", s.temperature), ("top_p", s.top_p), ("min_p", s.min_p), ("top_k", s.top_k), ("seed", seed % 2**64)):
        setting(m, name)[row] = value


def set_row(m: Model, row: int, s: Sampling, token: int, length: int, step: int) -> None:
    """Write all that a step reads of a row to the host's block: the token that is fed, positions with it, and how many were chosen before."""
    set_draw(m, row, s, s.seed)
    for name, value in (("ids", token), ("lengths", length), ("step", step)):
        setting(m, name)[row] = value


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


def put_states(m: Model, states: np.ndarray) -> int:
    """States [n, d] in the program's type, at most as many as the head takes, to the device: their address."""
    assert m.stream is not None and m.results is not None
    room = results_extent(m)[1]
    m.results.array[room : room + states.nbytes] = np.ascontiguousarray(states).reshape(-1).view(np.uint8)
    m.stream.to_device(m.block("states"), m.results.pointer + room, states.nbytes)
    return m.block("states")


def move_row(m: Model, source: int, target: int, keep: bool) -> None:
    """A row of every cache to another one, whose own text goes the other way with `keep`, and is lost without."""
    assert m.stream is not None
    for layer, a in enumerate(attentions_of(m.program)):
        size = row_bytes(m.program, a)
        for part in ("key", "value"):
            here, there = (m.block(f"cache.{layer}.{part}", row * size) for row in (source, target))
            if keep:
                m.stream.on_device(m.block("exchange"), there, size)
            m.stream.on_device(there, here, size)
            if keep:
                m.stream.on_device(here, m.block("exchange"), size)


def read_draft(m: Model, ids: Sequence[int], length: int) -> int:
    """Tokens of row 0 after `length` positions, at most as many as the head takes states, with the head's step of each: the address of their states."""
    assert m.stream is not None and m.prompts is not None
    n, room = len(ids), m.program.context
    words = m.prompts.array.view(np.int32)
    words[:n], words[room] = ids, length + n
    m.stream.to_device(m.block("prompt"), m.prompts.pointer, 4 * n)
    m.stream.to_device(m.block("prompt_lengths"), m.prompts.pointer + 4 * room, 4)
    run_draft(m, n)
    return m.value(m.head.node.inputs[0])


def run_draft(m: Model, tokens: int) -> None:
    """The pass over the tokens of a draft, captured at its first run for those to come."""
    assert m.stream is not None
    if tokens in m.drafts:
        m.drafts[tokens].launch(m.stream)
        return
    put_draft(m, tokens)  # once outside of a graph, as a step
    m.stream.wait()
    with m.stream.captured() as graph:
        put_draft(m, tokens)
    m.drafts[tokens] = graph


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


def fetch(m: Model, rows: int, hidden: int | None, candidates: bool = True, first: int = 0) -> dict[str, np.ndarray]:
    """Results of some rows, the candidates among them or not, and states [rows, d] in 16 bits from an address. Waits; the arrays are copies."""
    assert m.stream is not None and m.results is not None
    begin, size = results_extent(m)
    results = [(name, kind) for name, kind in RESULTS if candidates or not name.startswith("candidate")]
    shapes = {name: (rows, *_columns(m.head, name)) for name, _ in results}
    width = {name: int(np.prod(shapes[name][1:])) * np.dtype(kind).itemsize for name, kind in results}
    extents = {name: (m.plan.blocks[name] - begin + first * width[name], rows * width[name]) for name, _ in results}
    wanted = [(0, m.plan.blocks["candidate_ids"] - begin), *(extent for name, extent in extents.items() if name.startswith("candidate"))]  # the small in one
    for start, count in wanted:
        m.stream.to_host(m.results.pointer + start, m.base + begin + start, count)
    if hidden is not None:
        m.stream.to_host(m.results.pointer + size, hidden, 2 * rows * m.head.hidden)
    m.stream.wait()
    found = {}
    for name, kind in results:
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
    numbers = []
    for row, prompt in enumerate(prompts):
        state = put_prompt(m, prompt, 0, row)
        put_head(m, state, 1, row)
        numbers.append(put_end(m, row, drawn))
    yield from mails_of(m, graph, rows, steps, numbers)


def put_end(m: Model, row: int, drawn: bool) -> int:
    """A token from the head's step of a prompt: its number in the mailbox."""
    if drawn:
        put_draw(m, 1, row)
    put_advance(m, 1, row, drawn)
    m.number += 1
    return m.number


def mails_of(m: Model, graph: Graph | None, rows: int, steps: int, numbers: Sequence[int]) -> Iterator[Mail]:
    """What `steps` steps say, the first of them in a mail for each row: one is in the stream before the one before it is read."""
    assert m.stream is not None
    try:
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
