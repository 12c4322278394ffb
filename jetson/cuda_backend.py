"""The CUDA backend: a decoder program run by our kernels alone, from token to token, without torch and without TensorRT. See docs/cuda.md.

Two ways lead through it. The loop of `generation` feeds a body token by token and reads states and candidates after each. `decode` continues several texts
by tokens that are chosen on the device: the host launches a step's graph before it has read the step before.
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError, SettingsError
from flashhead_edge.generation.positions import CutByLength
from flashhead_edge.generation.protocols import Chosen, Verified
from flashhead_edge.head import Step
from flashhead_edge.jetson import cuda_session
from flashhead_edge.jetson.cuda_plan import need_of_plan
from flashhead_edge.jetson.cuda_program import Model, Program, put_head
from flashhead_edge.jetson.cuda_session import setting
from flashhead_edge.jetson.driver import Memory, Pinned
from flashhead_edge.jetson.folder import ExportSettings
from flashhead_edge.jetson.plan import Need
from flashhead_edge.jetson.steps import joined, logits_by_rows, step_of
from flashhead_edge.jetson.tensorrt_engine import to_float32, to_half
from flashhead_edge.progress import Progress, silent

# The highest temperature at which the device draws without top-k, top-p or min-p: it draws among a step's candidates, beyond which there is more of the
# probability the warmer the draw. The loop of `generation` then looks at all tokens.
WARMEST = 1.0
LOOKED_AT = 64  # tokens after which a text that the device continues is looked at: whether its states are numbers


@dataclass(eq=False)
class Cuda:
    """A program on the GPU. Use it from one thread at a time; `close` frees everything that it has on the device."""

    model: Model
    settings: ExportSettings
    owner: CudaBody | None = None  # whose text the cache holds
    turn: int = 0  # of the cache: how often a text has taken it over
    rows: tuple[np.ndarray, np.ndarray | None] | None = None
    wide: tuple[Memory, Pinned] | None = field(default=None)  # full-width logits, where they have been asked for

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
        self.owner, self.turn = CudaBody(self), self.turn + 1
        return self.owner

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

    # ---- single texts

    def step(self, token: int, length: int) -> tuple[np.ndarray, Step]:
        """One token of row 0 at the end of `length` positions, it included: hidden state [1, d] float32, and the head's step."""
        m = self.model
        graph = cuda_session.step_graph(m, 1, False)
        setting(m, "ids")[0] = token
        setting(m, "lengths")[0] = length
        cuda_session.send_settings(m)
        cuda_session.launch_step(m, graph)
        return self._taken(m.value(m.head.node.inputs[0]))

    def read(self, ids: Sequence[int], length: int) -> tuple[np.ndarray, Step]:
        """Tokens of row 0 after `length` positions, in chunks: the last one's state and step.

        Raises:
            EngineError: there are none, or too many.
        """
        m, room = self.model, self.model.program.context
        if not len(ids):
            raise EngineError("body: no token was given, expected at least one; give a text")
        if length + len(ids) > room:
            raise EngineError(
                f"body: the text has {length + len(ids):,} tokens, expected at most the program's {room:,} positions; shorten it, or give it a larger context"
            )
        state = cuda_session.put_prompt(m, ids, length, 0)
        put_head(m, state, 1, 0)
        return self._taken(state)

    def draft(self, ids: Sequence[int], length: int, candidates: bool) -> dict[str, np.ndarray]:
        """Tokens of row 0 after `length` positions, at most as many as the head takes: state and results of each, as `cuda_session.fetch` gives them."""
        return cuda_session.fetch(self.model, len(ids), cuda_session.read_draft(self.model, ids, length), candidates)

    def _taken(self, state: int) -> tuple[np.ndarray, Step]:
        found = cuda_session.fetch(self.model, 1, state)
        return to_float32(found["hidden_states"], self.model.program.precision), step_from(found)

    # ---- many texts at once

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
        self._use()
        self.owner, self.turn = None, self.turn + 1
        turn = self.turn
        sample(m, s, [s.seed + row for row in range(rows)])
        try:
            for mail in cuda_session.decode(m, prompts, steps):
                yield mail.token
                if self.turn != turn:
                    raise EngineError("decode: another text has taken over the cache, expected one at a time; begin this one again")
        finally:
            if self.turn == turn and m.device is not None and m.device.open:  # else the settings are another's, or gone
                sample(m, Sampling(), [0] * m.program.batch)

    def _use(self) -> None:
        assert self.model.device is not None
        if not self.model.device.open:
            raise EngineError("cuda backend: it is closed, expected an open one; open the program again")
        self.model.device.use()


def sample(m: Model, s: Sampling, seeds: Sequence[int]) -> None:
    """Write draw settings to the host's block, a seed a row."""
    rows = len(seeds)
    for name, value in (("temperature", s.temperature), ("top_p", s.top_p), ("min_p", s.min_p), ("top_k", s.top_k)):
        setting(m, name)[:rows] = value
    setting(m, "seed")[:rows] = [seed % 2**64 for seed in seeds]


def check_finite(states: np.ndarray) -> None:
    """Raise CheckpointError where states are no numbers."""
    if not np.isfinite(states.sum()):
        raise CheckpointError("hidden states: NaN or infinity found, expected finite values; the weights are damaged, or the model needs --precision bfloat16")


def step_from(found: dict[str, np.ndarray]) -> Step:
    return step_of(*(found[name] for name in ("token", "candidate_ids", "candidate_logits", "counts", "capped")))


