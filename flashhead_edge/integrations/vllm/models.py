"""``FlashHead<Original>``, for any of vLLM's architectures: a subclass made when its name is looked up in this module."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig

from flashhead_edge.integrations.vllm import PREFIX
from flashhead_edge.integrations.vllm.method import install


def __getattr__(name: str) -> type[nn.Module]:
    original = name.removeprefix(PREFIX)
    if original == name or original not in ModelRegistry.models:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    made = subclass(name, ModelRegistry.models[original].load_model_cls())
    globals()[name] = made
    return made


def subclass(name: str, original: type[nn.Module]) -> type[nn.Module]:
    """The class `original` of vLLM with a FlashHead in the place of its head."""

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        original.__init__(self, vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        install(self, vllm_config)

    return type(name, (original,), {"__init__": __init__, "__module__": __name__, "__doc__": f"vLLM's {original.__name__} with a FlashHead."})
