"""The FlashHead names in vLLM's registry: what vLLM knows of an architecture it knows of its FlashHead."""

import dataclasses
import functools
import re

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see docs/vllm.md")

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import _ModelInfo

from flashhead_edge.integrations.vllm import HOOKS, check_version, missing_hooks, register, span
from flashhead_edge.integrations.vllm.models import adds_nothing

NAMES = [
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.mark.parametrize("name", NAMES)
def test_vllm_knows_as_much_of_a_flashhead_as_of_the_original(name):
    """Whether it is multimodal, hybrid, takes LoRA, can be cut into a pipeline, ...; its processor of images; its rule for settings."""
    if name not in ModelRegistry.get_supported_archs():
        pytest.skip("this vLLM does not have it")
    if name.endswith("ForConditionalGeneration"):
        pytest.importorskip("torchvision", reason="vLLM's multimodal models need it")
    original, flash = (ModelRegistry.models[n].load_model_cls() for n in (name, f"FlashHead{name}"))
    assert issubclass(flash, original) and flash.__name__ == f"FlashHead{name}"
    known, found = (dataclasses.asdict(_ModelInfo.from_model_cls(c)) for c in (original, flash))
    assert {k for k in known if known[k] != found[k]} <= {"architecture"}
    assert getattr(flash, "_processor_factory", None) is getattr(original, "_processor_factory", None)
    rule = MODELS_CONFIG_MAP.get(name)
    assert rule is None or issubclass(MODELS_CONFIG_MAP[f"FlashHead{name}"], rule)


def test_only_names_of_models_that_generate_are_registered():
    assert not [
        name for name in ModelRegistry.get_supported_archs() if name.startswith("FlashHead") and not name.endswith(("ForCausalLM", "Generation", "Model"))
    ]
    assert "FlashHeadBertModel" not in ModelRegistry.get_supported_archs()


def test_registering_again_changes_nothing():
    before = dict(MODELS_CONFIG_MAP)
    register()
    assert before == MODELS_CONFIG_MAP


def test_this_version_has_what_the_plugin_leans_on(monkeypatch):
    assert missing_hooks() == [] and check_version() is None
    monkeypatch.setattr("flashhead_edge.integrations.vllm.HOOKS", (*HOOKS, "vllm.config:NoSuchThing"))
    with pytest.raises(
        Exception, match=re.escape(f"is installed, which lacks vllm.config:NoSuchThing, FlashHead was tried with {span()}; install one of them")
    ):
        check_version()


@pytest.mark.parametrize(
    ("version", "numbers", "said"),
    [
        ("0.26.0", (0, 26, 0), None),
        ("0.32.1+cpu", (0, 32, 1), None),
        ("0.33.0", (0, 33, 0), "vLLM 0.33.0 was not tried, FlashHead was with 0.26 (on an H100"),
        ("0.29.0", (0, 29, 0), "vLLM 0.29.0 was not tried"),
        ("dev", (0, 0, "dev"), "vLLM dev was not tried"),
    ],
)
def test_versions_are_named(monkeypatch, version, numbers, said):
    monkeypatch.setattr("vllm.version.__version__", version)
    monkeypatch.setattr("vllm.version.__version_tuple__", numbers)
    found = check_version()
    assert found == said if said is None else found.startswith(said)


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.25.1")
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 25, 1))
    with pytest.raises(Exception, match=re.escape(f"version 0.25.1 is installed, FlashHead was tried with {span()}; install one of them")):
        check_version()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("ForCausalLM")])
def test_greedy_tokens_may_go_alone_in_the_families(name):
    assert adds_nothing(object(), ModelRegistry.models[name].load_model_cls())


def test_a_model_that_changes_its_logits_keeps_them():
    class Masks:
        def compute_logits(self, hidden_states):
            logits = self.logits_processor(self.lm_head, hidden_states)
            logits[:, self.suppressed] = float("-inf")
            return logits

    class Wrapped:
        @functools.wraps(Masks.compute_logits)
        def compute_logits(self, hidden_states):
            return self.logits_processor(self.lm_head, hidden_states) * 2

    class Constant:
        def compute_logits(self, hidden_states):
            logits = self.logits_processor(self.lm_head, hidden_states)
            logits[:, 7] = -1e9
            return logits

    class Plain:
        logits_processor = object()  # none of vLLM's

        def compute_logits(self, hidden_states):
            return self.logits_processor(self.lm_head, hidden_states)

    class Delegates:
        language_model = Masks()

        def compute_logits(self, hidden_states):
            return self.language_model.compute_logits(hidden_states)

    for kind in (Wrapped, Constant, Plain):
        assert not adds_nothing(kind(), kind), kind
    assert not adds_nothing(Masks(), Masks) and not adds_nothing(Delegates(), Delegates) and not adds_nothing(object(), type("None", (), {}))
