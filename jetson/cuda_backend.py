"""The CUDA backend: a decoder program run by our kernels alone, from token to token, without torch and without TensorRT. See docs/cuda.md.

Two ways lead through it. The loop of `generation` feeds a body token by token and reads states and candidates after each. `decode` continues several texts
by tokens that are chosen on the device: the host launches a step's graph before it has read the step before.
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.head import Step
from flashhead_edge.jetson import cuda_session
from flashhead_edge.jetson.cuda_plan import need_of_plan
from flashhead_edge.jetson.cuda_program import Model, Program, dense_states, put_dense, put_head
from flashhead_edge.jetson.cuda_session import set_draw
from flashhead_edge.jetson.cuda_texts import CudaBody, Texts, step_from
from flashhead_edge.jetson.driver import Memory, Pinned
from flashhead_edge.jetson.folder import ExportSettings
from flashhead_edge.jetson.plan import Need
from flashhead_edge.jetson.steps import joined, logits_by_rows
from flashhead_edge.jetson.tensorrt_engine import to_half
from flashhead_edge.progress import Progress, silent


@dataclass(eq=False)
class Cuda:
    """A program on the GPU. Use it from one thread at a time; `close` frees everything that it has on the device."""

    model: Model
    settings: ExportSettings
    rows: tuple[np.ndarray, np.ndarray | None] | None = None
    wide: tuple[Memory, Pinned] | None = field(default=None)  # full-width logits of as many states as the head takes, where they have been asked for
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Texts(self.model)

    @property
    def most_texts(self) -> int:
        """That it holds at once."""
        return self.model.program.batch

    @property
    def head(self) -> CudaHead:
        return CudaHead(self)

    @property
    def about(self) -> dict[str, Any]:
        m = self.model
        assert m.memory is not None and m.readied is not None
        return {
            "backend": "cuda",
            "backend_version": m.facts.cuda_version,
            "device": m.facts.name,
            "threads": None,
            "layers": "ours",
            "precision": m.program.precision,
            "nvrtc": m.readied.nvrtc,
            "overlap": bool(m.limits.overlap),
            "memory": "one range of addresses over pieces" if m.memory.virtual else "one allocation: this GPU has no virtual memory management",
            "device_bytes": m.plan.size,
        }

    @property
    def need(self) -> Need:
        """What it takes of the GPU beyond a context, part by part."""
        return need_of_plan(self.model.program, self.model.plan, self.model.program.weights.parent.name)

    def body(self) -> CudaBody:
        return self.texts.body()

    def close(self) -> None:
        """Free everything; harmless when called twice."""
        if self.wide is not None and self.model.device is not None and self.model.device.open:
            self.model.device.use()
            for held in self.wide:
                held.close()
            self.wide = None
        self.model.close()

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, prompts: Sequence[Sequence[int]], steps: int, sampling: Sampling | None = None) -> Iterator[np.ndarray]:
        """Continue several texts by tokens that are chosen on the device: tokens [B] int32 of each step, the first step's included.

        Args:
            prompts: 1 to the program's batch of them, of any lengths.
            steps: tokens of each text.
            sampling: None is greedy; row b draws with seed + b, as if it were alone. The device has temperature, top-p and min-p in float32.
        Raises:
            SettingsError: too many texts, or settings that the device does not have.
            EngineError: a text does not fit, or another one has taken over the cache meanwhile.
        """
        s, rows, m = sampling or Sampling(), len(prompts), self.model
        if not 1 <= rows <= m.program.batch:
            raise SettingsError(f"decode: {rows} texts, expected 1 to {m.program.batch}, which the program was made for; make it with a larger batch")
        if s.changes_logits or s.allowed is not None:
            raise SettingsError("decode: penalties, biases or a choice of allowed tokens, expected none on the device; decode through the engine's loop")
        if not all(map(len, prompts)):
            raise EngineError("decode: a text without a token, expected at least one in each; leave it out")
        longest = max(map(len, prompts))
        if longest + steps - 1 > m.program.context:
            raise EngineError(f"decode: {longest:,} tokens and {steps:,} steps, expected at most the program's {m.program.context:,} positions; ask for fewer")
        self.texts.use()
        turn = self.texts.give_up()
        sample(m, s, [s.seed + row for row in range(rows)])
        try:
            for mail in cuda_session.decode(m, prompts, steps):
                yield mail.token
                if self.texts.turn != turn:
                    raise EngineError("decode: another text has taken over the cache, expected one at a time; begin this one again")
        finally:
            if self.texts.turn == turn and m.device is not None and m.device.open:  # else the settings are another's, or gone
                sample(m, Sampling(), [0] * m.program.batch)


def sample(m: Model, s: Sampling, seeds: Sequence[int]) -> None:
    """Write draw settings to the host's block, a seed a row."""
    for row, seed in enumerate(seeds):
        set_draw(m, row, s, seed)


