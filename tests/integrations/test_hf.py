"""FlashHead inside transformers' generate: every way of decoding, one copy of the head, and nothing left after detach."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from small_checkpoints import save_checkpoint, save_model
from small_heads import everything_open, few_probes
from small_models import VOCAB, small_model

from flashhead_edge.errors import CheckpointError, SettingsError, UnsupportedModelError
from flashhead_edge.integrations.hf import PADDING_LOGIT, FlashHead
from flashhead_edge.reference import dense_logits

PROMPT = torch.tensor([[1, 17, 90, 5, 33, 128, 64]])
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "two texts": {"do_sample": False, "num_return_sequences": 2, "num_beams": 2},
}


def told(model, **options):
    torch.manual_seed(5)
    return model.generate(PROMPT, max_new_tokens=30, **options).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_everything_open_generates_what_the_dense_head_does(way):
    model = small_model("llama")
    want = told(model, **WAYS[way])
    with_head = FlashHead(everything_open(model.lm_head.weight, cascade=True)).attach(model)
    assert told(model, **WAYS[way]) == want
    with_head.detach()
    assert told(model, **WAYS[way]) == want


def test_assisted_generation_with_a_fast_draft_and_a_fast_target():
    """The draft's head is bad on purpose: greedy text does not change, since the target checks it."""
    model, draft = small_model("llama"), small_model("llama", seed=1)
    want = told(model, do_sample=False)
    FlashHead(few_probes(draft.lm_head.weight, 1)).attach(draft)
    assert told(model, do_sample=False, assistant_model=draft) == want
    FlashHead(everything_open(model.lm_head.weight)).attach(model)
    assert told(model, do_sample=False, assistant_model=draft) == want
    assert told(model, do_sample=False, assistant_model=model) == want


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_head_still_works_in_every_way(way):
    """A head that opens one cluster gives finite logits for every token, and other text than the dense head."""
    model = small_model("llama")
    FlashHead(few_probes(model.lm_head.weight, 1)).attach(model)
    got = told(model, **WAYS[way])
    assert all(len(t) == PROMPT.shape[1] + 30 for t in got)


def test_a_bad_head_is_in_use():
    model = small_model("llama")
    want = told(model, do_sample=False)
    head = FlashHead(few_probes(model.lm_head.weight, 1)).attach(model)
    assert told(model, do_sample=False) != want
    with torch.no_grad():
        logits = model(PROMPT).logits
    assert bool(torch.isfinite(logits).all())
    assert logits.dtype == torch.float32
    assert logits.shape == (1, 7, VOCAB)
    assert head.attached


def big_llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20_000, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=64, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config).eval()


def tensor_bytes():
    """Bytes of all tensors alive, each storage once: {address: bytes}."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_attaching_adds_no_copy_of_the_head(tied):
    """20,000 x 128 in float32 are 10.2 MB; the index of 2,500 clusters is 3 MB decoded, and nothing else may stay."""
    model = big_llama(tied)
    index = few_probes(model.lm_head.weight, 4)
    head_bytes = model.lm_head.weight.numel() * 4
    address = model.lm_head.weight.data_ptr()
    before = tensor_bytes()
    head = FlashHead(index).attach(model)
    model.generate(PROMPT, do_sample=False, max_new_tokens=3, pad_token_id=0)
    after = tensor_bytes()
    assert head.computed.weight.data_ptr() == model.lm_head.weight.data_ptr() == address
    assert (model.get_input_embeddings().weight.data_ptr() == address) == tied
    added = {a: b for a, b in after.items() if a not in before}
    assert max(added.values(), default=0) < head_bytes / 4
    assert sum(added.values()) < head_bytes / 2
    assert sum(b >= head_bytes for b in after.values()) == sum(b >= head_bytes for b in before.values()) == (1 if tied else 2)


def test_process_memory_does_not_grow_by_a_head():
    """What the kernel counts: resident memory after attach and ten steps, in a fresh process, for a head of 102 MB."""
    import subprocess
    import sys
    from pathlib import Path

    program = """
import gc, os, sys, torch
sys.path.insert(0, sys.argv[1])
from transformers import LlamaConfig, LlamaForCausalLM
from flashhead_edge.integrations.hf import FlashHead
from small_checkpoints import save_checkpoint, save_model
from small_heads import few_probes
torch.set_num_threads(1)
def resident():
    gc.collect()
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
size = dict(vocab_size=200_000, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=64)
model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)).eval()
index = few_probes(model.lm_head.weight, 4, cluster_size=64)
prompt = torch.tensor([[1, 2, 3]])
model.generate(prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)
before = resident()
FlashHead(index).attach(model)
model.generate(prompt, do_sample=False, max_new_tokens=10, pad_token_id=0)
print((resident() - before) / (model.lm_head.weight.numel() * 4))
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent.parent)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_detach_leaves_no_trace_and_the_state_dict_never_changes(tmp_path):
    model = small_model("llama")
    module = model.lm_head
    keys, attributes = list(model.state_dict()), set(module.__dict__)
    head = FlashHead(everything_open(module.weight)).attach(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "saved")
    head.detach()
    head.detach()
    assert set(module.__dict__) == attributes
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    again.generation_config.eos_token_id = None
    FlashHead(head.index).attach(again)
    assert told(again, do_sample=False) == told(model, do_sample=False)


