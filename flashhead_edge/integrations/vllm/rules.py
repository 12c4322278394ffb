"""What vLLM settles for an architecture's name before a model is made, for the FlashHead names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from flashhead_edge.integrations.vllm.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROCESSOR = "flashhead_edge.integrations.vllm.requests:AskedByBatch"


def config_rule(original: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """The rule of the original name, if there is one, and what the V1 runner needs of us."""
    base = VerifyAndUpdateConfig if original is None else original

    class Rule(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            base.verify_and_update_config(vllm_config)
            settings = read_settings(vllm_config.additional_config)
            model = vllm_config.model_config
            if model.runner_type == "pooling" or not settings.enabled or not settings.exact_for:
                return
            if vllm_config.speculative_config is not None or vllm_config.use_v2_model_runner:
                return  # V1 refuses processors beside drafts, V2 has a hook of its own
            if PROCESSOR not in (model.logits_processors or ()):
                model.logits_processors = [*(model.logits_processors or ()), PROCESSOR]

    return Rule