@dataclass(frozen=True, eq=False)
class CudaHead:
    """The program's head: `head.Head` over numpy, without an index."""

    backend: Cuda

    def step(self, hidden: np.ndarray) -> Step:
        return self.backend.texts.kept(hidden) or self._run(hidden, wide=False)[0]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.step_with_logits(hidden)[1]

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        step, logits = self._run(hidden, wide=True)
        assert logits is not None
        return step, logits

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Of all tokens on the device; of some on the host, by the rows in the file of weights."""
        if len(tokens) == self.backend.model.head.vocab and np.array_equal(tokens, np.arange(len(tokens))):
            most = dense_states(self.backend.model)
            return np.concatenate([self._dense(hidden[at : at + most]) for at in range(0, len(hidden), most)])
        return self.host_logits(hidden, tokens)

    def host_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """`exact_logits` on the host, however many."""
        rows, bias = self.backend.rows or self._open_rows()
        return logits_by_rows(hidden, tokens, rows, bias, self.backend.model.program.precision)

    def _open_rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        program, node = self.backend.model.program, self.backend.model.head.node
        with program.weights.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        half = np.float16 if program.precision == "float16" else np.uint16

        def opened(name: str) -> np.ndarray:
            return np.memmap(program.weights, half, "r", program.places[name][0], tuple(header[name]["shape"]))

        rows, bias = (getattr(node.attributes[k], "name", "") for k in ("rows", "bias"))
        self.backend.rows = opened(rows), opened(bias) if bias else None
        return self.backend.rows

    def _run(self, hidden: np.ndarray, *, wide: bool) -> tuple[Step, np.ndarray | None]:
        most = self.backend.model.head.rows
        steps, logits = zip(*(self._once(hidden[at : at + most], wide) for at in range(0, len(hidden), most)))
        return steps[0] if len(steps) == 1 else joined(steps), np.concatenate(logits) if wide else None

    def _once(self, hidden: np.ndarray, wide: bool) -> tuple[Step, np.ndarray | None]:
        b, m = self.backend, self.backend.model
        b.texts.use()
        b.texts.latest = None
        states = cuda_session.put_states(m, to_half(hidden, m.program.precision))
        put_head(m, states, len(hidden), 0, self._room()[0].pointer if wide else None)
        found = cuda_session.fetch(m, len(hidden), None)
        return step_from(found), self._fetched(len(hidden)) if wide else None

    def _dense(self, hidden: np.ndarray) -> np.ndarray:
        """All logits of states by the model's own rows, on the device."""
        m = self.backend.model
        self.backend.texts.use()
        put_dense(m, cuda_session.put_states(m, to_half(hidden, m.program.precision)), len(hidden), self._room()[0].pointer)
        return self._fetched(len(hidden))

    def _room(self) -> tuple[Memory, Pinned]:
        """For full-width logits, on the device and on the host."""
        b, size = self.backend, 4 * self.backend.model.head.rows * self.backend.model.head.vocab
        b.wide = b.wide or (Memory(size), Pinned(size))
        return b.wide

    def _fetched(self, states: int) -> np.ndarray:
        """The full-width logits of some states."""
        m, (there, here) = self.backend.model, self._room()
        assert m.stream is not None
        count = 4 * states * m.head.vocab
        m.stream.to_host(here.pointer, there.pointer, count)
        m.stream.wait()
        return here.array[:count].view(np.float32).reshape(states, -1).copy()


def open_program(
    program: Program, settings: dict[str, Any], fingerprint: str, stream: int | None = None, *, chunk: int = cuda_session.CHUNK, progress: Progress = silent
) -> Cuda:
    """Open a program on this machine's GPU.

    Args:
        settings: of the model and of its head, as a manifest has them.
        fingerprint: of the head.
        stream: the handle of a stream to work in, such as pycuda's; None: one of its own.
        chunk: tokens of a prompt that are read together.
    Raises:
        DeviceError: no GPU, or too little memory.
        EngineError: the installation has no library of launchers, or the program is another GPU's, or a kernel does not compile.
    """
    model = cuda_session.open_model(program, chunk=chunk, stream=stream, progress=progress)
    try:
        for rows in range(1, program.batch + 1):
            for drawn in (False, True):
                cuda_session.step_graph(model, rows, drawn)  # now, since its first run writes into the cache
    except BaseException:
        model.close()
        raise
    backend = Cuda(model, export_settings(program, settings, fingerprint))
    atexit.register(_close, weakref.ref(backend))
    return backend


def export_settings(program: Program, s: dict[str, Any], fingerprint: str) -> ExportSettings:
    """What the loop asks of a folder."""
    return ExportSettings(
        part="decoder", dialect="cuda", fingerprint=fingerprint, vocab_size=int(s["vocab_size"]), hidden_size=int(s["hidden_size"]),
        context_length=program.context, scale=float(s["scale"]), softcap=None if s["softcap"] is None else float(s["softcap"]), cache="in_place",
        head_size=int(s["head_size"]), embedding_rows=int(s["embedding_rows"]), body_parameters=int(s["body_parameters"]),
        fixed_bytes=int(s["fixed_bytes"]), item_bytes=tuple(int(b) for b in s["item_bytes"]),
    )  # fmt: skip


def _close(reference: weakref.ref[Cuda]) -> None:
    """Close a backend that is left open when the interpreter ends, while the driver is still there."""
    backend = reference()
    if backend is not None:
        backend.close()