def test_detach_restores_a_forward_that_was_replaced_before():
    model = small_model("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden)
    before = model.lm_head.forward
    FlashHead(everything_open(model.lm_head.weight)).attach(model).detach()
    assert model.lm_head.forward is before


def test_attaching_twice_is_refused():
    model, other = small_model("llama"), small_model("llama")
    head = FlashHead(everything_open(model.lm_head.weight)).attach(model)
    with pytest.raises(SettingsError, match="this head is attached to a model already"):
        head.attach(other)
    with pytest.raises(SettingsError, match="LlamaForCausalLM has a FlashHead attached already"):
        FlashHead(head.index).attach(model)
    head.detach()
    head.attach(other)


def test_a_copy_of_an_attached_model_shares_within_itself():
    model = small_model("llama_tied")
    FlashHead(everything_open(model.lm_head.weight)).attach(model)
    other = copy.deepcopy(model)
    rows = other.lm_head.forward.current().weight
    assert rows is other.lm_head.weight is other.model.embed_tokens.weight
    assert rows.data_ptr() != model.lm_head.weight.data_ptr()
    assert told(other, do_sample=False) == told(model, do_sample=False)


def test_changed_rows_are_seen():
    """The head reads the module's weights as they are, not as they were."""
    model = small_model("llama")
    FlashHead(everything_open(model.lm_head.weight)).attach(model)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    hidden = torch.randn(3, 32)
    assert torch.equal(model.lm_head(hidden), dense_logits(model.lm_head.weight, None, hidden, VOCAB))


def test_padding_rows_are_finite_and_never_returned():
    """A matrix of 131 rows of which 120 are tokens: the rest would win often, and never do."""
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight[120:] *= 10
    assert max(told(model, do_sample=False)[0][7:]) >= 120
    FlashHead(everything_open(model.lm_head.weight, vocab_size=120)).attach(model)
    with torch.no_grad():
        logits = model(PROMPT).logits
    assert logits.shape[-1] == VOCAB
    assert bool((logits[..., 120:] == PADDING_LOGIT).all())
    for way in WAYS.values():
        assert max(max(t[7:]) for t in told(model, **way)) < 120


def test_many_rows_go_in_blocks(monkeypatch):
    """The same logits whatever the block, and for any leading shape."""
    from flashhead_edge.integrations import hf

    model = small_model("llama")
    FlashHead(few_probes(model.lm_head.weight, 2)).attach(model)
    hidden = torch.randn(4, 9, 32)
    want = model.lm_head(hidden)
    monkeypatch.setattr(hf, "BLOCK_NUMBERS", 5 * VOCAB)
    assert torch.equal(model.lm_head(hidden), want)
    assert torch.equal(model.lm_head(hidden[1, 3]), want[1, 3])
    assert model.lm_head(hidden[:, :0]).shape == (4, 0, VOCAB)


def test_a_model_in_float32_fits_an_index_of_its_16_bit_weights():
    model = small_model("llama").bfloat16()
    index = everything_open(model.lm_head.weight)
    FlashHead(index).attach(model.float()).detach()
    with torch.no_grad():
        model.lm_head.weight[3, 5] *= 1.001
    with pytest.raises(CheckpointError, match="fingerprint"):
        FlashHead(index).attach(model)


def test_a_bfloat16_model_generates():
    model = small_model("llama").bfloat16()
    FlashHead(everything_open(model.lm_head.weight)).attach(model)
    assert model(PROMPT).logits.dtype == torch.float32
    for way in WAYS.values():
        told(model, **way)


def test_a_quantised_or_absent_matrix_is_refused():
    model = small_model("llama")
    index = everything_open(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"the output head is a Linear with a torch\.int8 weight on cpu, expected a matrix of floats in memory"):
        FlashHead(index).attach(model)


def test_a_matrix_of_another_class_is_refused():
    """torchao's weights are tensors of classes of their own, which call themselves bfloat16 and hold codes."""

    class Codes(torch.Tensor):
        pass

    model = small_model("llama")
    index = everything_open(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Codes), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"the output head is a Linear whose weight is a Codes, expected a plain matrix of floats"):
        FlashHead(index).attach(model)


def test_a_head_without_rows_says_so():
    index = everything_open(torch.randn(VOCAB, 32))
    with pytest.raises(SettingsError, match="no model is attached and the index came from no folder"):
        FlashHead(index).step(torch.randn(1, 32))


def test_step_and_logits_of_an_attached_head():
    from flashhead_edge.head import Head

    model = small_model("llama")
    head = FlashHead(everything_open(model.lm_head.weight)).attach(model)
    assert isinstance(head, Head)
    hidden = torch.randn(3, 32)
    want = dense_logits(model.lm_head.weight, None, hidden, VOCAB)
    assert torch.equal(head.logits(hidden), want)
    assert torch.equal(head.step(hidden).token, want.argmax(1))
    assert "attached on cpu" in repr(head)


def test_a_checkpoint_loads_attaches_and_stands_alone(tmp_path):
    import flashhead_edge
    from flashhead_edge.checkpoint import load_model

    source = save_model(tmp_path / "model")
    out = save_checkpoint(source, tmp_path / "out")
    model = load_model(source)
    model.generation_config.eos_token_id = None
    hidden = torch.randn(3, 32)
    head = flashhead_edge.load_head(out)
    alone = head.step(hidden).token
    dense = told(model, do_sample=False, suppress_tokens=list(range(head.index.vocab_size, VOCAB)))
    assert head.attach(model) is head
    assert torch.equal(head.step(hidden).token, alone)
    assert told(model, do_sample=False) == dense
    other = load_model(save_model(tmp_path / "other", seed=1))
    head.detach()
    with pytest.raises(CheckpointError, match="use the model that the checkpoint was converted from"):
        head.attach(other)
