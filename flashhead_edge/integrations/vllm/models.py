"""``FlashHead<Original>``, for any of vLLM's architectures: a subclass made when its name is looked up in this module."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from flashhead_edge.integrations.vllm import PREFIX, check_version

PLAIN = {"logits_processor", "lm_head", "language_model", "compute_logits", "model", "embed_tokens"}  # what such a method may look at

CHANGES = (
    "BINARY",
    "INPLACE",
    "UNARY",
    "COMPARE",
    "STORE_SUBSCR",
    "STORE_SLICE",
    "STORE_ATTR",
    "FOR_ITER",
    "LOAD_BUILD_CLASS",
    "MAKE_FUNCTION",
)  # what it may not do


def __getattr__(name: str) -> type[nn.Module]:
    original = name.removeprefix(PREFIX)
    if original == name or original not in ModelRegistry.models:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    made = subclass(name, ModelRegistry.models[original].load_model_cls())
    globals()[name] = made
    return made


@contextlib.contextmanager
def original_names(config: Any) -> Iterator[None]:
    """The original architectures' names in a model's configuration, meanwhile: some models look them up while they are made."""
    names = config.architectures
    config.architectures = [name.removeprefix(PREFIX) for name in names or ()]
    try:
        yield
    finally:
        config.architectures = names


def adds_nothing(model: Any, kind: type[nn.Module]) -> bool:
    """Whether a model's `compute_logits` is its logits processor's answer, or its language model's, and no more: then the best logit is the head's."""
    method = getattr(kind, "compute_logits", None)
    code = getattr(method, "__code__", None)
    if code is None or hasattr(method, "__wrapped__") or code.co_freevars or not set(code.co_names) <= PLAIN:
        return False
    if any(step.opname.startswith(CHANGES) for step in dis.get_instructions(code)):
        return False
    if "language_model" in code.co_names and (inner := getattr(model, "language_model", None)) is not None:
        return adds_nothing(inner, type(inner))
    processor = getattr(model, "logits_processor", None)
    return processor is None or type(processor) is LogitsProcessor


def subclass(name: str, original: type[nn.Module]) -> type[nn.Module]:
    """The class `original` of vLLM with a FlashHead in the place of its head.

    Raises:
        DeviceError: this vLLM is too old, or lacks what the plugin leans on.
    """
    check_version()  # before what follows is imported
    from flashhead_edge.integrations.vllm.method import FlashHeadMethod, install
    from flashhead_edge.integrations.vllm.requests import state_class

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        with original_names(vllm_config.model_config.hf_config):
            original.__init__(self, vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        self.flashhead_config = vllm_config
        self.flashhead = install(self, vllm_config)
        self.flashhead_straight = adds_nothing(self, original)

    def compute_logits(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor | None:
        method: FlashHeadMethod | None = self.flashhead
        if method is not None and self.flashhead_straight and not args and not options and method.takes_tokens(hidden_states):
            return method.tokens(hidden_states)[:, None]  # type: ignore[misc]
        if method is not None:
            method.given = hidden_states
        return original.compute_logits(self, hidden_states, *args, **options)  # type: ignore[attr-defined, no-any-return]

    def load_weights(self: Any, weights: Any, *args: Any, **options: Any) -> Any:
        loaded = original.load_weights(self, weights, *args, **options)  # type: ignore[attr-defined]
        if self.flashhead is not None and self.flashhead.logits is not None:
            self.flashhead.reloaded = True
        return loaded

    def get_model_state_cls(self: Any) -> type:
        return state_class(original, self, self.flashhead_config)

    methods: dict[str, Any] = {"__init__": __init__, "__module__": __name__, "__doc__": f"vLLM's {original.__name__} with a FlashHead."}
    if hasattr(original, "compute_logits"):
        methods |= {"compute_logits": compute_logits, "get_model_state_cls": get_model_state_cls}
    if hasattr(original, "load_weights"):
        methods["load_weights"] = load_weights
    return type(name, (original,), methods)
