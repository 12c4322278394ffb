"""Hidden states that reach a model's output head: of texts given, and of text that the model samples from itself.

The head is the module that `get_output_embeddings` names, and its input is what is recorded, so that whatever a family
does between its body and its head (scales, projections) is in the states.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_edge.checkpoint import cache_arguments
from flashhead_edge.checkpoint.chat_template import chat_text
from flashhead_edge.errors import TEMPLATE_FAULTS, CheckpointError, SettingsError, UnsupportedModelError, first_line
from flashhead_edge.progress import Progress, silent

WINDOW = 512  # tokens that a text is read in at a time
SAMPLE_LENGTH = 128  # tokens of one sample of the model's own text
# beginnings of kinds of text that a random token seldom leads to: data, code, markup, lists, other languages and scripts
OPENERS = (
    *('{"', '[{"', '{\n  "', "id,", "<?xml ", "---\n", "| "),
    *("def ", "import ", "class ", "function ", "#include <", "SELECT ", "$ "),
    *("<div ", "\\begin{", "# ", "- ", "1. ", '"'),
    *("Der ", "La ", "El ", "O ", "В ", "在", "この", "यह ", "في "),
)
DATASET_CHARACTERS = 2_000_000  # read of a data set at most
READ_ROWS = 8  # samples that are read again at a time
USER_TURN = (4, 48)  # tokens of a user's turn, at least and at most, in a chat that the model writes
BATCH_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}  # of keys, values and logits in one batch of samples: beyond it nothing gets faster


@dataclass(frozen=True)
class Part:
    """A part of the own text: samples of one temperature."""

    temperature: float
    share: float  # of all states
    twice: bool  # read the samples a second time, each after itself: as many states again


MIXTURE = (Part(1.0, 0.56, False), Part(1.4, 0.22, True))


@dataclass(frozen=True, eq=False)
class Source:
    """Hidden states of one text, with what the record of a calibration says of it."""

    name: str
    states: Tensor  # [n, d] float16, or float32 where a value does not fit
    own: bool  # the model wrote it
    digest: str  # sha256 of the text as tokens


@contextlib.contextmanager
def recording(model: Any, *, compute: bool) -> Iterator[list[Tensor]]:
    """Collect what reaches the head, each [..., d]; the head scores the last place only, with `compute` False none."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embeddings, expected a causal language model; choose another model")
    seen: list[Tensor] = []
    original = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden)
        return original(hidden[..., -1:, :], *args, **kwargs) if compute else hidden[..., :1]

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward


def check_finite(states: Tensor) -> None:
    """Raise CheckpointError where a model gives states that are no numbers."""
    if not bool(states.isfinite().all()):
        raise CheckpointError("hidden states: NaN or infinity found, expected finite values; the model's weights are damaged: fetch the model again")


def compact(states: Tensor) -> Tensor:
    """States in half the memory, where every value fits.

    Raises:
        CheckpointError: a value is no number: the model's weights are damaged.
    """
    check_finite(states)
    half = states.to(torch.float16)
    return half if bool(half.isfinite().all()) else states.float()


def capture_ids(model: Any, ids: Tensor, window: int = WINDOW, progress: Progress = silent, message: str = "reading text") -> Tensor:
    """Hidden states of a text read in windows that know nothing of each other.

    Args:
        ids: [n] int64 token ids.
    Returns:
        [n, d] float32 on the CPU.
    """
    device = model.get_input_embeddings().weight.device
    out: list[Tensor] = []
    with torch.inference_mode(), recording(model, compute=False) as seen:
        for start in range(0, len(ids), window):
            model(input_ids=ids[None, start : start + window].to(device), use_cache=False)
            out.append(seen.pop().reshape(-1, seen_width(model)).float().cpu())
            check_finite(out[-1])
            progress(message, min(1.0, (start + window) / len(ids)))
    return torch.cat(out) if out else torch.zeros(0, seen_width(model))


def seen_width(model: Any) -> int:
    """d, the width of the states that reach the head."""
    return int(model.get_output_embeddings().weight.shape[1])


