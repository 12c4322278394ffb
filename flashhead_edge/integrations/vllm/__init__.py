"""The vLLM plugin: vLLM finds `register` through the entry point group `vllm.general_plugins`, and serves FlashHead checkpoints from then on.

A checkpoint names its architecture ``FlashHead<Original>``. Each such name is registered as a subclass of vLLM's own
<Original>, made when it is first asked for (`models`); it replaces the head's `quant_method` by one that computes
full-width logits with a FlashHead (`method`), and nothing else. vLLM's classes are not patched.
"""

from __future__ import annotations

import logging

PREFIX = "FlashHead"
TRIED = {(0, 26): "on an H100, both model runners", (0, 32): "on a CPU, runner V1"}  # versions of vLLM by their first two numbers
HOOKS = (  # what the plugin leans on
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading",
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.apply",
    "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
    "vllm.model_executor.models.registry:ModelRegistry.models",
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
    "vllm.config:VllmConfig.use_v2_model_runner",
    "vllm.v1.worker.gpu.model_states:init_model_state",
    "vllm.v1.sample.logits_processor:process_dict_updates",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.preprocess_state",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.custom_sampler",
    "vllm.v1.worker.gpu.input_batch:get_num_sampled_and_rejected",
    "vllm.v1.worker.gpu.sample.output:SamplerOutput",
)
GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # how names of architectures end that have a head


def register() -> None:
    """Make the FlashHead architectures known to vLLM. Called by vLLM in each of its processes, whatever it serves, perhaps more than once.

    Nothing is refused here, since a plain checkpoint shall not suffer: what is wrong is said where a FlashHead model is made, or, where not even its
    name can be made known, in the log.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from flashhead_edge.integrations.vllm.rules import config_rule
    except ImportError as error:
        logging.getLogger("vllm.flashhead").warning("FlashHead: this vLLM cannot serve its checkpoints (%s); FlashHead was tried with %s", error, span())
        return
    known = set(ModelRegistry.get_supported_archs())
    for name in known:
        if name.startswith(PREFIX) or PREFIX + name in known or not name.endswith(GENERATES):
            continue
        ModelRegistry.register_model(PREFIX + name, f"{__name__}.models:{PREFIX}{name}")
        MODELS_CONFIG_MAP[PREFIX + name] = config_rule(MODELS_CONFIG_MAP.get(name))  # what vLLM settles for an architecture's name


def check_version() -> str | None:
    """What to say of the version of vLLM, None where it was tried.

    Raises:
        DeviceError: it is older than what was tried, or lacks what the plugin leans on.
    """
    from vllm.version import __version__, __version_tuple__

    from flashhead_edge.errors import DeviceError

    numbers = tuple(n for n in __version_tuple__[:2] if isinstance(n, int))
    unknown = numbers < (0, 2)  # a tree without tags calls itself 0.0 or 0.1.dev
    missing = missing_hooks()
    if (numbers < min(TRIED) and not unknown) or missing:
        lacks = f", which lacks {', '.join(missing)}" if missing else ""
        raise DeviceError(f"vLLM: version {__version__} is installed{lacks}, FlashHead was tried with {span()}; install one of them")
    if numbers not in TRIED:
        return f"vLLM {__version__} was not tried, FlashHead was with {span()}; it has all that FlashHead leans on"
    return None


def missing_hooks() -> list[str]:
    """What the plugin leans on in vLLM and this version does not have, by name."""
    import importlib

    missing = []
    for path in HOOKS:
        module, _, names = path.partition(":")
        try:
            found = importlib.import_module(module)
            for name in names.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            missing.append(path)
    return missing


def span() -> str:
    """The versions that were tried, and where."""
    return ", ".join(f"{major}.{minor} ({where})" for (major, minor), where in TRIED.items())
