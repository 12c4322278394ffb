"""What the decode loop asks of an engine: a body that keeps a text's state, and a head. No torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.exact import Record
from flashhead_edge.head import Step

Array = Any  # numpy.ndarray or torch.Tensor: an engine's own kind, which the loop hands on from its body to its head


class Tokenizer(Protocol):
    """What the loop asks of a tokenizer: transformers' own have it, and so has `jetson.tokenizer`, which needs none of them."""

    chat_template: Any  # empty or None: there is none

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """What the template knows of it: "bos_token" and so on."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., *, clean_up_tokenization_spaces: bool | None = ...) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tools: Any = ..., tokenize: bool = ..., add_generation_prompt: bool = ...) -> Any: ...


class BodySession(Protocol):
    """A model's body in the middle of one text."""

    def feed(self, ids: Sequence[int]) -> Array:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d], the caller's to keep."""
        ...

    @property
    def can_cut(self) -> bool:
        """Whether `cut` leaves no trace; where it would, a round is prepared by `snapshot` and undone by `restore`."""
        ...

    def cut(self, tokens: int) -> None:
        """Forget the last `tokens` positions."""
        ...

    def snapshot(self) -> Any:
        """The state as it is; what is fed later does not change it."""
        ...

    def restore(self, kept: Any) -> None:
        """Go back to a snapshot, which must not be used again."""
        ...


@dataclass(frozen=True, eq=False)
class Chosen:
    """A token that a body has chosen itself, and what its head's step says of itself, as `Step` has it."""

    token: int
    counts: Array  # [1, 2 + stages]
    capped: Array  # [1]


@runtime_checkable
class Continues(Protocol):
    """A session whose device chooses tokens and feeds them back, without waiting for the loop."""

    def continues(self, sampling: Sampling) -> bool:
        """Whether it can by these settings."""
        ...

    def continued(self, most: int, sampling: Sampling) -> Generator[Chosen, None, None]:
        """Up to `most` tokens after what was fed last. Of those that were yielded all but the last have been fed; the caller may close it at any of them."""
        ...


@runtime_checkable
class ReadsStates(Protocol):
    """A session that gives the states of several tokens at once: what drafts are verified from."""

    def states(self, ids: Sequence[int]) -> Array:
        """Run tokens after what the cache holds: hidden states of all of them, [n, d], the caller's to keep."""
        ...


@runtime_checkable
class FeedsTogether(Protocol):
    """A session that can be fed in one pass with others of its engine: the weights are read once for all of them."""

    def feed_together(self, sessions: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Array | None]:
        """`feed` of a token to each of some sessions of one engine, with the same results: hidden states, [1, d] each. What fails has changed none of them.

        Of a session in the middle of `continued` the token is the one that it yielded last, the state is None, and the next token is yielded without a pass.
        """
        ...


@dataclass(frozen=True, eq=False)
class Verified:
    """The greedy tokens after each of several, and what the head's steps say of themselves, as `Step` has it."""

    token: Array  # [n]
    counts: Array  # [n, 2 + stages]
    capped: Array  # [n]


@runtime_checkable
class Verifies(Protocol):
    """A session whose head's steps come with its states: a draft is verified without the candidates, which nobody looks at."""

    def tokens_after(self, ids: Sequence[int]) -> Verified:
        """Run tokens after what the cache holds: the greedy token after each of them."""
        ...


class TextEngine(Protocol):
    """A model with its fast head, ready to decode on one device."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: pieces of text stay empty."""
        ...

    @property
    def scale(self) -> float:
        """The model multiplies its raw logits by this, then caps them softly by `softcap`."""
        ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def record(self) -> Record:
        """What exact mode has found so far."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens that can be returned."""
        ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def embedding_rows(self) -> int:
        """Tokens that can be fed: not fewer than `vocab_size`."""
        ...

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for, where it says so."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]: ...

    def body(self) -> BodySession:
        """The body at the start of a new text."""
        ...

    def body_reads(self) -> float:
        """What one step of the body reads, in reads of the dense head."""
        ...

    def step_bytes(self, counts: np.ndarray) -> float:
        """Bytes that a step of the fast head read, from its counts [1, 2 + stages]."""
        ...

    def step(self, hidden: Array) -> Step:
        """One step of the fast head, for hidden states [N, d]."""
        ...

    def step_with_logits(self, hidden: Array) -> tuple[Step, Array]:
        """The same, and full-width raw logits [1, V]."""
        ...

    def exact_logits(self, hidden: Array, tokens: np.ndarray) -> Array:
        """Raw logits of tokens [C] int64 by the model's own rows, [1, C] float32."""
        ...

    def dense_tokens(self, states: Sequence[Array]) -> list[int]:
        """The dense head's greedy tokens of hidden states, each [1, d]; the smaller id on ties."""
        ...
