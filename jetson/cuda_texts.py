"""Several texts in one cache of the CUDA backend: each has a row, and a step makes a token of all that go along. See docs/cuda.md.

A step's graph takes the first rows of the cache, so texts that step together are brought there, which other texts then leave: their rows change places on the
device, when somebody joins or leaves and at no other time. No row of a step is idle. What a row computes is the same in any company of up to eight: products
and the head sum each row by itself, and attention is cut for all rows of the program whichever of them there are (`cuda_program.attention_arguments`).
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError
from flashhead_edge.generation.positions import CutByLength
from flashhead_edge.generation.protocols import Chosen, Verified
from flashhead_edge.head import Step
from flashhead_edge.jetson import cuda_session
from flashhead_edge.jetson.cuda_program import Model, put_head
from flashhead_edge.jetson.cuda_session import Mail, set_row, setting
from flashhead_edge.jetson.steps import joined, step_of
from flashhead_edge.jetson.tensorrt_engine import to_float32, to_half

# The highest temperature at which the device draws without top-k, top-p or min-p: it draws among a step's candidates, beyond which there is more of the
# probability the warmer the draw. The loop of `generation` then looks at all tokens.
WARMEST = 1.0
LOOKED_AT = 64  # tokens after which a text that the device continues is looked at: whether its states are numbers


@dataclass(eq=False)
class Going:
    """A text that goes on by tokens which the device chooses."""

    sampling: Sampling
    most: int  # tokens
    token: int = -1  # the last one that the caller has
    chosen: int = 0  # tokens that the caller has
    ready: Chosen | None = None  # the next one, where a step with others has made it


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that is in the stream and has not been read."""

    number: int  # in the mailbox
    texts: tuple[Going, ...]  # a row each
    drawn: bool


