"""A transformers model ready to decode on one device: loading it, running its body without its head. torch.

The body is the model itself, with its own cache; only the output embedding is tapped, so that hidden states come out
where logits would.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.capture import check_finite
from flashhead_edge.costs import bytes_per_step
from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.exact import Record
from flashhead_edge.head import Step
from flashhead_edge.integrations.hf import head_on_device, output_head
from flashhead_edge.reference import dense_tokens, exact_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flashhead_edge.kernels.head import CudaHead
    from flashhead_edge.reference import TorchHead


@dataclass(frozen=True, eq=False)
class Engine:
    """A model, its tokenizer and its fast head, ready to decode on one device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None: pieces of text stay empty
    head: TorchHead | CudaHead
    scale: float = 1.0  # the model multiplies its raw logits by this,
    softcap: float | None = None  # then caps them softly
    record: Record = field(default_factory=Record)

    @property
    def vocab_size(self) -> int:
        return self.head.index.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.head.index.hidden_size

    @property
    def embedding_rows(self) -> int:
        return len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for, where its config says so."""
        config = self.model.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where transformers' generate stops; the tokenizer's end of sequence where the model names none."""
        found = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        if found is None and self.tokenizer is not None:
            found = self.tokenizer.eos_token_id
        return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)

    def body(self) -> Body:
        return Body(self.model)

    def body_reads(self) -> float:
        """Parameters without embeddings, by count."""
        outside = {id(p) for m in (self.model.get_input_embeddings(), output_head(self.model)) for p in m.parameters()}
        body = sum(p.numel() for p in self.model.parameters() if id(p) not in outside)
        return body / (self.vocab_size * self.hidden_size)

    def step_bytes(self, counts: np.ndarray) -> float:
        return float(bytes_per_step(self.head.index, counts, 2 * self.hidden_size)[0])

    @torch.no_grad()
    def step(self, hidden: Tensor) -> Step:
        return self.head.step(hidden)

    @torch.no_grad()
    def step_with_logits(self, hidden: Tensor) -> tuple[Step, Tensor]:
        return self.head.step_with_logits(hidden)

    @torch.no_grad()
    def exact_logits(self, hidden: Tensor, tokens: np.ndarray) -> Tensor:
        return exact_logits(self.head.weight, self.head.bias, hidden, torch.from_numpy(tokens).to(hidden.device))

    @torch.no_grad()
    def dense_tokens(self, states: Sequence[Tensor]) -> list[int]:
        return dense_tokens(self.head.weight, self.head.bias, torch.cat(list(states)), self.vocab_size).tolist()  # type: ignore[no-any-return]


def load_engine(
    folder: str | Path, device: str | None = None, threads: int | None = None, *, dtype: str | None = None, trust_remote_code: bool = False
) -> Engine:
    """Load a FlashHead checkpoint for decoding.

    Args:
        device: a torch device; None is a GPU if there is one.
        threads: threads of the CPU that torch may use; None leaves its own choice.
        dtype: of body and head, by torch's name; None is float32 on a CPU, which adds 16-bit numbers slowly, and what the head is stored in elsewhere.
    Raises:
        CheckpointError: no FlashHead checkpoint, or a broken one.
        SettingsError: `threads` or `dtype` is out of range.
    """
    from flashhead_edge.checkpoint import chosen_device, load_model, load_tokenizer, open_source, read_head, read_index

    device = chosen_device(device)
    kind = getattr(torch, dtype or "float32", None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise SettingsError(f"generate: dtype is {dtype}, expected float32, bfloat16 or float16; call again with one of them")
    if threads is not None:
        if threads < 1:
            raise SettingsError(f"generate: threads is {threads}, expected 1 or more; call again with another value")
        torch.set_num_threads(threads)
    folder = Path(folder)
    if (folder / "body.onnx").is_file():
        raise CheckpointError(f"{folder}: the folder is exported to ONNX, expected a checkpoint; open it with flashhead_edge.jetson.open_engine")
    weights = read_head(open_source(folder, trust_remote_code=trust_remote_code))
    index = read_index(folder, weights)
    if dtype is None and torch.device(device).type != "cpu":
        kind = weights.weight.dtype
    model = load_model(folder, device=device, dtype=kind, trust_remote_code=trust_remote_code)
    module = output_head(model)
    bias = module.bias if "bias" in module._parameters else None
    head = head_on_device(index, module.weight.detach(), None if bias is None else bias.detach())  # type: ignore[operator, union-attr, arg-type]
    return Engine(model, load_tokenizer(folder, trust_remote_code=trust_remote_code), head, weights.scale, weights.softcap)


class Body:
    """The model without its head: tokens go in, the hidden state that would reach the head comes out."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self.model = model
        self.module = output_head(model)
        self.cache = DynamicCache(config=model.config)
        self.keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d]."""
        return self._run(ids, 1)

    def states(self, ids: Sequence[int]) -> Tensor:
        """Run tokens after what the cache holds: hidden states of all of them, [n, d]."""
        return self._run(ids, len(ids))

    @torch.no_grad()
    def _run(self, ids: Sequence[int], wanted: int) -> Tensor:
        from flashhead_edge.checkpoint import cache_arguments

        tapped: list[Tensor] = []

        def tap(hidden: Tensor) -> Tensor:
            tapped.append(hidden[0, -wanted:].detach().clone())
            return hidden[..., :1]

        before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = tap
        try:
            tokens = torch.tensor([list(ids)], device=self.module.weight.device)  # type: ignore[union-attr, arg-type]
            options = {"logits_to_keep": wanted} if self.keeps_few else {}
            self.model(input_ids=tokens, **cache_arguments(self.model, self.cache), **options)
        finally:
            if before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = before
        check_finite(tapped[0])
        return tapped[0]

    @property
    def can_cut(self) -> bool:
        """Whether the cache can be cut back without a trace: full attention in every layer.

        A window forgets what it slid over, and a recurrent state what it was: those are copied before a round.
        """
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def cut(self, tokens: int) -> None:
        """Forget the last `tokens` positions."""
        if tokens:
            self.cache.crop(-tokens)

    def snapshot(self) -> Any:
        return copy.deepcopy(self.cache)

    def restore(self, kept: Any) -> None:
        self.cache = kept
