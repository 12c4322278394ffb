"""Every kind of request through a real engine: FlashHead's answers beside the dense head's, switched inside it."""

import contextlib
import json

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: see docs/vllm.md")

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from flashhead_edge.integrations.vllm.method import FlashHeadMethod, find_head
from flashhead_edge.integrations.vllm.requests import wants_exact, wants_greedy
from flashhead_edge.reference import torch_head

PROMPTS = ["The capital of France is", "def fib(n):", "Once upon a time,", "Die Hauptstadt von Deutschland ist", "Water boils at"]
TOKENS = 24
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]})


@contextlib.contextmanager
def dense(method):
    """The dense head for every batch, meanwhile."""
    before, method.dense_from, method.tokens_dense_from = method.dense_from, 1, 1
    try:
        yield
    finally:
        method.dense_from = method.tokens_dense_from = before


def ids(outputs):
    return [list(o.token_ids) for output in outputs for o in output.outputs]


def equal_share(a, b):
    """Share of steps up to the first difference, of all that both said: after it the texts are others."""
    same = sum(next((i for i, (x, y) in enumerate(zip(p, q)) if x != y), min(len(p), len(q))) for p, q in zip(a, b))
    return same / sum(min(len(p), len(q)) for p, q in zip(a, b))


def test_the_head_is_flashheads(engine, method):
    assert isinstance(method, FlashHeadMethod) and method.logits is not None
    assert engine.apply_model(lambda model: type(model).__name__)[0].startswith("FlashHead")
    assert engine.apply_model(lambda model: not any("flashhead" in name for name in model.state_dict()))[0]
    before = method.counts()
    engine.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    after = method.counts()
    assert after["states_flash"] - before["states_flash"] == 8
    assert (after["states_dense"], after["states_dense_asked"]) == (before["states_dense"], before["states_dense_asked"])
    assert after["clusters_opened"] > before["clusters_opened"] and after["exact_rows"] > before["exact_rows"]


# Requests, and the share of steps up to the first difference that must be the dense head's. Greedy ones differ where the promise
# allows it; penalties and bad words push candidates below tokens that were none; a draw differs where the dense head drew such a token, and
# then the texts part for good, so of draws only so much is asked as tells a seed that is kept from one that is not.
REQUESTS = {
    "greedy": ({"temperature": 0}, 0.9),
    "logprobs": ({"temperature": 0, "logprobs": 5}, 0.9),
    "prompt logprobs": ({"temperature": 0, "prompt_logprobs": 2}, 0.9),
    "seeded": ({"temperature": 0.7, "seed": 5}, 0.2),
    "top-p": ({"temperature": 0.8, "top_p": 0.9, "seed": 3}, 0.2),
    "top-k": ({"temperature": 0.8, "top_k": 20, "seed": 3}, 0.2),
    "min-p": ({"temperature": 1.0, "min_p": 0.1, "seed": 3}, 0.2),
    "several": ({"temperature": 0.8, "n": 2, "seed": 1, "top_k": 10}, 0.2),
    "penalties": ({"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}, 0.7),
    "bias": ({"temperature": 0, "logit_bias": {100: 4.0, 200: -100.0}}, 0.9),
    "bad words": ({"temperature": 0, "bad_words": ["the", " Paris"]}, 0.8),
    "at least": ({"temperature": 0, "min_tokens": TOKENS}, 0.9),
    "stop": ({"temperature": 0, "stop": ["."]}, 0.9),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_as_by_the_dense_head(engine, method, name):
    options, least = REQUESTS[name]
    params = SamplingParams(max_tokens=TOKENS, **options)
    found = engine.generate(PROMPTS, params, use_tqdm=False)
    with dense(method):
        want = engine.generate(PROMPTS, params, use_tqdm=False)
    assert all(len(o.token_ids) > 0 for output in found for o in output.outputs)
    assert equal_share(ids(found), ids(want)) >= least
    if "logprobs" in options:
        for a, b in zip(found, want):
            for x, y, token in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, a.outputs[0].token_ids):
                if token not in y:
                    break
                assert abs(x[token].logprob - y[token].logprob) < 0.5
    if "prompt_logprobs" in options:
        assert all(len(output.prompt_logprobs) == len(output.prompt_token_ids) for output in found)


def test_a_seed_is_kept_at_batch_one(engine):
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=TOKENS) for seed in (1, 1, 2)]
    found = [ids(engine.generate(PROMPTS[:1], p, use_tqdm=False)) for p in params]
    assert found[0] == found[1] != found[2]


