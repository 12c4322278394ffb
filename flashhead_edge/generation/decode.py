"""The decode loop, the same over any engine: streaming, sampling, and exact mode. numpy alone.

`stream` decodes with the fast head, one token at a time; `exact_stream` gives the dense head's greedy text (how long
a round of it is: `exact.py`); `generate` is either, from a text to a text. What the loop asks of an engine is in
`protocols.py`: hidden states pass through it untouched, torch tensors of one engine, numpy arrays of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashhead_edge.costs import TOKEN_BYTES, dense_bytes
from flashhead_edge.decoding import Sampling, check_tokens, choose, gumbel, process
from flashhead_edge.errors import SettingsError
from flashhead_edge.exact import round_length
from flashhead_edge.generation.cache import PromptCache
from flashhead_edge.generation.drafts import Lookup
from flashhead_edge.generation.grammar import Grammar, Matching
from flashhead_edge.generation.logprobs import Logprobs, logprobs_of
from flashhead_edge.generation.protocols import Array, Chosen, TextEngine, Verified
from flashhead_edge.generation.text import Detokenizer, StopStrings, check_stop_strings, prompt_ids
from flashhead_edge.head import Step

EXTRA = 32  # tokens that a step which is not plain greedy scores exactly beside the candidates
MOST_DRAFTED = 32  # tokens at a time
MOST_ALTERNATIVES = 100  # of a token, with their log-probabilities
FEW_ALLOWED = 2048  # up to here the allowed tokens are all scored exactly, and nothing else is


@dataclass(frozen=True)
class Token:
    """One generated token, and the text that it completes: pieces join to the whole text, never with half a character."""

    id: int
    text: str
    logprobs: Logprobs | None = None  # where they were asked for


@dataclass
class Summary:
    """What a generation did. Shares are 0 to 1, bytes those of a head in 16 bits."""

    prompt_tokens: int = 0
    prompt_read: int = 0  # of them, those that the body read: a cache may hold the others
    tokens: int = 0
    stopped: str = ""  # "stop token", "stop string", "grammar complete", "max_new_tokens" or "context length"; empty while it goes on
    seconds: float = 0.0  # prefill included
    seconds_to_first_token: float = 0.0  # from the call on
    tokens_per_second: float = 0.0  # after the first token
    clusters_opened: float = 0.0  # mean over the fast head's steps
    capped_steps: int = 0  # steps at which a cap cut off items within their margin
    bytes_per_step: float = 0.0  # all that the head read, for each delivered token
    dense_bytes_per_step: int = 0
    allowed_steps: int = 0  # steps that scored the allowed tokens' rows alone
    dense_steps: int = 0  # of them, those with more than FEW_ALLOWED rows, since none of the candidates was allowed
    exact: bool = False
    rounds: int = 0  # dense passes of exact mode
    missed: int = 0  # tokens that a dense pass put right
    repeated_steps: int = 0  # steps of the body that were done again after a miss
    repeated_share: float = 0.0  # of the delivered tokens
    passes: int = 0  # of the body, with drafts
    drafted: int = 0  # tokens that were guessed from the text
    accepted: int = 0  # of them, those that were right
    accepted_per_pass: float = 0.0
    dense_bytes_saved: float = 0.0  # 1 - bytes per step / dense bytes per step
    notes: list[str] = field(default_factory=list)  # what a reader should know about how the tokens were chosen


Tokens = Generator[tuple[int, bool, "Logprobs | None"], None, None]  # a token, whether it is the last, its log-probabilities


class Stream:
    """An iterator of tokens; its summary is up to date at any time."""

    def __init__(self, run: Run, ids: Tokens) -> None:
        self._run = run
        self._ids = ids
        self._text = Detokenizer(run.engine.tokenizer)
        self._stop = StopStrings(run.stop_strings)
        self._began = time.perf_counter()
        self._first: float | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        token, last, logprobs = next(self._ids)
        now, s = time.perf_counter(), self._run.summary
        self._first = self._first or now
        s.tokens += 1
        s.seconds = now - self._began
        s.seconds_to_first_token = self._first - self._began
        s.tokens_per_second = (s.tokens - 1) / max(now - self._first, 1e-9)
        text = self._stop.push(self._text.push(token) + (self._text.finish() if last else ""))
        if self._stop.found:
            s.stopped = "stop string"
            self._ids.close()
        return Token(token, text + self._stop.finish() if last else text, logprobs)

    def close(self) -> None:
        """End it early: an engine that is a step ahead leaves that, and the cache keeps what has been said. Harmless when it has ended."""
        self._ids.close()

    @property
    def summary(self) -> Summary:
        return self._run.finished()


@dataclass(eq=False)
class Run:
    """One text in the making: what has been said, and what it has cost."""

    engine: TextEngine
    sampling: Sampling
    stop: frozenset[int]
    stop_strings: tuple[str, ...]
    summary: Summary
    prompt: np.ndarray | None = None  # [1, V] counts, where a penalty needs them
    output: np.ndarray | None = None
    allowed: np.ndarray | None = None  # [V] bool, the settings' own
    matching: Matching | None = None  # the grammar's
    alternatives: int | None = None  # wanted beside each token's log-probability; None: no log-probabilities
    full: np.ndarray | None = None  # raw logits [1, V] of the step, where log-probabilities are wanted
    chosen: int = 0  # tokens so far: the step's number, half of the noise's key
    head_bytes: float = 0.0
    opened: int = 0  # clusters, over all steps
    steps: int = 0  # of the fast head

    def count(self, step: Step | Chosen | Verified) -> None:
        """Add a step of the fast head, of one row or of several, each as if it were alone."""
        counts = to_numpy(step.counts)
        for row in range(len(counts)):
            self.head_bytes += self.engine.step_bytes(counts[row : row + 1])
            self.opened += int(counts[row, 0])
            self.summary.capped_steps += int(step.capped[row])
        self.steps += len(counts)

    def mask(self) -> np.ndarray | None:
        """Whether each token may come next, [V] bool, by the settings and the grammar; None: all may."""
        if self.matching is None:
            return self.allowed
        mask = self.matching.mask() if self.allowed is None else self.matching.mask() & self.allowed
        if not mask.any():
            raise SettingsError("generate: the grammar and the allowed tokens have none in common, expected at least one; allow more tokens")
        return mask

    def step(self, hidden: Array) -> Step:
        """A step of the fast head, counted; its logits are kept where log-probabilities are wanted."""
        return self.step_with_logits(hidden)[0] if self.alternatives is not None else self._counted(self.engine.step(hidden))

    def step_with_logits(self, hidden: Array) -> tuple[Step, np.ndarray]:
        found, full = self.engine.step_with_logits(hidden)
        logits = to_numpy(full)
        if self.alternatives is not None:
            self.full = logits
        return self._counted(found), logits

    def _counted(self, found: Step) -> Step:
        self.count(found)
        return found

    def logprobs(self, token: int) -> Logprobs | None:
        """Of a token that was just chosen."""
        if self.alternatives is None:
            return None
        assert self.full is not None
        return logprobs_of(self.full[0], token, self.alternatives, self.engine)

    def read_rows(self, rows: int) -> None:
        """Add exact rows that a step read beside the candidates."""
        self.head_bytes += rows * (2 * self.engine.hidden_size + TOKEN_BYTES)

    def finished(self) -> Summary:
        s = self.summary
        s.clusters_opened = self.opened / max(self.steps, 1)
        s.bytes_per_step = self.head_bytes / max(s.tokens, 1)
        s.repeated_share = s.repeated_steps / max(s.tokens, 1)
        s.accepted_per_pass = s.accepted / max(s.passes, 1)
        s.dense_bytes_saved = 1 - s.bytes_per_step / s.dense_bytes_per_step if s.tokens else 0.0
        return s

    def last(self, token: int, most: int, reason: str) -> bool:
        """Whether the text ends with `token`, and why."""
        self.chosen += 1
        if self.output is not None:
            self.output[0, token] += 1
        if self.matching is not None:
            self.matching.accept(token)
        if token in self.stop:
            self.summary.stopped = "stop token"
        elif self.matching is not None and self.matching.complete:
            self.summary.stopped = "grammar complete"
        elif self.chosen >= most:
            self.summary.stopped = reason
            if self.matching is not None and not self.matching.may_end:
                self.summary.notes.append("the text ends before its grammar does: allow more tokens, or bound the lengths in the grammar")
        return bool(self.summary.stopped)


def to_numpy(values: Array) -> np.ndarray:
    """An engine's array, wherever it lies."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def check_settings(
    max_new_tokens: int, sampling: Sampling, stop_strings: Sequence[str] = (), speculate: int = 0, *, grammar: bool = False, logprobs: int | None = None,
) -> None:  # fmt: skip
    """What can be said of settings before a model is loaded.

    Raises:
        SettingsError: one is out of range, or does not go with another.
    """
    if max_new_tokens < 1:
        raise SettingsError(f"generate: max_new_tokens is {max_new_tokens}, expected 1 or more; call again with another value")
    if logprobs is not None and not 0 <= logprobs <= MOST_ALTERNATIVES:
        raise SettingsError(f"generate: logprobs is {logprobs}, expected 0 to {MOST_ALTERNATIVES} alternatives; call again with another value")
    check_stop_strings(stop_strings)
    if not 0 <= speculate <= MOST_DRAFTED:
        raise SettingsError(f"generate: speculate is {speculate}, expected 0 to {MOST_DRAFTED} tokens; call again with another value")
    if speculate and (not sampling.greedy or sampling.changes_logits or grammar or logprobs is not None):
        raise SettingsError("generate: speculate was asked together with sampling, a grammar or logprobs, expected plain greedy; leave out one of them")


