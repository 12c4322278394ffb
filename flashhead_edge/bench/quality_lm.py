"""A checkpoint as a model of lm-evaluation-harness, which answers for its dense head and for FlashHead.

The harness runs twice, once a head. The body's work is done once: each request is answered for both heads from the same hidden
states, and the second run finds its answers kept. So nothing but the head can differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GenerationConfig

from flashhead_edge.capture import check_finite, recording
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation import Measured, measure_all
from flashhead_edge.evaluation.measures import Contender, Dense
from flashhead_edge.integrations.hf import FlashHead
from flashhead_edge.progress import Progress, silent

HEADS = ("dense", "FlashHead")
DROPPED = {"do_sample", "temperature", "top_p", "top_k"}  # how a task would sample: answers are greedy here
Answers = tuple[Any, Any]  # in the order of HEADS


@dataclass(eq=False)
class Tally:
    """What was seen of one task, for both heads."""

    measured: list[Measured] = field(default_factory=list)  # of likelihood requests: every token whose probability is asked
    steps: int = 0  # of generated text: steps of the dense head's texts, on whose states both heads answered
    same: int = 0  # of them with the same token


@dataclass(eq=False)
class Kept:
    """Answers of the first run, for the second."""

    answers: dict[Any, Answers] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


class HeadLM(HFLM):  # type: ignore[misc]
    """The harness's own transformers model, with the head told apart.

    `side` says whose answers it gives, an index of HEADS. Greedy, one request at a time, so that no padding is in any text.
    """

    def __init__(self, model: Any, tokenizer: Any, flash: FlashHead, dense: Dense, contender: Contender, scale: float, softcap: float | None) -> None:
        """
        Args:
            model: with its own head, which it keeps but while `flash` writes text of its own.
            dense, contender: both heads, as `evaluation` measures them.
            scale, softcap: what the model does to logits after the head.
        """
        stops = model.generation_config
        # penalties and sampling that the model's own settings ask for would change what both heads choose
        model.generation_config = GenerationConfig(bos_token_id=stops.bos_token_id, eos_token_id=stops.eos_token_id, pad_token_id=stops.pad_token_id)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self.flash, self.dense, self.contender, self.after = flash, dense, contender, (scale, softcap)
        self.module = model.get_output_embeddings()
        flash.attach(model)  # once: it hashes the matrix
        self.reduced = self.module.forward
        flash.detach()
        self.side = 0
        self.kept = Kept()
        self.progress: Progress = silent

    def _answered(self, key: Any, make: Any) -> Any:
        """This side's answer to a request, made for both sides where it is new."""
        if key not in self.kept.answers:
            self.kept.answers[key] = make()
        return self.kept.answers[key][self.side]

    # --- likelihood -------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        answers = []
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SettingsError(
                    f"task: a text of {len(continuation):,} tokens is to be scored, expected the model's {self.max_length:,} at most; choose another task"
                )
            key = ("likelihood", tuple(context), tuple(continuation))
            answers.append(self._answered(key, lambda c=context, t=continuation: self._likelihood(c, t)))
            if override_bs is None:  # else these are the windows of one text, whose progress is said there
                self.progress("scoring continuations", (i + 1) / len(requests))
        return answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        answers: list[float] = []
        for i, request in enumerate(requests):
            answers += super().loglikelihood_rolling([request], disable_tqdm=True)
            self.progress("scoring texts", (i + 1) / len(requests))
        return answers

    def _likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Answers:
        """Both heads over the states that stand before a continuation's tokens."""
        ids = [*context, *continuation][-(self.max_length + 1) :][:-1]  # as the harness cuts what is too long: on the left
        with torch.inference_mode(), recording(self.model, compute=False) as seen:
            self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        hidden = seen.pop()[0, -len(continuation) :].float()
        check_finite(hidden)
        targets = np.asarray(continuation, np.int64)
        scale, softcap = self.after
        vocab_size = self.flash.index.vocab_size
        (found,) = measure_all([self.contender], hidden, targets, self.dense, vocab_size=vocab_size, scale=scale, softcap=softcap)
        self.kept.tally.measured.append(found)
        dense = (-float(found.loss_dense.sum()), bool((found.dense_token == targets).all()))
        return dense, (-float(found.loss.sum()), bool((found.token == targets).all()))

    # --- text -------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = []
        for i, request in enumerate(requests):
            answers += super().generate_until([request], disable_tqdm=True)
            self.progress("writing answers", (i + 1) / len(requests))
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """The greedy text after a prompt [1, n], with it."""
        options.pop("attention_mask", None)  # one text, no padding
        unknown = sorted(options.keys() - DROPPED)
        if unknown:
            raise SettingsError(f"task: its text is to be generated with {', '.join(unknown)}, expected plain greedy text; choose another task")
        key = ("text", tuple(context[0].tolist()), max_length, tuple(stop))
        return self._answered(key, lambda: self._texts(context, max_length, stop))

    def _texts(self, context: Tensor, max_length: int, stop: list[str]) -> Answers:
        """The dense head's text, and FlashHead's.

        FlashHead's text is the dense one's up to the first state of it on which FlashHead names another token; only from there on it is
        generated, over the model with FlashHead attached.
        """
        states: list[Tensor] = []
        watching = self.module.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1:].detach().float()))
        try:
            dense = self._greedy(context, max_length, stop)
        finally:
            watching.remove()
        start = context.shape[1]
        said = dense[0, start:].cpu().numpy()
        found = self.contender.find(torch.cat(states), full=False).token
        same = found == said
        self.kept.tally.steps += len(said)
        self.kept.tally.same += int(same.sum())
        if same.all():
            return dense, dense
        first = int(same.argmin())
        token = torch.tensor([[int(found[first])]], device=dense.device)
        begun = torch.cat([dense[:, : start + first], token], 1)
        if begun.shape[1] >= max_length or int(token) in self._ends():
            return dense, begun
        self.module.forward = self.reduced
        try:
            return dense, self._greedy(begun, max_length, stop)
        finally:
            del self.module.forward

    def _greedy(self, context: Tensor, max_length: int, stop: list[str]) -> Tensor:
        with torch.inference_mode():
            return super()._model_generate(context, max_length, stop, attention_mask=torch.ones_like(context), do_sample=False)

    def _ends(self) -> set[int]:
        """The tokens that end a text."""
        found = self.model.generation_config.eos_token_id
        return set() if found is None else {found} if isinstance(found, int) else set(found)
