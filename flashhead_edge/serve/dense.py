"""The dense head's text, token by token: what a person compares the fast head with."""

from __future__ import annotations

import numpy as np

from flashhead_edge.decoding import choose
from flashhead_edge.generation.cache import PromptCache
from flashhead_edge.generation.decode import Run, Stream, one_by_one, start, to_numpy
from flashhead_edge.generation.protocols import Array, TextEngine
from flashhead_edge.serve.orders import Order


def dense_stream(engine: TextEngine, order: Order, cache: PromptCache) -> Stream:
    """As `generation.stream`, by the model's own rows, all of them at every step."""
    run, prompt, most, reason = start(engine, order.ids, order.max_tokens, order.sampling, (), order.stop, order.grammar, order.logprobs)
    return Stream(run, one_by_one(run, prompt, most, reason, cache, dense_token))


def dense_token(run: Run, hidden: Array) -> int:
    """The token after hidden state [1, d], chosen among all tokens that may come."""
    engine, mask = run.engine, run.mask()
    run.head_bytes += run.summary.dense_bytes_per_step
    if mask is None and run.alternatives is None and run.sampling == type(run.sampling)(seed=run.sampling.seed):
        return engine.dense_tokens([hidden])[0]
    every = np.arange(engine.vocab_size)
    raw = to_numpy(engine.exact_logits(hidden, every))
    if run.alternatives is not None:
        run.full = raw
    kept = every if mask is None else np.flatnonzero(mask)
    return int(choose(kept[None], raw[:, kept], run.sampling, [run.chosen], run.prompt, run.output, engine.scale, engine.softcap)[0])