def capture_text(model: Any, tokenizer: Any, name: str, text: str, positions: int, progress: Progress = silent) -> Source:
    """Hidden states of the first `positions` tokens of a text, which is called by the end of `name`."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:positions], dtype=torch.int64)
    if len(ids) == 0:
        raise SettingsError(f"calibration text {name}: no tokens found, expected at least one; give a file with text in it")
    states = capture_ids(model, ids, progress=progress, message=f"reading {Path(name).name}")
    return Source(Path(name).name, compact(states), False, digest_of(ids))


def read_text(name: str) -> str:
    """A text by its name: a UTF-8 file, or ``datasets:NAME[/CONFIG][:SPLIT[:COLUMN]]``, a data set on the hub.

    Raises:
        SettingsError: there is no such text, or it cannot be read as one.
    """
    if name.startswith("datasets:"):
        return _read_dataset(name)
    path = Path(name)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no such file"
        raise SettingsError(f"calibration text {name}: {found}, expected a text file or datasets:NAME; check the path")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"calibration text {name}: byte {error.start} is not UTF-8, expected UTF-8 text; convert the file") from error


def _read_dataset(name: str) -> str:
    """The first rows of a data set, joined."""
    try:
        import datasets
    except ImportError as error:
        raise SettingsError(f"{name}: the package datasets is not installed, expected for a data set's name; pip install datasets, or give a file") from error
    path, *rest = name.removeprefix("datasets:").split(":")
    parts = path.split("/")
    # OWNER/NAME or OWNER/NAME/CONFIG; a name without owner has no slash
    configuration = parts[2] if len(parts) > 2 else None
    column = rest[1] if len(rest) > 1 else "text"
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), configuration, split=rest[0] if rest else "train", streaming=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name}: the data set cannot be opened ({' '.join(str(error).split())}), check its name, split and the network") from error
    pieces: list[str] = []
    size = 0
    for row in rows:
        if column not in row:
            raise SettingsError(f"{name}: no column {column}, its columns are {', '.join(row)}; name one of them: datasets:NAME:SPLIT:COLUMN")
        pieces.append(str(row[column]))
        size += len(pieces[-1])
        if size > DATASET_CHARACTERS:
            break
    return "\n\n".join(pieces)


def digest_of(ids: Tensor) -> str:
    """Names a text by its tokens."""
    return hashlib.sha256(ids.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class ChatFrame:
    """The tokens that a family's chat template puts around a user's words."""

    before: list[int]
    after: list[int]  # up to where the assistant's words stand


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of a first chat turn, or None where the family has no chat template.

    Raises:
        CheckpointError: the template cannot be read, refuses or fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\u2063"  # a character that templates leave alone, to find where the user's words stand
    from jinja2 import TemplateError

    try:
        text = chat_text(tokenizer, [{"role": "user", "content": mark}])
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        raise CheckpointError(
            f"chat template: it fails on a user's message ({first_line(error)}), expected one that writes it; restore the model's template, or remove it"
        ) from error
    before, _, after = text.partition(mark)
    before_ids, after_ids = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))
    return ChatFrame(before_ids, after_ids) if before_ids else None


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch of samples of the model's own text."""

    part: Part
    start: Tensor  # [n, s] int64: what stood there before, the first token of each sample last
    ids: Tensor  # [n, SAMPLE_LENGTH] int64, its first column the last of `start`
    states: Tensor  # [n * SAMPLE_LENGTH, d] float32, those of `ids`


def sample_own_text(model: Any, tokenizer: Any, vocab_size: int, positions: int, seed: int = 0, progress: Progress = silent) -> Source:
    """Hidden states of text that the model samples from itself.

    As `own_samples` draws them; what stands in a part of `MIXTURE` that is read twice is read a second time, each
    sample after itself: the states in which a model copies rare words from its context, which given text has and
    sampled text lacks.

    Returns:
        `Source` of at least `positions` states: whole samples, of each part an even number.
    """
    states, ids = [], []
    for batch in own_samples(model, tokenizer, vocab_size, positions, seed, progress):
        states.append(compact(batch.states))
        ids.append(batch.ids)
        if batch.part.twice:
            states.append(compact(_second_reading(model, batch.ids, progress)))
    if len({s.dtype for s in states}) > 1:
        states = [s.float() for s in states]
    return Source("own text", torch.cat(states), True, digest_of(torch.cat([i.flatten() for i in ids])))