def start(
    engine: TextEngine, ids: Sequence[int], max_new_tokens: int, sampling: Sampling, stop: Sequence[int], stop_strings: Sequence[str] = (),
    grammar: Grammar | None = None, logprobs: int | None = None, speculate: int = 0,
) -> tuple[Run, list[int], int, str]:  # fmt: skip
    """Check a request: the run, the prompt as numbers, how many tokens it may make, and why it would end there."""
    prompt = [int(t) for t in ids]
    rows = engine.embedding_rows
    if not prompt:
        raise SettingsError("generate: the prompt is empty, expected at least one token; give a text")
    if min(prompt) < 0 or max(prompt) >= rows:
        raise SettingsError(f"generate: the prompt holds ids {min(prompt)} to {max(prompt)}, expected 0 to {rows - 1}; use this model's tokenizer")
    check_settings(max_new_tokens, sampling, stop_strings, speculate, grammar=grammar is not None, logprobs=logprobs)
    check_tokens(sampling, engine.vocab_size)
    if stop_strings and engine.tokenizer is None:
        raise SettingsError("generate: the engine has no tokenizer, expected one for stop strings; give stop tokens instead")
    limit, most, reason = engine.context_length, max_new_tokens, "max_new_tokens"
    if limit is not None:
        if len(prompt) >= limit:
            raise SettingsError(f"generate: the prompt has {len(prompt):,} tokens, expected fewer than the model's {limit:,} positions; shorten it")
        if limit - len(prompt) < most:
            most, reason = limit - len(prompt), "context length"
    v = engine.vocab_size
    summary = Summary(prompt_tokens=len(prompt), dense_bytes_per_step=dense_bytes(v, engine.hidden_size))
    run = Run(engine, sampling, engine.stop_ids | frozenset(int(t) for t in stop), tuple(stop_strings), summary, alternatives=logprobs)
    if sampling.allowed is not None:
        run.allowed = np.zeros(v, bool)
        run.allowed[list(sampling.allowed)] = True
    if grammar is not None:
        run.matching = Matching(grammar)
    if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
        run.prompt = np.bincount([t for t in prompt if t < v], minlength=v)[None]
        run.output = np.zeros((1, v), np.int64)
    if sampling.truncates:
        summary.notes.append("top-k, top-p and min-p look at the candidates of a step: draws may differ from those of the dense head with the same seed")
    return run, prompt, most, reason


