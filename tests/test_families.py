"""Every family that people run: with everything open, FlashHead is the dense head."""

from __future__ import annotations

import pytest
import torch
from small_heads import everything_open, fingerprint_of
from small_models import FAMILIES, VOCAB, small_model

from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.integrations.hf import FlashHead
from flashhead_edge.reference import dense_logits

PROMPT = torch.tensor([[1, 17, 90, 5, 33, 128, 64]])


@pytest.mark.parametrize("cascade", [False, True], ids=["published", "fitted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_open_is_the_dense_head(family, cascade):
    """Greedy text of 24 tokens is equal; logits differ by the rounding of d = 32 float32 sums, after scale and soft-cap too."""
    model = small_model(family)
    module = model.get_output_embeddings()
    with torch.no_grad():
        want = model(PROMPT).logits
    dense = model.generate(PROMPT, do_sample=False, max_new_tokens=24)
    states = []
    hook = module.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
    index = everything_open(module.weight, cascade, fingerprint=fingerprint_of(module.weight, module.bias))
    head = FlashHead(index).attach(model)
    with torch.no_grad():
        got = model(PROMPT).logits
    fast = model.generate(PROMPT, do_sample=False, max_new_tokens=24)
    hook.remove()
    head.detach()
    assert fast.tolist() == dense.tolist()
    assert len(set(fast[0].tolist())) > 5
    for hidden, out in states:
        exact = dense_logits(module.weight, module.bias, hidden.reshape(-1, hidden.shape[-1]), VOCAB)
        assert torch.equal(out.reshape(exact.shape), exact)
    scale = max(float(out.abs().max()) for _, out in states)
    assert float((got - want).abs().max()) <= 32 * 2**-24 * 4 * scale
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, want)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_these_families_change_the_logits_after_the_head(family):
    """Or the test above would prove nothing about scale and soft-cap."""
    model, raw = small_model(family), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: raw.append(out))
    with torch.no_grad():
        assert not torch.allclose(model(PROMPT).logits, raw[0])


def test_an_encoder_is_refused_in_one_sentence():
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    for kind in (BertModel, BertForMaskedLM):
        with pytest.raises(UnsupportedModelError) as caught:
            FlashHead(everything_open(torch.randn(VOCAB, 32))).attach(kind(config))
        assert str(caught.value) == f"{kind.__name__}: no output head that generates text was found, expected a causal language model; choose another model"


def test_a_head_of_another_shape_or_other_weights_is_refused_in_one_sentence():
    model = small_model("llama")
    for matrix, found in [
        (torch.randn(VOCAB, 16), r"the output head is \[131, 32\], the head index expects \[131 or more, 16\]"),
        (torch.randn(140, 32), r"the output head is \[131, 32\], the head index expects \[140 or more, 32\]"),
        (torch.randn(VOCAB, 32), "the output head, in float32, has fingerprint sha256:.*, the head index was made for sha256:"),
    ]:
        with pytest.raises(CheckpointError, match="LlamaForCausalLM: " + found):
            FlashHead(everything_open(matrix)).attach(model)
    assert "forward" not in model.lm_head.__dict__
