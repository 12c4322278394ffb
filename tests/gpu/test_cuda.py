"""The same code on a GPU: the reference, clustering, a whole conversion, and decoding with it. Skipped where there is no GPU."""

import dataclasses

import numpy as np
import pytest
import torch
from small_checkpoints import save_model
from small_heads import everything_open, few_probes

from flashhead_edge.checkpoint import load_model, load_tokenizer, read_head, read_index
from flashhead_edge.clustering import cluster
from flashhead_edge.coding import decode, encode, to_torch
from flashhead_edge.conversion import convert
from flashhead_edge.decoding import Sampling
from flashhead_edge.generation import load_engine, stream
from flashhead_edge.integrations.hf import FlashHead
from flashhead_edge.kernels.head import CudaHead
from flashhead_edge.reference import TorchHead, dense_tokens, full_logits, torch_head

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("make", [lambda w: everything_open(w, True), lambda w: everything_open(w, False), lambda w: few_probes(w, 3)])
def test_reference_gives_the_same_tokens(make):
    """float64 sums in another order: equal tokens, logits within one rounding of float32."""
    weight = torch.randn(131, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    hidden = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    index = make(weight)
    here, there = torch_head(index, weight), torch_head(index, weight.cuda())
    a, b = here.step(hidden), there.step(hidden.cuda())
    assert torch.equal(a.token, b.token.cpu())
    assert torch.equal(a.counts, b.counts.cpu())
    assert torch.allclose(full_logits(here, hidden), full_logits(there, hidden.cuda()).cpu(), rtol=1.2e-7, atol=1e-6)


def test_dense_tokens_are_the_same():
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).half()
    hidden = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dense_tokens(weight, None, hidden, 5000), dense_tokens(weight.cuda(), None, hidden.cuda(), 5000).cpu())


@pytest.mark.parametrize("code", ["float16", "int4/16", "bits12", "product8"])
def test_codes_decode_the_same(code):
    values = torch.randn(2000, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, 48)
    coded = encode(values, code)
    assert torch.equal(decode(to_torch(coded)), decode(to_torch(coded, "cuda")).cpu())


def test_clusters_are_equal_and_good():
    rows = torch.randn(5003, 32, generator=torch.Generator().manual_seed(0))
    here, there = cluster(rows, 16), cluster(rows.cuda(), 16)
    assert np.array_equal(np.sort(there.token_table[there.token_table >= 0]), np.arange(5003))
    assert there.objective > 0.98 * here.objective


def test_conversion_keeps_its_promise(tmp_path):
    from flashhead_edge.capture import sample_own_text

    source = save_model(tmp_path / "model")
    summary = convert(source, tmp_path / "out", positions=4000, target=0.95)
    head = read_head(tmp_path / "out")
    runner, tokenizer = load_model(tmp_path / "out", device="cuda"), load_tokenizer(tmp_path / "out")
    fresh = sample_own_text(runner, tokenizer, head.vocab_size, 4000, seed=9).states.float()
    found = torch_head(read_index(tmp_path / "out", head), head.weight).step(fresh)
    assert summary["reached"]
    assert float((found.token == dense_tokens(head.weight, None, fresh, head.vocab_size)).float().mean()) >= 0.95


def test_attach_and_generate_run_on_the_kernels(tmp_path, caplog):
    source = save_model(tmp_path / "model")
    convert(source, tmp_path / "out", positions=2000, target=0.95)
    engine = load_engine(tmp_path / "out")
    assert isinstance(engine.head, CudaHead) and "CUDA kernels" not in caplog.text
    slow = dataclasses.replace(engine, head=torch_head(engine.head.index, engine.head.weight, engine.head.bias))
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, seed=3), Sampling(repetition_penalty=1.3)):
        assert ids_of(engine, 40, sampling) == ids_of(slow, 40, sampling)

    head = FlashHead.load(tmp_path / "out").attach(engine.model)
    prompt = torch.tensor([[5, 6, 7]], device="cuda")
    said = engine.model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert isinstance(head.computed, CudaHead)
    head.detach()
    assert said == ids_of(engine, 20, Sampling())

    wide = load_engine(tmp_path / "out", device="cuda", dtype="float32")
    assert isinstance(wide.head, TorchHead)
    assert "its rows are float32, expected float16 or bfloat16" in caplog.text


def ids_of(engine, most, sampling):
    return [token.id for token in stream(engine, [5, 6, 7], most, sampling)]