def stream(
    engine: TextEngine, ids: Sequence[int], max_new_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[int] = (),
    stop_strings: Sequence[str] = (), *, grammar: Grammar | None = None, logprobs: int | None = None, cache: PromptCache | None = None,
    speculate: int = 0,
) -> Stream:  # fmt: skip
    """Decode with the fast head.

    Args:
        ids: of the prompt, at least one.
        sampling: None is greedy.
        stop: token ids that end the text, beside the model's own; the one that ends it is yielded, its text is empty
            where it is a special token.
        stop_strings: texts that end the text: it stops before the first of them, and the pieces hold none of it.
        grammar: from `compile_grammar`; the text ends where it is complete.
        logprobs: how many of the likeliest tokens come with each token's own log-probability, by the head's full-width
            logits before settings and grammar; None: no log-probabilities.
        cache: what earlier texts left; the part of the prompt that it holds is not read again.
        speculate: most tokens that are guessed from the text itself and verified in one pass of the body; 0 is off. The
            text is the greedy one, up to the rounding of sums that a body makes in another order for several tokens.
    Raises:
        SettingsError: the prompt is empty, too long or not of this model; a setting is out of range, or does not go
            with another.
    """
    s = sampling or Sampling()
    run, prompt, most, reason = start(engine, ids, max_new_tokens, s, stop, stop_strings, grammar, logprobs, speculate)
    if speculate:
        return Stream(run, in_drafts(run, prompt, most, reason, cache, speculate))
    plain = not s.changes_logits and s.allowed is None and grammar is None and logprobs is None
    return Stream(run, one_by_one(run, prompt, most, reason, cache, next_token, ahead=plain))