CONSTRAINED = {
    "choice": {"structured_outputs": StructuredOutputsParams(choice=["yes", "no", "maybe"])},
    "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{2,6}")},
    "schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    "allowed": {"allowed_token_ids": [10, 20, 30, 400, 5000]},
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constraints_are_kept(engine, name):
    outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48, **CONSTRAINED[name]), use_tqdm=False)
    for output in outputs:
        text = output.outputs[0].text
        if name == "choice":
            assert text in ("yes", "no", "maybe")
        elif name == "regex":
            assert text.isdigit() and 2 <= len(text) <= 6
        elif name == "allowed":
            assert set(output.outputs[0].token_ids) <= {10, 20, 30, 400, 5000}
        elif output.outputs[0].finish_reason == "stop":
            assert set(json.loads(text)) >= {"name", "age"}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_constrained_request_gets_the_dense_heads_tokens(engine, method, name):
    """The mask decides among logits that are all exact: the step is the dense head's, and counted."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, **CONSTRAINED[name])
    before = method.counts()
    found = engine.generate(PROMPTS, params, use_tqdm=False)
    after = method.counts()
    with dense(method):
        want = engine.generate(PROMPTS, params, use_tqdm=False)
    assert ids(found) == ids(want)
    assert after["states_flash"] == before["states_flash"]
    assert after["states_dense_asked"] - before["states_dense_asked"] >= sum(map(len, ids(found)))


def test_log_probabilities_are_the_dense_heads(engine, method):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=1)
    found = engine.generate(PROMPTS, params, use_tqdm=False)
    with dense(method):
        want = engine.generate(PROMPTS, params, use_tqdm=False)
    for a, b in zip(found, want):
        shown = [*zip(a.outputs[0].logprobs, b.outputs[0].logprobs), *zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:])]
        assert shown and all(x.keys() == y.keys() and all(abs(x[t].logprob - y[t].logprob) < 1e-4 for t in x) for x, y in shown)


def test_other_requests_are_flashheads_again(engine, method):
    """What a request asked for is over with it: rows of the runner's batch are used again by others."""
    before = method.counts()
    engine.generate(PROMPTS, SamplingParams(temperature=0.8, seed=1, max_tokens=4), use_tqdm=False)
    after = method.counts()
    assert after["states_flash"] - before["states_flash"] == 4 * len(PROMPTS)
    assert after["states_dense_asked"] == before["states_dense_asked"]


def on_v2(engine):
    return ".gpu.model_runner" in type(engine.llm_engine.model_executor.driver_worker.model_runner).__module__


def test_greedy_steps_give_tokens_alone(engine, method):
    """On the V2 runner neither logits nor the sampler's passes over them are computed, and the text is the same; beside a drawn request they are."""
    if not on_v2(engine):
        pytest.skip("the V1 runner has no place for tokens")
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    calls, tokens, logits = {"tokens": 0, "logits": 0}, method.tokens, method.logits

    def counted(name, work):
        def run(x):
            calls[name] += 1
            return work(x)

        return run

    method.tokens, method.logits = counted("tokens", tokens), counted("logits", logits)
    try:
        found = engine.generate(PROMPTS, greedy, use_tqdm=False)
        alone = dict(calls)
        method.tokens = None
        want = engine.generate(PROMPTS, greedy, use_tqdm=False)
        method.tokens = counted("tokens", tokens)
        before = dict(calls)
        engine.generate(PROMPTS[:2], [greedy, SamplingParams(temperature=0.9, seed=2, max_tokens=TOKENS)], use_tqdm=False)
        mixed = dict(calls)
    finally:
        method.tokens, method.logits = tokens, logits
    assert alone["tokens"] >= TOKENS - 1 and alone["logits"] <= 1  # the first call shows how hidden states reach the head
    assert ids(found) == ids(want)
    assert mixed["tokens"] == before["tokens"] and mixed["logits"] > before["logits"]