class Texts:
    """The rows of an open program's cache, and who holds them. Used from one thread at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rows: list[weakref.ref[CudaBody] | None] = [None] * model.program.batch
        self.flight: Flight | None = None
        self.latest: CudaBody | None = None  # for whose last state the head's step is the last thing that was written into its row of the results
        self.turn = 0  # how often a text has begun
        self.clock = 0  # of texts that began and of what was fed

    def use(self) -> None:
        """Make the device the calling thread's.

        Raises:
            EngineError: the program is closed.
        """
        device = self.model.device
        assert device is not None
        if not device.open:
            raise EngineError("cuda backend: it is closed, expected an open one; open the program again")
        device.use()

    def holder(self, row: int) -> CudaBody | None:
        """Who holds a row and is held by somebody."""
        held = self.rows[row]
        return None if held is None else held()

    def body(self) -> CudaBody:
        """A new text: in a free row, else in that of the text which began or was fed longest ago, and is given up."""
        self.turn += 1
        self.clock += 1
        holders = [self.holder(row) for row in range(len(self.rows))]

        def rank(row: int) -> tuple[bool, bool, int]:
            held = holders[row]
            return (False, False, 0) if held is None else (True, held.going is not None, held.used)

        row = min(range(len(holders)), key=rank)
        if (loser := holders[row]) is not None:
            loser.row = -1
        body = CudaBody(self, row)
        body.used = self.clock
        self.rows[row] = weakref.ref(body)
        return body

    def give_up(self) -> int:
        """Take all rows from those who hold them: the turn that this is."""
        for row in range(len(self.rows)):
            if (held := self.holder(row)) is not None:
                held.row = -1
        self.rows, self.flight, self.latest = [None] * len(self.rows), None, None
        self.turn += 1
        return self.turn

    def bring(self, bodies: Sequence[CudaBody]) -> list[CudaBody]:
        """See that some texts hold the first rows: the texts in the order of these."""
        strays = [body for body in bodies if body.row >= len(bodies)]
        holes = [row for row in range(len(bodies)) if self.holder(row) not in bodies]
        for body, row in zip(strays, holes):
            other, left = self.holder(row), body.row
            cuda_session.move_row(self.model, left, row, keep=other is not None and other.length > 0)
            self.rows[row], self.rows[left] = self.rows[left], self.rows[row]
            body.row = row
            if other is not None:
                other.row = left
        if strays:
            self.flight = self.latest = None
        return sorted(bodies, key=lambda body: body.row)

    def read(self, body: CudaBody, ids: Sequence[int]) -> tuple[np.ndarray, Step]:
        """Tokens of a text after its last position, in chunks: the last one's state [1, d] float32 and the head's step."""
        m = self.model
        state = cuda_session.put_prompt(m, ids, body.length, body.row)
        put_head(m, state, 1, body.row)
        self.latest = body
        found = cuda_session.fetch(m, 1, state, first=body.row)
        return to_float32(found["hidden_states"], m.program.precision), step_from(found)

    def begin(self, body: CudaBody) -> Chosen:
        """The first token of a text that goes on by itself. Where nobody else does the next step is under way when it comes."""
        m, going = self.model, body.going
        assert going is not None
        alone = all(held is body or held is None or held.going is None for held in map(self.holder, range(len(self.rows))))
        if self.latest is not body:
            assert body.last is not None, "nothing was fed"
            put_head(m, cuda_session.put_states(m, to_half(body.last[0][-1:], m.program.precision)), 1, body.row)
        cuda_session.take_number(m)
        self.flight = self.latest = None
        drawn = going.sampling.temperature > 0
        set_row(m, body.row, going.sampling, -1, body.length, 0)
        cuda_session.send_settings(m)
        number = cuda_session.put_end(m, body.row, drawn)
        if alone and body.row == 0 and going.most > 1 and body.length < m.program.context:
            self.flight = self._launched((going,), drawn)
        return chosen_of(cuda_session.read_mail(m, number, 1), 0)

    def step(self, bodies: Sequence[CudaBody], tokens: Sequence[int]) -> None:
        """Feed a token to each of some texts in one step: those that go on by themselves have their next token ready, the others their last state and step.

        Where all go on by themselves the step after it is in the stream before this one is read, and is taken next time by those that still go along; by who
        joins it is given up, and leaves nothing. What fails has changed none of the texts.

        Raises:
            EngineError: a text is as long as the program's context.
            CheckpointError: the model gives states that are no numbers.
        """
        m, context = self.model, self.model.program.context
        for body in bodies:
            if body.length >= context:
                raise EngineError(f"body: the text has {body.length + 1:,} tokens, expected at most the program's {context:,} positions; shorten it")
        going = [body.going for body in bodies if body.going is not None]
        by_themselves = len(going) == len(bodies)
        more = by_themselves and all(g.chosen + 2 <= g.most for g in going) and all(body.length + 2 <= context for body in bodies)
        flight, self.flight = self.flight, None
        if flight is not None and by_themselves and all(g in flight.texts for g in going):
            if more and len(going) == len(flight.texts):
                self.flight = self._launched(flight.texts, flight.drawn)
            mail = cuda_session.read_mail(m, flight.number, len(flight.texts))
            for g in going:
                g.ready = chosen_of(mail, flight.texts.index(g))
            return
        token_of = dict(zip(bodies, tokens))
        order = self.bring(bodies)
        for row, body in enumerate(order):
            if body.going is None:
                set_row(m, row, Sampling(), token_of[body], body.length + 1, 0)
            else:
                set_row(m, row, body.going.sampling, body.going.token, body.length + 1, body.going.chosen)
        cuda_session.send_settings(m)
        drawn = any(g.sampling.temperature > 0 for g in going)
        number = cuda_session.launch_step(m, cuda_session.step_graph(m, len(order), drawn))
        if more:
            self.flight = self._launched(tuple(body.going for body in order if body.going is not None), drawn)
        self.latest = None
        fed = [row for row, body in enumerate(order) if body.going is None]
        if fed:
            found = cuda_session.fetch(m, len(order), m.value(m.head.node.inputs[0]))
            states = to_float32(found["hidden_states"], m.program.precision)
            check_finite(states[fed])
        if going:
            mail = cuda_session.read_mail(m, number, len(order))
        self.clock += 1
        for row, body in enumerate(order):
            body.used = self.clock
            if body.going is not None:
                body.going.ready = chosen_of(mail, row)
            else:
                body.keep(states[row : row + 1], step_from({name: values[row : row + 1] for name, values in found.items()}), 1)

    def _launched(self, texts: tuple[Going, ...], drawn: bool) -> Flight:
        return Flight(cuda_session.launch_step(self.model, cuda_session.step_graph(self.model, len(texts), drawn)), texts, drawn)

    def kept(self, hidden: np.ndarray) -> Step | None:
        """The head's step for states that a text was given, where it came with them."""
        for body in map(self.holder, range(len(self.rows))):
            if body is not None and body.last is not None and body.last[0] is hidden:
                return body.last[1]
        return None