class CudaBody(CutByLength):
    """The body in the middle of one text. There is one cache: a later text takes it over."""

    def __init__(self, backend: Cuda) -> None:
        self.backend, self.length = backend, 0
        self.last: tuple[np.ndarray, Step] | None = None

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d] float32. The head's step came with it and is kept.

        Raises:
            EngineError: the text is longer than the program's context, or another text has the cache.
            CheckpointError: the model gives states that are no numbers.
        """
        b = self._mine()
        one = len(ids) == 1 and self.length < b.model.program.context
        return self._kept(*(b.step(ids[0], self.length + 1) if one else b.read(ids, self.length)), len(ids))

    def states(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden states of all of them, [n, d] float32, with the head's steps, as many at once as it takes.

        Raises:
            EngineError, CheckpointError: as `feed`.
        """
        found = self._draft(ids, True)
        states = to_float32(np.concatenate([part["hidden_states"] for part in found]), self.backend.model.program.precision)
        return self._kept(states, joined([step_from(part) for part in found]), len(ids))

    def tokens_after(self, ids: Sequence[int]) -> Verified:
        """Run tokens after what the cache holds: the head's token after each of them, without its candidates.

        Raises:
            EngineError, CheckpointError: as `feed`.
        """
        found = self._draft(ids, False)
        check_finite(to_float32(np.concatenate([part["hidden_states"] for part in found]), self.backend.model.program.precision))
        self.length, self.last = self.length + len(ids), None
        return Verified(*(np.concatenate([part[name] for part in found]) for name in ("token", "counts", "capped")))

    def _draft(self, ids: Sequence[int], candidates: bool) -> list[dict[str, np.ndarray]]:
        b = self._mine()
        room, most = b.model.program.context, b.model.head.rows
        if self.length + len(ids) > room:
            raise EngineError(f"body: the text has {self.length + len(ids):,} tokens, expected at most the program's {room:,} positions; guess fewer")
        return [b.draft(ids[at : at + most], self.length + at, candidates) for at in range(0, len(ids), most)]

    def continues(self, sampling: Sampling) -> bool:
        """Whether the device chooses tokens by these settings: greedy, or draws among a step's candidates that lose nothing to speak of."""
        s = sampling
        return not s.changes_logits and s.allowed is None and (s.truncates or s.temperature <= WARMEST)

    def continued(self, most: int, sampling: Sampling) -> Generator[Chosen, None, None]:
        """Up to `most` tokens after what was fed last, which the device chooses and feeds back itself: a step runs while the one before it is read.

        What was yielded has been fed, but for the last token; a step that was not read leaves nothing.

        Raises:
            EngineError, CheckpointError: as `feed`, the latter some tokens late.
        """
        b = self._mine()
        m = b.model
        sample(m, sampling, [sampling.seed])
        try:
            for number, mail in enumerate(cuda_session.go_on(m, self.length, most)):
                self.length += number > 0
                if number % LOOKED_AT == LOOKED_AT - 1:
                    check_finite(to_float32(cuda_session.fetch(m, 1, m.value(m.head.node.inputs[0]))["hidden_states"], m.program.precision))
                yield Chosen(int(mail.token[0]), mail.counts, mail.capped)
                self._mine()
        finally:
            self.last = None
            if b.owner is self and m.device is not None and m.device.open:  # else the settings are another's, or gone
                sample(m, Sampling(), [0])

    def _mine(self) -> Cuda:
        """The backend, whose cache holds this text."""
        if self.backend.owner is not self:
            raise EngineError("body: another text has taken over the cache, expected one text at a time; begin this one again")
        self.backend._use()
        return self.backend

    def _kept(self, states: np.ndarray, step: Step, tokens: int) -> np.ndarray:
        check_finite(states)
        self.length += tokens
        self.last = states, step
        return states


@dataclass(frozen=True, eq=False)
class CudaHead:
    """The program's head: `head.Head` over numpy, without an index."""

    backend: Cuda

    def step(self, hidden: np.ndarray) -> Step:
        owner = self.backend.owner
        if owner is not None and owner.last is not None and owner.last[0] is hidden:
            return owner.last[1]
        return self._run(hidden, wide=False)[0]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.step_with_logits(hidden)[1]

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        step, logits = self._run(hidden, wide=True)
        assert logits is not None
        return step, logits

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """On the host, by the rows in the file of weights: for few tokens, or where time does not matter."""
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
        most = self.backend.model.program.batch if wide else self.backend.model.head.rows
        steps, logits = zip(*(self._once(hidden[at : at + most], wide) for at in range(0, len(hidden), most)))
        return steps[0] if len(steps) == 1 else joined(steps), np.concatenate(logits) if wide else None

    def _once(self, hidden: np.ndarray, wide: bool) -> tuple[Step, np.ndarray | None]:
        b, m = self.backend, self.backend.model
        b._use()
        assert m.stream is not None and m.results is not None
        states, room = to_half(hidden, m.program.precision), cuda_session.results_extent(m)[1]
        m.results.array[room : room + states.nbytes] = np.ascontiguousarray(states).reshape(-1).view(np.uint8)
        m.stream.to_device(m.block("states"), m.results.pointer + room, states.nbytes)
        target = None
        if wide:
            size = 4 * m.program.batch * m.head.vocab
            b.wide = b.wide or (Memory(size), Pinned(size))
            target = b.wide[0].pointer
        put_head(m, m.block("states"), len(hidden), 0, target)
        count = 4 * len(hidden) * m.head.vocab
        if b.wide is not None and wide:
            m.stream.to_host(b.wide[1].pointer, b.wide[0].pointer, count)
        found = cuda_session.fetch(m, len(hidden), None)
        logits = None if b.wide is None or not wide else b.wide[1].array[:count].view(np.float32).reshape(len(hidden), -1).copy()
        return step_from(found), logits


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
        for drawn in (False, True):
            cuda_session.step_graph(model, 1, drawn)  # now, since its first run writes into the cache
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