def one_by_one(
    run: Run, prompt: Sequence[int], most: int, reason: str, cache: PromptCache | None, choose_next: Callable[[Run, Array], int], ahead: bool = False
) -> Tokens:  # fmt: skip
    """A text whose every token is chosen, once, from the hidden state before it; with `ahead` by the body itself, where it can."""
    body = cache or PromptCache()
    run.summary.prompt_read, hidden = body.begin(run.engine, prompt)
    if ahead and body.continues(run.sampling):
        yield from in_advance(run, body, most, reason)
        return
    while True:
        token = choose_next(run, hidden)
        logprobs = run.logprobs(token)
        last = run.last(token, most, reason)
        yield token, last, logprobs
        if last:
            return
        hidden = body.feed([token])


def in_advance(run: Run, body: PromptCache, most: int, reason: str) -> Tokens:
    """A text that the body goes on with by itself: a step runs while the token before it is looked at, so that one more has run where the text ends."""
    if not run.sampling.greedy and not run.sampling.truncates:
        run.summary.notes.append("tokens were drawn among the candidates of a step: draws may differ from those of the dense head with the same seed")
    token = -1
    with closing(body.continued(most, run.sampling)) as steps:
        for found in steps:
            run.count(found)
            token = found.token
            if run.last(token, most, reason):
                break
            yield token, False, None
    yield token, True, None


def in_drafts(run: Run, prompt: Sequence[int], most: int, reason: str, cache: PromptCache | None, longest: int) -> Tokens:
    """The greedy text: what followed the last tokens where they stood before is guessed, one pass of body and head verifies it."""
    body, s, lookup = cache or PromptCache(), run.summary, Lookup()
    s.prompt_read, states = body.begin(run.engine, prompt)
    if not body.reads_states:
        raise SettingsError("generate: speculate needs a body that gives the states of several tokens and can be cut back, found another; leave it out")
    for token in prompt:
        lookup.push(token)
    draft: list[int] = []
    found = to_numpy(run.step(states).token).tolist()
    while True:
        right = next((i for i, (a, b) in enumerate(zip(draft, found)) if a != b), len(draft))
        if right < len(draft):
            body.cut(len(draft) - right)
        s.passes += 1
        s.drafted += len(draft)
        s.accepted += right
        for token in found[: right + 1]:
            lookup.push(token)
            last = run.last(token, most, reason)
            yield token, last, None
            if last:
                return
        draft = lookup.draft(min(longest, most - run.chosen - 1))
        if body.verifies:
            verified = body.tokens_after([token, *draft])
            run.count(verified)
            found = to_numpy(verified.token).tolist()
        else:
            found = to_numpy(run.step(body.states([token, *draft])).token).tolist()


