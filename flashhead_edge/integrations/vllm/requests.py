"""What the requests of a step ask of the head: exact logits, or no more than a greedy token.

The head sees hidden states alone. Which requests they belong to, vLLM tells a plugin by an official hook of each model
runner, before the head is asked: V2 lets a model name its `ModelState`, which hears of every request and of every step; V1
tells logits processors which requests are in the batch. Both end in an `Asked`, found by the engine's instance id.
"""

from __future__ import annotations

import weakref
from importlib.metadata import entry_points
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from flashhead_edge.integrations.vllm.settings import CONSTRAINED, LOGPROBS, read_settings

# of a request that a greedy token alone answers, everything else is as vLLM sets it by default
FREE = frozenset(
    [
        *("temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "stop", "stop_token_ids", "ignore_eos", "detokenize", "output_kind"),
        *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "skip_clone", "output_text_buffer_length"),
        *("_eos_token_id", "_all_stop_token_ids", "skip_reading_prefix_cache"),
    ]
)
GREEDY_BELOW = 1e-5  # vLLM draws from this temperature on


class Asked:
    """What the requests of the present step ask for. Mutable: vLLM's runner writes it before each step."""

    exact = False  # logits of the dense head for every row
    greedy = False  # greedy tokens alone
    takes_tokens = False  # the sampler takes tokens in the place of logits


ASKED: weakref.WeakValueDictionary[str, Asked] = weakref.WeakValueDictionary()  # by VllmConfig.instance_id


def wants_exact(params: Any, exact_for: tuple[str, ...]) -> bool:
    """Whether a request needs logits of tokens that FlashHead may not have scored exactly."""
    if params is None:
        return False
    raised = any(bias > 0 for bias in (params.logit_bias or {}).values())
    constrained = params.structured_outputs is not None or bool(params.allowed_token_ids) or raised
    shown = params.logprobs is not None or params.prompt_logprobs is not None or bool(getattr(params, "logprob_token_ids", None))
    return (constrained and CONSTRAINED in exact_for) or (shown and LOGPROBS in exact_for)


def wants_greedy(params: Any) -> bool:
    """Whether a greedy token is all that a request needs: a setting that this version of vLLM has and we do not know says no."""
    if params is None or params.temperature >= GREEDY_BELOW:
        return False
    default = type(params)(temperature=0.0)
    return all(getattr(params, name) == getattr(default, name) for name in params.__struct_fields__ if name not in FREE)


class AskedByBatch(LogitsProcessor, Asked):  # type: ignore[misc]
    """Of the V1 runner: a logits processor that changes no logit, and is told before each step which requests are in the batch."""

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool) -> None:
        self.exact_for, self.rows = read_settings(vllm_config.additional_config).exact_for, dict[int, bool]()
        ASKED[vllm_config.instance_id] = self

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, lambda params, prompt, out: True if wants_exact(params, self.exact_for) else None)
        self.exact = bool(self.rows)

    def apply(self, logits: Any) -> Any:
        return logits


def state_class(original: type[nn.Module], model: nn.Module, config: VllmConfig) -> type:
    """Of the V2 runner: the class of a model's state that also hears what requests ask for."""
    base: Any = _state_base(original, model, config)

    class State(base, Asked):  # type: ignore[misc]
        def __init__(self, vllm_config: VllmConfig, *args: Any, **options: Any) -> None:
            super().__init__(vllm_config, *args, **options)
            self.exact_for = read_settings(vllm_config.additional_config).exact_for
            self.wants = dict[int, tuple[bool, bool]]()  # by place among the runner's requests
            ASKED[vllm_config.instance_id] = self

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            self.wants[req_index] = wants_exact(params, self.exact_for), wants_greedy(params)

        def preprocess_state(self, input_batch: Any, *args: Any, **options: Any) -> None:
            wants = [self.wants.get(i, (False, False)) for i in input_batch.idx_mapping_np.tolist()]
            self.exact, self.greedy = any(exact for exact, _ in wants), bool(wants) and all(greedy for _, greedy in wants)
            super().preprocess_state(input_batch, *args, **options)

        def custom_sampler(self, sampler: Any) -> Any:
            given = super().custom_sampler(sampler)
            others = config.model_config.logits_processors or entry_points(group="vllm.logits_processors") or getattr(config, "watermark_config", None)
            if given is not None or others or config.speculative_config is not None or config.parallel_config.tensor_parallel_size > 1:
                return given  # somebody else has a say in the token
            from flashhead_edge.integrations.vllm.greedy import TokenSampler

            self.takes_tokens = True
            return TokenSampler(sampler), None

    State.__name__ = f"FlashHead{base.__name__}"
    return State


def _state_base(original: type[nn.Module], model: nn.Module, config: VllmConfig) -> type:
    """The class that vLLM would give this model, had it no hook of ours."""
    from vllm.v1.worker.gpu import model_states

    if hasattr(original, "get_model_state_cls"):
        return original.get_model_state_cls(model)

    class Plain:
        modules = staticmethod(model.modules)

    if hasattr(model_states, "resolve_model_state_cls"):
        return model_states.resolve_model_state_cls(config, Plain())
    # vLLM 0.26 has no such function: its choice, in its order
    from vllm.model_executor.layers.attention import CrossAttention

    if any(isinstance(module, CrossAttention) for module in model.modules()):
        from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState

        return EncoderDecoderModelState
    if config.model_config.is_hybrid:
        from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

        return MambaHybridModelState
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return DefaultModelState