class CudaBody(CutByLength):
    """The body in the middle of one text, which has a row of the cache. A later text takes it over where there is no other one."""

    def __init__(self, texts: Texts, row: int) -> None:
        self.texts, self.row = texts, row  # -1: it was taken over
        self.length = self.used = 0
        self.last: tuple[np.ndarray, Step] | None = None
        self.going: Going | None = None

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d] float32. The head's step came with it and is kept.

        Raises:
            EngineError: the text is longer than the program's context, or another text has its row.
            CheckpointError: the model gives states that are no numbers.
        """
        texts = self._mine()
        room = texts.model.program.context
        if not len(ids):
            raise EngineError("body: no token was given, expected at least one; give a text")
        if self.length + len(ids) > room:
            raise EngineError(
                f"body: the text has {self.length + len(ids):,} tokens, expected at most the program's {room:,} positions; shorten it, "
                "or give it a larger context"
            )
        if len(ids) == 1:
            texts.step([self], ids)
        else:
            self.keep(*texts.read(self, ids), len(ids))
        assert self.last is not None
        return self.last[0]

    def feed_together(self, sessions: Sequence[CudaBody], ids: Sequence[Sequence[int]]) -> list[np.ndarray | None]:
        """A token to each of some texts of one program in one step, as `FeedsTogether` has it. Errors as in `feed`; none of the texts has changed then."""
        for body, its in zip(sessions, ids):
            body._mine()
            if len(its) != 1:
                raise EngineError(f"body: {len(its)} tokens of a text beside others, expected one of each; feed it alone")
        behind = [(body, its[0]) for body, its in zip(sessions, ids) if body.going is None or body.going.ready is None]
        if behind:
            self.texts.step([body for body, _ in behind], [token for _, token in behind])
        return [body.last[0] if body.going is None and body.last is not None else None for body in sessions]

    def states(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden states of all of them, [n, d] float32, with the head's steps, as many at once as it takes.

        Raises:
            EngineError, CheckpointError: as `feed`.
        """
        found = self._draft(ids, True)
        states = to_float32(np.concatenate([part["hidden_states"] for part in found]), self.texts.model.program.precision)
        self.keep(states, joined([step_from(part) for part in found]), len(ids))
        return states

    def tokens_after(self, ids: Sequence[int]) -> Verified:
        """Run tokens after what the cache holds: the head's token after each of them, without its candidates.

        Raises:
            EngineError, CheckpointError: as `feed`.
        """
        found = self._draft(ids, False)
        check_finite(to_float32(np.concatenate([part["hidden_states"] for part in found]), self.texts.model.program.precision))
        self.length, self.last = self.length + len(ids), None
        return Verified(*(np.concatenate([part[name] for part in found]) for name in ("token", "counts", "capped")))

    def _draft(self, ids: Sequence[int], candidates: bool) -> list[dict[str, np.ndarray]]:
        texts = self._mine()
        m, room, most = texts.model, texts.model.program.context, texts.model.head.rows
        if self.length + len(ids) > room:
            raise EngineError(f"body: the text has {self.length + len(ids):,} tokens, expected at most the program's {room:,} positions; guess fewer")
        texts.bring([self])
        texts.latest = None
        found = []
        for at in range(0, len(ids), most):
            part = ids[at : at + most]
            found.append(cuda_session.fetch(m, len(part), cuda_session.read_draft(m, part, self.length + at), candidates))
        return found

    def continues(self, sampling: Sampling) -> bool:
        """Whether the device chooses tokens by these settings: greedy, or draws among a step's candidates that lose nothing to speak of."""
        s = sampling
        return not s.changes_logits and s.allowed is None and (s.truncates or s.temperature <= WARMEST)

    def continued(self, most: int, sampling: Sampling) -> Generator[Chosen, None, None]:
        """Up to `most` tokens after what was fed last, which the device chooses and feeds back itself: a step runs while the one before it is read.

        What was yielded has been fed, but for the last token; a step that was not read leaves nothing. Texts of `feed_together` go on in one step.

        Raises:
            EngineError, CheckpointError: as `feed`, the latter some tokens late.
        """
        texts = self._mine()
        m, going = texts.model, Going(sampling, most)
        self.going = going
        try:
            chosen = texts.begin(self)
            while True:
                going.token, going.chosen = chosen.token, going.chosen + 1
                if going.chosen % LOOKED_AT == 0:
                    state = m.value(m.head.node.inputs[0]) + 2 * m.head.hidden * self.row
                    check_finite(to_float32(cuda_session.fetch(m, 1, state, candidates=False)["hidden_states"], m.program.precision))
                yield chosen
                self._mine()
                if going.chosen >= most:
                    return
                if going.ready is None:
                    texts.step([self], [going.token])
                assert going.ready is not None
                chosen, going.ready = going.ready, None
                self.length += 1
        finally:
            self.going = self.last = None
            if self.row >= 0 and m.device is not None and m.device.open:  # else the settings are another's, or gone
                setting(m, "temperature")[self.row] = 0

    def keep(self, states: np.ndarray, step: Step, tokens: int) -> None:
        """States of tokens that the cache now holds, and the head's step of them.

        Raises:
            CheckpointError: they are no numbers.
        """
        check_finite(states)
        self.length += tokens
        self.last = states, step
        self.texts.clock += 1
        self.used = self.texts.clock

    def _mine(self) -> Texts:
        """All texts, where this one still has its row."""
        if self.row < 0:
            rows = len(self.texts.rows)
            raise EngineError(f"body: another text has taken over the cache, expected at most {rows} at a time; begin this one again")
        self.texts.use()
        return self.texts


def check_finite(states: np.ndarray) -> None:
    """Raise CheckpointError where states are no numbers."""
    if not np.isfinite(states.sum()):
        raise CheckpointError(
            "hidden states: NaN or infinity found, expected finite values; the weights are damaged, or the model needs bfloat16: use the onnxruntime backend"
        )


def step_from(found: dict[str, np.ndarray]) -> Step:
    return step_of(*(found[name] for name in ("token", "candidate_ids", "candidate_logits", "counts", "capped")))


def chosen_of(mail: Mail, row: int) -> Chosen:
    return Chosen(int(mail.token[row]), mail.counts[row : row + 1], mail.capped[row : row + 1])