@pytest.mark.parametrize(
    ("options", "greedy", "exact"),
    [
        ({"temperature": 0}, True, False),
        ({"temperature": 0, "max_tokens": 7, "stop": ["x"], "seed": 4, "n": 1}, True, False),
        ({"temperature": 0.5}, False, False),
        ({"temperature": 0, "min_tokens": 3}, False, False),
        ({"temperature": 0, "repetition_penalty": 1.1}, False, False),
        ({"temperature": 0, "bad_words": ["a"]}, False, False),
        ({"temperature": 0, "logprobs": 1}, False, True),
        ({"temperature": 0, "prompt_logprobs": 1}, False, True),
        ({"temperature": 0, "logit_bias": {5: -3.0}}, False, False),
        ({"temperature": 0, "logit_bias": {5: 3.0}}, False, True),
        ({"temperature": 0, "allowed_token_ids": [5]}, False, True),
        ({"temperature": 1, "structured_outputs": StructuredOutputsParams(regex="a")}, False, True),
    ],
    ids=str,
)
def test_what_a_request_asks_of_the_head(options, greedy, exact):
    params = SamplingParams(**options)
    assert (wants_greedy(params), wants_exact(params, ("constrained", "logprobs"))) == (greedy, exact)
    assert not wants_exact(params, ())


def test_a_reload_keeps_the_head(engine, method):
    params = SamplingParams(temperature=0, max_tokens=8)
    before, logits = ids(engine.generate(PROMPTS, params, use_tqdm=False)), method.logits
    engine.collective_rpc("reload_weights")
    assert method.logits is logits and engine.apply_model(lambda model: find_head(model).quant_method is method)[0]
    assert ids(engine.generate(PROMPTS, params, use_tqdm=False)) == before


def test_apply_gives_the_references_tokens_alone_and_among_others(engine, method):
    """On hidden states that reach the head: equal tokens wherever the winner leads by more than float32 sums may be wrong."""

    def check(model):
        layer = find_head(model)
        captured, before = [], method.logits

        def capture(x):
            captured.append(x.detach().clone())
            return before(x)

        method.logits = capture
        yield_back.append((layer, captured, before))

    yield_back = []
    engine.apply_model(check)
    ((layer, captured, before),) = yield_back
    try:
        engine.generate(PROMPTS, SamplingParams(temperature=1, seed=3, max_tokens=8), use_tqdm=False)
    finally:
        method.logits = before
    states = torch.cat(captured)[:32]
    with torch.inference_mode():
        found = method.apply(layer, states)
        alone = torch.cat([method.apply(layer, states[i : i + 1]) for i in range(len(states))])
        kept = found.clone()
        method.apply(layer, states.flip(0))
    assert torch.equal(found, kept)  # an answer is not overwritten by the next
    assert torch.equal(found.argmax(1), alone.argmax(1))
    assert found.shape == (len(states), len(layer.weight)) and bool(found.isfinite().all())
    want = torch_head(method.index, layer.weight).step(states)
    best = want.logits.amax(1)
    second = want.logits.masked_fill(want.logits == best[:, None], float("-inf")).amax(1)
    clear = best - second > 1e-4 * (1 + best.abs())
    assert torch.equal(found.argmax(1)[clear], want.token[clear]) and int(clear.sum()) > 0.9 * len(states)


def test_above_the_crossover_the_step_is_dense(engine, method):
    before = method.counts()
    method.dense_from = method.tokens_dense_from = 3
    try:
        engine.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        middle = method.counts()
        engine.generate(PROMPTS[:4], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    finally:
        method.dense_from = method.tokens_dense_from = None
    after = method.counts()
    assert middle["states_dense"] == before["states_dense"] and middle["states_flash"] == before["states_flash"] + 6
    assert after["states_dense"] - middle["states_dense"] >= 8
