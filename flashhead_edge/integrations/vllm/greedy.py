"""Steps whose requests want a greedy token alone, on vLLM's V2 runner: no full-width logits, and none of the sampler's passes over them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput


class TokenSampler:
    """vLLM's sampler; logits one column wide are the tokens themselves."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **options: Any) -> Any:
        if logits.shape[-1] != 1:
            return self._inner(logits, input_batch, *args, **options)
        # one token a request, none of one whose prompt is not at its end: as vLLM's sampler counts them
        sampled, rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self._inner.req_states.prefill_len.gpu,
        )
        return SamplerOutput(sampled_token_ids=logits, logprobs_tensors=None, num_nans=None, num_sampled=sampled, num_rejected=rejected)