def own_samples(model: Any, tokenizer: Any, vocab_size: int, positions: int, seed: int = 0, progress: Progress = silent) -> Iterator[Samples]:
    """Text that the model samples from itself, batch by batch: rows enough for `positions` states in `sample_own_text`.

    Most samples are drawn at temperature 1, some at 1.4 (`MIXTURE`): what a model writes when it is pushed off its path
    is nearer to text that it does not know. One third of the samples are chats, where there is a template: the model
    writes a user's turn of random length, and then the answer. The others begin, after the family's first token, if it
    has one, with a random token or with one of `OPENERS`, half of them each. End tokens are never sampled, so that
    every sample is full; that the model wanted one is still seen in the state. What all chats begin with is no part of
    `ids`.
    """
    device = model.get_input_embeddings().weight.device
    rows = -(-positions // SAMPLE_LENGTH)
    frame = chat_frame(tokenizer)
    generator, noise = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    ordinary = torch.ones(vocab_size)
    ordinary[[i for i in set(tokenizer.all_special_ids) if i < vocab_size]] = 0
    first_id = tokenizer.bos_token_id
    begin = [first_id] if first_id is not None and tokenizer("a").input_ids[:1] == [first_id] else []
    openers = [ids for ids in (tokenizer(text, add_special_tokens=False).input_ids for text in OPENERS) if ids]
    starts: list[tuple[str, Part, Tensor, Tensor]] = []
    for part in MIXTURE:
        n = 2 * math.ceil(rows * part.share / 2)
        chats = n // 6 * 2 if frame else 0
        first = torch.multinomial(ordinary, n - chats, replacement=True, generator=generator)
        openings = [[t] for t in first.tolist()]
        if openers:
            openings[1::2] = [openers[i] for i in torch.randint(len(openers), (len(openings) // 2,), generator=generator).tolist()]
        starts.append(("own text", part, torch.tensor([[*begin, o[0]] for o in openings]), _forced([(0, o[1:]) for o in openings])))
        if chats and frame:
            turns = torch.randint(USER_TURN[0], USER_TURN[1] + 1, (chats,), generator=generator).tolist()
            starts.append(("own chats", part, torch.tensor([frame.before]).expand(chats, -1), _forced([(n, frame.after) for n in turns])))
    ends = end_ids(model, tokenizer, vocab_size)
    done, total = 0, sum(len(s) for _, _, s, _ in starts)
    for message, part, start, forced in starts:
        batches = -(-len(start) // _batch_rows(model, SAMPLE_LENGTH + start.shape[1]))
        # an even number of samples each: folds alternate from sample to sample, and a second reading stays in the fold of its first
        pairs = -(-len(start) // 2 // batches)
        for opened, given in zip(start.split(2 * pairs), forced.split(2 * pairs)):

            def said(share: float, done: int = done, n: int = len(opened), message: str = message) -> None:
                progress(f"sampling {message}", (done + n * share) / total)

            states, ids = _sample(model, opened.to(device), given.to(device), vocab_size, ends, noise, part.temperature, said)
            done += len(opened)
            yield Samples(part, opened, ids, states)


def _second_reading(model: Any, ids: Tensor, progress: Progress) -> Tensor:
    """States of texts [n, length] read after themselves, [n * length, d] float32 on the CPU."""
    parts = []
    with torch.inference_mode(), recording(model, compute=False) as seen:
        for start, text in enumerate(ids.to(model.get_input_embeddings().weight.device).split(READ_ROWS)):
            model(input_ids=torch.cat([text, text], 1), use_cache=False)
            parts.append(seen.pop().reshape(len(text), 2 * ids.shape[1], -1)[:, ids.shape[1] :].float().cpu())
            check_finite(parts[-1])
            progress("reading own text again", min(1.0, (start + 1) * READ_ROWS / len(ids)))
    return torch.cat(parts).flatten(0, 1)


def _forced(given: list[tuple[int, list[int]]]) -> Tensor:
    """What is not sampled, [n, SAMPLE_LENGTH] int64, -1 elsewhere: a row's tokens, from the place on where they stand."""
    forced = torch.full((len(given), SAMPLE_LENGTH), -1)
    for row, (place, ids) in zip(forced, given):
        row[place : place + len(ids)] = torch.tensor(ids[: SAMPLE_LENGTH - place], dtype=torch.int64)
    return forced


def _batch_rows(model: Any, length: int) -> int:
    """Samples of `length` tokens in one batch: their keys, values and a step's logits stay within `BATCH_BYTES`."""
    most = BATCH_BYTES["cpu" if model.get_input_embeddings().weight.device.type == "cpu" else "cuda"]
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * size * length * 4 + 3 * 4 * config.vocab_size
    return max(2, min(256, most // each))


def end_ids(model: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """Tokens that end a text or a turn, ascending."""
    ends = model.generation_config.eos_token_id if getattr(model, "generation_config", None) is not None else None
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    ends += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return sorted({e for e in ends if 0 <= e < vocab_size})


def _sample(
    model: Any, ids: Tensor, forced: Tensor, vocab_size: int, ends: list[int], generator: torch.Generator, temperature: float, progress: Any
) -> tuple[Tensor, Tensor]:
    """Go on from `ids` [n, start], sampling a token wherever `forced` [n, length] names none.

    Returns:
        States [n * length, d], from that of the last start token on, and the ids that they are of, [n, length].
    """
    from transformers import DynamicCache

    parts: list[Tensor] = []
    step_ids, written = ids, [ids[:, -1:]]
    cached = cache_arguments(model, DynamicCache(config=model.config))
    with torch.inference_mode(), recording(model, compute=True) as seen:
        while True:
            out = model(input_ids=step_ids, **cached)
            parts.append(seen.pop()[:, -1:].float().cpu())
            check_finite(parts[-1])
            if len(written) == forced.shape[1]:
                break
            logits = out.logits[:, -1, :vocab_size].float()
            logits[:, ends] = -torch.inf
            total = (logits / temperature).softmax(1).cumsum(1)
            # one number in (0, 1] a draw: never 0, which would fall on a token of no probability
            drawn = total[:, -1:] * (1 - torch.rand(len(total), 1, generator=generator, device=total.device))
            step_ids = torch.searchsorted(total, drawn).to(ids.device)
            given = forced[:, len(written) - 1 : len(written)]
            step_ids = torch.where(given >= 0, given, step_ids)
            written.append(step_ids)
            progress(len(written) / forced.shape[1])
    return torch.cat(parts, 1).flatten(0, 1), torch.cat(written, 1).cpu()
