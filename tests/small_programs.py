"""Tiny models of every family whose weights are 4-bit codes, as a checkpoint's reader gives them, and their programs run in numpy."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plugin_interpreter import KINDS, Interpreter, zero_points
from small_heads import everything_open
from torch import nn

from flashhead_edge.packed.coded import Coded4, Coded8, dense, paired, some_rows, unpaired
from flashhead_edge.program.build import Built, build_program
from flashhead_edge.program.file import Program, write_program
from flashhead_edge.program.head import Device
from flashhead_edge.program.nodes import Stored
from flashhead_edge.program.weights import rounded, widened

ORIN = Device(16, 99 << 10, 87)
CONTEXT, VOCAB, WINDOW = 64, 131, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {"head_dim": 64}
NARROW = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 64 where the size is the hidden one over the heads
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
LATE = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
GEMMA = WIDE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 37, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LINEAR | {"rope_theta": 1000.0}}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def _qwen3_vl(t: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 128, "deepstack_visual_indexes": [0]}
    text = SIZES | WIDE | {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 8, 8], "mrope_interleaved": True}}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision))


def _gemma3_vl(t: Any) -> Any:
    text = SIZES | GEMMA | {"rope_parameters": GEMMA_ROPE}
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4))


MODELS: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **WIDE, rope_parameters=dict(LLAMA3))),
    "llama_biased": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "smollm3": lambda t: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SIZES | NARROW, no_rope_layers=[1, 0, 1])),
    "smollm3_windows": lambda t: t.SmolLM3ForCausalLM(
        t.SmolLM3Config(**SIZES | NARROW, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW)
    ),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**SIZES, **WIDE, sliding_window=WINDOW, rope_parameters=dict(LINEAR))),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES | NARROW, **LATE)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, **WIDE, **LATE, tie_word_embeddings=True)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **GEMMA, rope_parameters=GEMMA_ROPE)),
    "gemma3_vl": _gemma3_vl,
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES | NARROW, original_max_position_embeddings=256, sliding_window=WINDOW)),
    "qwen3_vl": _qwen3_vl,
}


class MadeWeights:
    """A checkpoint's reader over arrays."""

    def __init__(self, floats: Mapping[str, np.ndarray], coded: Mapping[str, Coded4 | Coded8 | np.ndarray]) -> None:
        self.arrays, self.coded = dict(floats), dict(coded)

    def names(self) -> Iterable[str]:
        return [*self.arrays, *(f"{name}.weight" for name in self.coded)]

    def linear(self, name: str, rows: int | None = None) -> Coded4 | Coded8 | np.ndarray:
        matrix = self.coded[name]
        if rows is None:
            return matrix
        return matrix[:rows] if isinstance(matrix, np.ndarray) else some_rows(matrix, 0, rows)

    def floats(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.arrays:
            return self.arrays[name].shape
        matrix = self.coded[name.removesuffix(".weight")]
        if isinstance(matrix, np.ndarray):
            return matrix.shape
        return len(matrix.codes), matrix.scales.shape[1] * matrix.group


def nearest(x: np.ndarray, precision: str = "float16") -> np.ndarray:
    """What the file of weights holds exactly."""
    return widened(rounded(x, precision, "test"), precision)


def made_code(name: str, n: int, k: int) -> Coded4:
    """A matrix [N, K] in a group and with or without zero points, as its name has it, such that its products are about one large."""
    seed = zlib.crc32(name.encode())
    random = np.random.default_rng(seed)
    group = (32, 64, 128)[seed % 3] if k % 128 == 0 else (32, 64)[seed % 2]
    codes = random.integers(0, 16, (n, k), dtype=np.uint8)
    scales = nearest(random.uniform(0.5, 1.5, (n, k // group)) / (4.6 * k**0.5))
    zeros = random.integers(5, 11, scales.shape, dtype=np.uint8) if seed // 6 % 2 else None
    return Coded4(paired(codes), scales, zeros, None, group, None)


def values_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """The matrix that the kernels make of the neutral layout."""
    group = 2 * codes.shape[1] // scales.shape[1]
    zero = np.full_like(scales, 8) if zeros is None else zero_points(zeros)
    return (unpaired(codes) - zero.repeat(group, 1)) * scales.repeat(group, 1)


def text_names(model: Any) -> dict[str, Any]:
    """Parameters of the decoder and the head, by the names that a text model gives them."""
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.replace("model.language_model.", "model.")
        if plain.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
            found[plain] = parameter
    return found


def small_model(family: str) -> tuple[Any, MadeWeights]:
    """A model of the family in float32, and a reader of weights with the very values, its linear layers in 4 bits."""
    import transformers

    torch.manual_seed(0)
    model = MODELS[family](transformers).eval().float()
    floats, coded = {}, {}
    for name, p in text_names(model).items():
        if p.ndim == 2 and ".layers." in name:
            coded[name.removesuffix(".weight")] = code = made_code(name, *p.shape)
            values = dense(code)
        else:
            about = 1.0 if "norm" in name and "gemma" not in family else 0.0
            values = nearest(about + 0.2 * torch.randn(p.shape).numpy())
            floats[name] = values
        put(p, values)
    return model, MadeWeights(floats, coded)


def put(parameter: nn.Parameter, values: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values.copy()))


def put_codes(model: Any, coded: Mapping[str, Coded4 | Coded8 | np.ndarray]) -> None:
    """Give a model the values of matrices, by their layers' names."""
    parameters = text_names(model)
    for name, code in coded.items():
        put(parameters[f"{name}.weight"], code if isinstance(code, np.ndarray) else dense(code))


def built(model: Any, weights: MadeWeights, *, precision: str = "float16", group: int = 64, batch: int = 2, context: int = CONTEXT) -> Built:
    head = next(weights.arrays[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in weights.arrays)
    return build_program(
        weights, model.config.to_dict(), everything_open(torch.from_numpy(head)), precision=precision, context=context, group=group, device=ORIN, batch=batch
    )  # fmt: skip


def program_of(folder: Path, model: Any, weights: MadeWeights, **options: Any) -> Program:
    return write_program(folder, built(model, weights, **options), ORIN, {})


class ProgramInterpreter(Interpreter):
    """Runs a program's nodes, its tensors found by their names."""

    def __init__(self, program: Program, rounding: str = "float32") -> None:
        self.program, self.kind, self.head = program, KINDS[rounding], None
        self.file = np.fromfile(program.weights, np.uint8)
        self.matrices, self.seen = {}, set()
        kind = KINDS[program.precision]
        self.constants = {name: self.at(tensor).view(kind).astype(np.float32) for name, tensor in program.constants.items()}

    def at(self, name: str) -> np.ndarray:
        offset, size = self.program.places[name]
        return self.file[offset : offset + size]

    def tensor(self, at: dict[str, Any], name: str, dtype: Any) -> np.ndarray | None:
        found = at[name].decode()
        return self.at(found).view(dtype) if found else None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = dict(self.constants) | dict(feeds)
        for node in self.program.nodes[:-1]:  # without the head
            self.seen.add(node.op)
            at = {name: a.name.encode() if isinstance(a, Stored) else a for name, a in node.attributes.items()}
            found = getattr(self, node.op)(at, *(values[name] for name in node.inputs))
            for name, value in zip(node.outputs, found if isinstance(found, tuple) else (found,)):
                assert name.startswith("present.") or value.shape[-1] == self.program.widths[name]
                values[name] = value
        return values

    def decode(self, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
        """Hidden states [B, S, d] of ids [B, S] that are read in pieces, over one cache of full length."""
        p, states, start = self.program, [], 0
        shapes = {t.name: (len(ids), *t.shape[1:]) for t in p.inputs if t.name.startswith("past_key_values.")}
        cache = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}  # what was not written is not read
        for piece in pieces:
            start += piece
            now = {"input_ids": ids[:, start - piece : start].astype(np.int32), "lengths": np.full(len(ids), start, np.int32)}
            states.append(self.run(now | cache)["hidden_states"])
        return np.concatenate(states, 1)


def states_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """transformers' hidden states after the final norm, [B, S, d], read at once without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states[-1].numpy()