def next_token(run: Run, hidden: Array) -> int:
    """The token after hidden state [1, d], by the run's settings and its grammar.

    Plain greedy takes the step's token. Draws with top-k, top-p or min-p and nothing else are made among the step's
    candidates, as a device that draws by itself makes them: full-width scores would cost more than the step.
    Everything else chooses among the step's candidates, the tokens that the
    settings lift (a positive bias), and the EXTRA tokens of the largest full-width scores after penalties and noise:
    those could win once candidates are penalised, forbidden or noise is added. All of them are scored exactly. Few
    allowed tokens are scored alone; so are many, where none of them is a candidate.
    """
    engine, s = run.engine, run.sampling
    mask = run.mask()
    if mask is not None and np.count_nonzero(mask) <= FEW_ALLOWED:
        if run.alternatives is not None:
            run.step_with_logits(hidden)
        return _choose_exactly(run, hidden, np.flatnonzero(mask))
    if s.greedy and not s.changes_logits:
        token = int(run.step(hidden).token[0])
        if mask is None or mask[token]:
            return token
    if s.truncates and mask is None and not s.changes_logits and run.alternatives is None:
        found = run.step(hidden)
        return int(choose(to_numpy(found.ids), to_numpy(found.logits), s, [run.chosen], None, None, engine.scale, engine.softcap)[0])
    found, full = run.step_with_logits(hidden)
    known = to_numpy(found.ids)[0]
    known = known[known >= 0]
    if mask is not None:
        known = known[mask[known]]
        if not len(known):
            run.summary.dense_steps += 1
            return _choose_exactly(run, hidden, np.flatnonzero(mask))
    every = np.arange(engine.vocab_size)[None]
    wide = process(every, full, s, run.prompt, run.output, engine.scale, engine.softcap)
    if mask is not None:
        wide[0, ~mask] = -np.inf
    if not s.greedy:
        wide = wide / s.temperature + gumbel(s.seed, [run.chosen], every)
    best = np.argpartition(-wide[0], min(EXTRA, wide.shape[1] - 1))[:EXTRA]
    lifted = np.array([t for t, bias in s.logit_bias.items() if bias > 0 and (mask is None or mask[t])], np.int64)
    extra = np.setdiff1d(np.concatenate([best[np.isfinite(wide[0, best])], lifted]), known)
    run.read_rows(len(extra))
    ids = np.union1d(known, extra)
    return _choose(run, hidden, ids)


def _choose_exactly(run: Run, hidden: Array, tokens: np.ndarray) -> int:
    run.read_rows(len(tokens))
    run.summary.allowed_steps += 1
    return _choose(run, hidden, tokens)


def _choose(run: Run, hidden: Array, ids: np.ndarray) -> int:
    """Choose among tokens [C] by their exact logits."""
    engine = run.engine
    raw = to_numpy(engine.exact_logits(hidden, ids))
    return int(choose(ids[None], raw, run.sampling, [run.chosen], run.prompt, run.output, engine.scale, engine.softcap)[0])


def exact_stream(
    engine: TextEngine, ids: Sequence[int], max_new_tokens: int = 256, stop: Sequence[int] = (), stop_strings: Sequence[str] = (), *,
    grammar: Grammar | None = None, logprobs: int | None = None, cache: PromptCache | None = None,
) -> Stream:  # fmt: skip
    """The dense head's greedy text, token for token, with few dense reads: only verified tokens are yielded.

    The body is called as plain greedy decoding would call it, one token at a time, so that its hidden states are those
    of the dense text bit by bit. The tokens equal transformers' own where its float32 logits order the two best tokens as
    their exact sums do.

    With a grammar each step reads the rows that it allows, and no others; with log-probabilities, which are then the
    dense head's, each step reads all rows.

    Args and errors: as in `stream`.
    """
    run, prompt, most, reason = start(engine, ids, max_new_tokens, Sampling(), stop, stop_strings, grammar, logprobs)
    run.summary.exact = True
    if grammar is not None or logprobs is not None:
        return Stream(run, one_by_one(run, prompt, most, reason, cache, next_dense_token))
    return Stream(run, in_rounds(run, prompt, most, reason, cache))


