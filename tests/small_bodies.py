"""Tiny random models whose bodies can be exported: heads of 16 values, as ONNX Runtime's attention takes them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from small_checkpoints import save_tokenizer

VOCAB = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.0 + 0.3 * i for i in range(8)],
}  # fmt: skip
WIDE = {"head_dim": 16}
GEMMA = WIDE | {"sliding_window": 16, "query_pre_attn_scalar": 16}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}

BODIES: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama_tied": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "smollm3": lambda t: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=16)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=True, max_window_layers=1)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, **WIDE, tie_word_embeddings=True)),
    "gemma": lambda t: t.GemmaForCausalLM(t.GemmaConfig(**SIZES, **WIDE)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, **GEMMA, **LAYERS)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **GEMMA, **LAYERS)),
    "phi": lambda t: t.PhiForCausalLM(t.PhiConfig(**SIZES | {"hidden_size": 128, "num_key_value_heads": 4})),
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES, original_max_position_embeddings=256, sliding_window=16)),
    "phi3_long": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=dict(LONG))),
    "granite": lambda t: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.25)),
}


def save_body(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder of the family with random weights and norms."""
    import transformers

    torch.manual_seed(0)
    model = BODIES[family](transformers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim >= 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@contextmanager
def warm_builder() -> Iterator[None]:
    """Inside, `build_body` runs the builder in a fork of a process that has imported it: of a tiny model's six seconds that leaves a third of one.

    For bodies that tests share and for variants of one; a product's own process, each with its imports, is what the other tests see.
    """
    from flashhead_edge.export import body, run_builder

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onnxruntime_genai.models.builder"])

    def run(asked: dict[str, Any], name: str, layers: int, progress: Any) -> None:
        process = context.Process(target=run_builder.main, kwargs=asked)
        process.start()
        process.join()
        assert process.exitcode == 0, f"{name}: the builder failed, see what it wrote to stderr"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "_run_builder", run)
        yield


def states_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' hidden states after the final norm in float32, [B, S, d]."""
    from flashhead_edge.checkpoint import load_model

    with torch.no_grad():
        return load_model(folder).base_model(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()  # type: ignore[no-any-return]


def session(path: Path, *, exact: bool = False) -> ort.InferenceSession:
    """A session; `exact` keeps activations in 32 bits where ONNX Runtime fuses a DequantizeLinear into its product."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(path), options)


def feeds(inputs: list[Any], ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A step's inputs; an empty cache is made of the shapes that the model's inputs have."""
    feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    if any(value.name == "texts" for value in inputs):  # the native body: one text from the cache's beginning on
        feed = {"input_ids": feed["input_ids"], "texts": np.array([[ids.shape[1], mask.shape[1] - ids.shape[1], 0]])}
    for value in inputs:
        if value.name.startswith("past_key_values."):
            number = np.float16 if value.type == "tensor(float16)" else np.float32
            feed[value.name] = cache.get(value.name, np.zeros((len(ids), value.shape[1], 0, value.shape[3]), number))
    return feed


def decode(run: Any, inputs: list[Any], names: list[str], ids: np.ndarray, lengths: list[int], mask: np.ndarray | None = None) -> np.ndarray:
    """Hidden states of `ids` [B, S] in pieces of `lengths`, each with the cache that the one before left."""
    states, cache, start = [], {}, 0
    mask = np.ones(ids.shape, np.int64) if mask is None else mask
    for length in lengths:
        outputs = run(feeds(inputs, ids[:, start : start + length], mask[:, : start + length], cache))
        start += length
        found = dict(zip(names, outputs))
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items() if name.startswith("present")}
        states.append(found["hidden_states"])
    return np.concatenate(states, axis=1)


def decode_with(s: ort.InferenceSession, ids: np.ndarray, lengths: list[int], mask: np.ndarray | None = None) -> np.ndarray:
    """`decode` with ONNX Runtime."""
    return decode(lambda feed: s.run(None, feed), s.get_inputs(), [o.name for o in s.get_outputs()], ids, lengths, mask)
