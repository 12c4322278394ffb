"""A checkpoint in the harness: likelihoods against the harness's own model, FlashHead's texts against transformers' own over it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_tools import write_model
from small_heads import everything_open, few_probes

from flashhead_edge.checkpoint import load_model, load_tokenizer
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation import HeadContender
from flashhead_edge.integrations.hf import FlashHead
from flashhead_edge.reference import torch_head
from flashhead_edge.rivals import DenseHead

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra quality")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from flashhead_edge.bench.quality_lm import HeadLM, Kept  # noqa: E402

PAIRS = [("The sky is", " blue"), ("One two three", " four five"), ("", "begun with nothing"), ("x", "y")]
TEXTS = ["A text of some words, and one more.", "b" * 90]
# 32 products and a softmax over 256 tokens, all in float32, logits below 16: 2**-24 x (32 + 256) x 16 a token, of at most 90 tokens
TOKENS = 24  # of a text
ROUNDING = 2**-24 * (32 + 256) * 16 * 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = write_model(tmp_path_factory.mktemp("quality") / "tiny")
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "!"
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


def harness_model(tiny: SimpleNamespace, kind: str = "open") -> HeadLM:
    model = load_model(tiny.folder)
    weight = model.get_output_embeddings().weight.detach()
    index = everything_open(weight, cascade=True) if kind == "open" else few_probes(weight, 20)
    contender = HeadContender(kind, torch_head(index, weight), 2 * index.hidden_size)
    return HeadLM(model, tiny.tokenizer, FlashHead(index), DenseHead(weight, None, index.vocab_size), contender, 1.0, None)


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("made", i, 1)) for i, a in enumerate(arguments)]


def on_both(lm: HeadLM, method: str, requests: list[Any]) -> tuple[list[Any], list[Any]]:
    lm.kept = Kept()
    found = []
    for side in (0, 1):
        lm.side = side
        found.append(getattr(lm, method)(requests))
    return found[0], found[1]


@pytest.mark.parametrize("side", [0, 1])
def test_likelihoods_are_the_harness_s_own(tiny: SimpleNamespace, side: int) -> None:
    """With a head that leaves nothing out, both sides are the plain transformers model of the harness."""
    plain = HFLM(pretrained=load_model(tiny.folder), tokenizer=tiny.tokenizer, backend="causal", batch_size=1)
    lm = harness_model(tiny)
    requests = asked("loglikelihood", PAIRS)
    for (got, greedy), (want, wanted) in zip(on_both(lm, "loglikelihood", requests)[side], plain.loglikelihood(requests)):
        assert got == pytest.approx(want, abs=ROUNDING) and greedy == wanted
    requests = asked("loglikelihood_rolling", [(t,) for t in TEXTS])
    assert on_both(lm, "loglikelihood_rolling", requests)[side] == pytest.approx(plain.loglikelihood_rolling(requests), abs=ROUNDING)
    assert sum(len(m.loss) for m in lm.kept.tally.measured) == sum(len(t) for t in TEXTS)  # a byte is a token here


def test_a_greedy_continuation_is_called_greedy_by_its_own_head(tiny: SimpleNamespace) -> None:
    """The continuation is what each head says next; where they differ, only one of them may call it greedy."""
    lm = harness_model(tiny, "bad")
    differing = 0
    for prompt in "abcdefghijklmnop":
        ids = torch.tensor([tiny.tokenizer(prompt).input_ids])
        with torch.no_grad():
            state = lm.model.model(ids).last_hidden_state[0, -1:]
        tokens = int(lm.dense.tokens(state)[0]), int(lm.contender.find(state, full=False).token[0])
        differing += tokens[0] != tokens[1]
        for mine, token in enumerate(tokens):
            found = on_both(lm, "_loglikelihood_tokens", [(("", ""), ids[0].tolist(), [token])])
            assert found[mine][0][1] is True
            assert found[1 - mine][0][1] is (tokens[0] == tokens[1])
    assert differing > 0


def generated(lm: HeadLM, prompts: list[str], tokens: int = TOKENS) -> tuple[list[str], list[str]]:
    return on_both(lm, "generate_until", asked("generate_until", [(p, {"until": ["\n\n"], "max_gen_toks": tokens}) for p in prompts]))


def test_texts_of_a_bad_head_are_those_that_it_generates_itself(tiny: SimpleNamespace) -> None:
    """The way from the dense head's text is a shortcut: the same text as transformers generates with the head attached from the start."""
    lm = harness_model(tiny, "bad")
    prompts = [chr(97 + i) * 3 for i in range(8)]
    dense, flash = generated(lm, prompts)
    assert 0 < sum(a == b for a, b in zip(dense, flash)) < len(prompts)  # both branches are taken
    plain = HFLM(pretrained=load_model(tiny.folder), tokenizer=tiny.tokenizer, backend="causal", batch_size=1)
    requests = asked("generate_until", [(p, {"until": ["\n\n"], "max_gen_toks": TOKENS}) for p in prompts])
    assert plain.generate_until(requests, disable_tqdm=True) == dense
    with_head = FlashHead(lm.flash.index).attach(plain.model)
    assert plain.generate_until(requests, disable_tqdm=True) == flash
    with_head.detach()
    tally = lm.kept.tally
    assert 0 < tally.same < tally.steps == len(prompts) * TOKENS  # this model never ends a text


def test_penalties_of_the_model_s_own_settings_change_nothing(tiny: SimpleNamespace) -> None:
    """They would choose other tokens than the head does, and every text would differ at its first repetition."""
    model = load_model(tiny.folder)
    model.generation_config.repetition_penalty = 5.0
    index = everything_open(model.get_output_embeddings().weight.detach())
    weight = model.get_output_embeddings().weight.detach()
    contender = HeadContender("open", torch_head(index, weight), 64)
    lm = HeadLM(model, tiny.tokenizer, FlashHead(index), DenseHead(weight, None, index.vocab_size), contender, 1.0, None)
    dense, flash = generated(lm, ["abc", "xyz"])
    assert dense == flash == generated(harness_model(tiny), ["abc", "xyz"])[0]


def test_what_is_not_greedy_is_refused(tiny: SimpleNamespace) -> None:
    lm = harness_model(tiny)
    request = asked("generate_until", [("a", {"until": ["\n"], "max_gen_toks": 4, "num_beams": 3})])
    with pytest.raises(SettingsError, match="num_beams, expected plain greedy text"):
        lm.generate_until(request)
    sampled = asked("generate_until", [("a", {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 0.7, "top_p": 0.9})])
    assert lm.generate_until(sampled) == generated(lm, ["a"], 4)[0]


def test_a_continuation_longer_than_the_context_is_refused(tiny: SimpleNamespace) -> None:
    lm = harness_model(tiny)
    lm._max_length = 8
    with pytest.raises(SettingsError, match="9 tokens is to be scored, expected the model's 8 at most"):
        lm.loglikelihood(asked("loglikelihood", [("a", "b" * 9)]))


def test_the_body_runs_once_for_both_heads(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness_model(tiny)
    calls: list[int] = []
    lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    requests = asked("loglikelihood", PAIRS)
    on_both(lm, "loglikelihood", requests)
    assert len(calls) == len(PAIRS)