def next_dense_token(run: Run, hidden: Array) -> int:
    """The dense head's greedy token after hidden state [1, d] among those that the grammar allows; the smaller id on ties."""
    v, mask = run.engine.vocab_size, run.mask()
    allowed = np.arange(v) if mask is None else np.flatnonzero(mask)
    if run.alternatives is None:
        return _choose_exactly(run, hidden, allowed)
    run.full = to_numpy(run.engine.exact_logits(hidden, np.arange(v)))
    run.read_rows(v)
    return int(allowed[run.full[0, allowed].argmax()])


def in_rounds(run: Run, prompt: Sequence[int], most: int, reason: str, cache: PromptCache | None) -> Tokens:
    """The dense text: the fast head guesses a round of tokens, one pass of the dense head verifies them."""
    engine, body = run.engine, cache or PromptCache()
    record, s = engine.record, run.summary
    body_cost = engine.body_reads()
    s.prompt_read, hidden = body.begin(engine, prompt)
    while True:
        replay = not body.can_cut
        fast_cost = run.head_bytes / max(run.steps, 1) / s.dense_bytes_per_step
        longest = min(round_length(record.rate, body_cost, fast_cost, replay), most - run.chosen)
        kept = body.snapshot() if replay and longest > 1 else None
        states, guess = [hidden], [_fast(run, hidden)]
        while len(guess) < longest and guess[-1] not in run.stop:
            states.append(body.feed([guess[-1]]))
            guess.append(_fast(run, states[-1]))
        dense = engine.dense_tokens(states)
        run.head_bytes += s.dense_bytes_per_step
        s.rounds += 1
        right = next((i for i, (a, b) in enumerate(zip(guess, dense)) if a != b), len(guess))
        missed = right < len(guess)
        record.checked += right + missed
        record.missed += missed
        s.missed += missed
        verified = dense[: right + missed]
        wrong = len(guess) - 1 - min(right, len(guess) - 1)  # steps of the body whose input was wrong
        if wrong:
            s.repeated_steps += wrong
            if kept is None:
                body.cut(wrong)
            else:
                body.restore(kept)
                for token in verified[:-1]:
                    body.feed([token])
                    s.repeated_steps += 1
        for token in verified:
            last = run.last(token, most, reason)
            yield token, last, None
            if last:
                return
        hidden = body.feed([verified[-1]])


def _fast(run: Run, hidden: Array) -> int:
    return int(run.step(hidden).token[0])


def generate(
    engine: TextEngine | str | Path, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 256, sampling: Sampling | None = None, *,
    exact: bool = False, chat: bool | None = None, stop: Sequence[int] = (), stop_strings: Sequence[str] = (), grammar: Grammar | None = None,
) -> tuple[str, Summary]:  # fmt: skip
    """The answer to a prompt, and what it took.

    Args:
        engine: from `load_engine` or `jetson.open_engine`, or the folder of a checkpoint, loaded for this call.
        exact: the dense head's greedy text; sampling must then be greedy.
        chat: see `prompt_ids`.
        stop, stop_strings, grammar: see `stream`.
    """
    if isinstance(engine, (str, Path)):
        from flashhead_edge.generation.engine import load_engine

        engine = load_engine(engine)
    if exact and sampling is not None and sampling != Sampling(seed=sampling.seed):
        raise SettingsError("generate: exact mode was asked together with sampling settings, expected plain greedy; leave out one of them")
    ids = prompt_ids(engine, prompt, chat)
    if exact:
        run = exact_stream(engine, ids, max_new_tokens, stop, stop_strings, grammar=grammar)
    else:
        run = stream(engine, ids, max_new_tokens, sampling, stop, stop_strings, grammar=grammar)
    text = "".join(token.text for token in run)
    return text, run.summary
