"""GGUF files, written here by the gguf package with real and with random blocks: to the bit what that package, transformers and the model itself say."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashhead_edge.errors import CheckpointError, FlashHeadError, UnsupportedModelError
from flashhead_edge.packed import Coded4, Coded8, dense, open_weights
from flashhead_edge.packed.gguf_families import llama3_factors
from flashhead_edge.packed.gguf_file import OTHERS, TYPES, read_gguf

gguf = pytest.importorskip("gguf")
SMOLLM2 = Path("~/.cache/flashhead-edge/SmolLM2-135M-Instruct.Q4_1.gguf").expanduser()
LAYERS, D, FF, HEADS, KV = 1, 256, 512, 4, 2
QUANTISED = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")


def bits(values: np.ndarray) -> np.ndarray:
    """float32 as integers: equal only where every bit is, the sign of a zero too."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def header(writer: Any, **changes: Any) -> None:
    sizes = {"block_count": LAYERS, "context_length": 256, "embedding_length": D, "feed_forward_length": FF, "head_count": HEADS, "head_count_kv": KV}
    for name, value in (sizes | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)


def finish(writer: Any) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path if hasattr(writer, "path") else "")


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes, every code and every scale; the float16 numbers in them finite."""
    values, size = next((v, s) for name, v, s in TYPES.values() if name == kind)
    blocks = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        blocks[..., at : at + 2] = rng.normal(size=blocks.shape[:2]).astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def small(path: Path, kind: str, seed: int = 0, real: bool = False, **changes: Any) -> dict[str, np.ndarray]:
    """A Llama of one layer whose matrices are of one type; the floats of each tensor, as the gguf package dequantises them."""
    writer = gguf.GGUFWriter(path, "llama")
    header(writer, **changes)
    rng, floats = np.random.default_rng(seed), dict[str, np.ndarray]()
    wanted = gguf.GGMLQuantizationType[kind]
    shapes = {"token_embd": (20, D), "output_norm": (D,)} | {f"blk.0.{n}": (D,) for n in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (D, D), "blk.0.attn_k": (D // 2, D), "blk.0.attn_v": (D // 2, D), "blk.0.attn_output": (D, D)}
    shapes |= {"blk.0.ffn_gate": (FF, D), "blk.0.ffn_up": (FF, D), "blk.0.ffn_down": (D, FF)}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            data = gguf.quants.quantize(values, wanted) if real or kind in FLOATS else random_blocks(kind, *shape, rng)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=wanted)
            values = gguf.quants.dequantize(data, wanted)
        floats[f"{name}.weight"] = values
    finish(writer)
    return floats


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of LlamaModel.permute in llama.cpp's converter."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm", "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj", "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj", "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "real"),
    [*((k, True) for k in ("Q4_0", "Q4_1", "Q8_0")), *((k, False) for k in QUANTISED), *((k, False) for k in FLOATS)],  # the package quantises no K types
)
def test_every_type_is_what_the_gguf_package_says(kind: str, real: bool, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    floats = small(path, kind, real=real)
    expected = {f"{NAMES[k.removesuffix('.weight')]}.weight": v for k, v in floats.items() if k.removesuffix(".weight") in NAMES}
    for short, heads in (("q", HEADS), ("k", KV)):
        expected[f"model.layers.0.self_attn.{short}_proj.weight"] = unpermuted(floats[f"blk.0.attn_{short}.weight"], heads)
    with open_weights(path) as weights:
        assert set(weights.names()) == set(expected)
        for name, want in expected.items():
            assert weights.shape(name) == want.shape
            assert np.array_equal(bits(weights.floats(name)), bits(want)), name
            if want.ndim < 2:
                continue
            found = weights.linear(name.removesuffix(".weight"))
            assert isinstance(found, np.ndarray if kind in FLOATS else Coded8 if kind in ("Q8_0", "Q6_K") else Coded4)
            assert np.array_equal(bits(found if isinstance(found, np.ndarray) else dense(found)), bits(want))
            for start, stop in ((0, 1), (7, 19), (len(want) - 1, len(want))):
                assert np.array_equal(bits(weights.rows(name, start, stop)), bits(want[start:stop]))
    if kind not in FLOATS:
        assert found.codes.flags.c_contiguous and found.scales.dtype == np.float32 and found.group == (16 if kind == "Q6_K" else 32)


# ---- the header


@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_header_is_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    header(writer)
    for i, (name, value) in enumerate({"u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 1 << 31, "i32": -5, "u64": 1 << 63, "i64": -(1 << 40)}.items()):
        writer.add_key_value(f"test.{name}", value, gguf.GGUFValueType[f"{'U' if name[0] == 'u' else ''}INT{name[1:]}"])
        assert i < 8
    writer.add_float32("test.f32", 0.1)
    writer.add_float64("test.f64", 0.1)
    writer.add_bool("test.yes", True)
    writer.add_array("test.numbers", [1.5, 2.5])
    writer.add_token_list(["a", "ä", "\n" * 300])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, rows in (("a", 3), ("b", 5)):
        data = random_blocks(kind, rows, 512, rng) if kind == "Q4_K" else rng.normal(size=(rows, 3)).astype(np.float16)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        found = ours.values[key]
        if key == "tokenizer.ggml.tokens":
            assert found == len(field.contents())
        elif isinstance(found, np.ndarray):
            assert found.tolist() == field.contents()
        else:
            assert found == field.contents() and type(found) is type(field.contents())
    assert len(ours.values) == len(theirs.fields) - 3
    assert [*ours.tensors] == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(int(n) for n in reversed(tensor.shape)) and entry.start == tensor.data_offset and entry.kind == tensor.tensor_type.name
        assert ours.blocks(tensor.name).tobytes() == tensor.data.tobytes()


def test_types_are_the_gguf_package_s() -> None:
    for number, (name, values, size) in TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (values, size)
    for number, name in OTHERS.items():
        assert number not in TYPES
        if number in {int(t) for t in gguf.GGMLQuantizationType}:
            assert gguf.GGMLQuantizationType(number).name == name


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    header(writer, embedding_length=32, feed_forward_length=32, head_count=2, head_count_kv=1)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_array("llama.attention.sliding_window", [16, 16])
    writer.add_token_list(["a", "b"])
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for name, shape in {"token_embd": (3, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "output_norm": (32,), "rope_freqs": (8,)}.items():
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        if name == "rope_freqs":
            writer.add_tensor("rope_freqs.weight", llama3_factors(10000.0, 16, 8.0).astype(np.float32))
        elif len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q4_0), raw_dtype=q4_0)
    finish(writer)
    with open_weights(path) as weights:
        assert weights.config["rope_scaling"]["rope_type"] == "llama3" and weights.config["sliding_window"] == 16
    return path.read_bytes()


def read_all(path: Path) -> None:
    with open_weights(path) as weights:
        for name in weights.names():
            shape = weights.shape(name)
            if math.prod(shape) < 1 << 20:
                assert weights.floats(name).shape == shape


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1199), value=st.integers(0, 255), width=st.sampled_from([1, 4, 8]), cut=st.integers(0, 1 << 20))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # weights that were damaged may overflow
def test_a_damaged_file_is_read_or_refused_in_a_sentence(at: int, value: int, width: int, cut: int, sound: bytes, tmp_path: Path) -> None:
    """Bytes changed anywhere in the header, a number's length at a time, and files cut off anywhere: nothing hangs, nothing else is raised."""
    data = bytearray(sound)
    data[at : at + width] = bytes([value] * width)
    if cut < len(data):
        del data[cut:]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    try:
        read_all(path)
    except FlashHeadError as error:
        said = str(error)
    else:
        said = "read; as it is"
    assert "; " in said and len(said.splitlines()) == 1


def replaced(data: bytes, key: str, form: str, *values: Any) -> bytes:
    """A file with the bytes behind a key's name and type changed."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: b"", "the file cannot be mapped"),
        (lambda d: b"GGU", "no GGUF file that can be read"),
        (lambda d: b"XXXX" + d[4:], "it begins with b'XXXX', version 3"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "1,152,921,504,606,846,976 entries at byte 24"),
        (lambda d: replaced(d, "tokenizer.ggml.tokens", "<IQ", 8, 1 << 62), "4,611,686,018,427,387,904 entries"),
        (lambda d: d[:-40], "ends at byte"),
        (lambda d: d[: len(d) // 4], "no GGUF file that can be read"),
    ],
    ids=["empty", "short", "magic", "version", "pairs", "tokens", "cut tensors", "cut header"],
)
def test_damages_by_name(damage: Callable[[bytes], bytes], sentence: str, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(sound))
    with pytest.raises(CheckpointError, match=f"damaged.gguf: .*{sentence}.*; fetch the (file|model) again$"):
        open_weights(path)


@pytest.mark.parametrize(
    ("key", "form", "value", "sentence"),
    [
        ("llama.block_count", "<I", 2, "tensors of 1 layers, expected 2 as the header says"),
        ("llama.embedding_length", "<I", 64, "an embedding of 32 columns, expected 64 as the header says"),
        ("llama.attention.head_count", "<I", 0, "the header does not say num_attention_heads, expected a whole language model"),
    ],
)
def test_a_header_that_contradicts_its_tensors(key: str, form: str, value: int, sentence: str, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(replaced(sound, key, form, value))
    with pytest.raises(CheckpointError, match=f"^damaged.gguf: {sentence}.*; fetch the file again$"):
        open_weights(path)


def test_rows_that_are_no_pairs_of_each_head(tmp_path: Path) -> None:
    small(tmp_path / "small.gguf", "F32", head_count=3)
    sentence = "^small.gguf: model.layers.0.self_attn.q_proj.weight has 256 rows for 3 heads, expected pairs of them in each; fetch the file again$"
    with pytest.raises(CheckpointError, match=sentence):
        open_weights(tmp_path / "small.gguf")


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_K", "IQ4_NL", "Q2_K", "MXFP4"])
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    header(writer)
    wanted = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[wanted]
    writer.add_tensor("token_embd.weight", np.zeros((4, D // values * size), np.uint8), raw_dtype=wanted)
    finish(writer)
    sentence = f"^small.gguf: token_embd.weight is quantised as {kind}, expected one of F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, BF16; choose another file$"
    with pytest.raises(UnsupportedModelError, match=sentence):
        open_weights(path)


def test_other_architectures_and_parts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    finish(gguf.GGUFWriter(path, "mamba"))
    with pytest.raises(
        UnsupportedModelError, match="^other.gguf: a GGUF file of the architecture mamba, expected one of llama, granite, .*; choose another file$"
    ):
        open_weights(path)
    part = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(UnsupportedModelError, match="^part.gguf: one of 3 parts of a model, expected a single file; merge them with llama-gguf-split --merge$"):
        open_weights(part)
    empty = tmp_path / "empty.gguf"
    finish(gguf.GGUFWriter(empty, "llama"))
    with pytest.raises(CheckpointError, match=r"^empty.gguf: token_embd.weight has the shape \[\], expected a matrix of a whole language model"):
        open_weights(empty)


# ---- families: transformers' own models, written as llama.cpp's converter does, are the same models again


SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 5000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
HEAD = {"head_dim": 8}
GEMMA = {**HEAD, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 4.0}
# architecture in GGUF, transformers' names of config and model, settings
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", "LlamaForCausalLM", {}),
    "llama tied, with biases": ("llama", "LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama 3": ("llama", "LlamaConfig", "LlamaForCausalLM", {"rope_scaling": LLAMA3, "hidden_size": 128, "rope_theta": 500000.0}),
    "llama, wide heads": ("llama", "LlamaConfig", "LlamaForCausalLM", {"head_dim": 16}),
    "granite": ("granite", "GraniteConfig", "GraniteForCausalLM", GRANITE),
    "smollm3": ("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "qwen2": ("qwen2", "Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2 stretched": ("qwen2", "Qwen2Config", "Qwen2ForCausalLM", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma": ("gemma", "GemmaConfig", "GemmaForCausalLM", {**HEAD, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": ("phi3", "Phi3Config", "Phi3ForCausalLM", {}),
    "phi3 turned in part": ("phi3", "Phi3Config", "Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
}  # fmt: skip


def original(case: str) -> Any:
    import transformers

    _, config, model, more = MODELS[case]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**(SIZES | more))).eval()
    with torch.no_grad():  # the library's start would hide a lost bias or norm
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            else:  # multiples of 2^-10 below 2: 1 can be added to a norm and taken away again exactly
                parameter.copy_(torch.randint(-1024, 1025, parameter.shape) / 1024 + (0 if "gemma" in case or name.endswith("bias") else 1))
    return made


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def converted(case: str, model: Any, path: Path) -> None:
    """The model as GGUF in float32: names by the gguf package's table, metadata and changed values as llama.cpp's converter has them."""
    arch, _, _, more = MODELS[case]
    config, text = model.config, SIZES | more
    writer = gguf.GGUFWriter(path, arch)
    head = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    header(
        writer,
        block_count=config.num_hidden_layers,
        embedding_length=config.hidden_size,
        feed_forward_length=config.intermediate_size,
        rope_freq_base=text["rope_theta"],
        rope_dimension_count=int(head * text.get("partial_rotary_factor", 1.0)),
        key_length=text.get("head_dim"),
        value_length=text.get("head_dim"),
        sliding_window=text.get("sliding_window") or (0 if arch == "phi3" else None),
        vocab_size=config.vocab_size,
        attn_logit_softcapping=text.get("attn_logit_softcapping"),
        final_logit_softcapping=text.get("final_logit_softcapping"),
        embedding_scale=text.get("embedding_multiplier"),
        residual_scale=text.get("residual_multiplier"),
        attention_scale=text.get("attention_multiplier"),
        logit_scale=text.get("logits_scaling"),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    scaling = text.get("rope_scaling")
    if scaling and scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors_one_by_one(text["rope_theta"], head, scaling))
    elif scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and text["tie_word_embeddings"]:
            continue
        values = tensor.float().numpy()
        if arch in ("llama", "granite", "smollm3") and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if arch in ("llama", "granite", "smollm3") and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(f"{table.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}", np.ascontiguousarray(values))
    finish(writer)


def factors_one_by_one(theta: float, head: int, scaling: dict[str, Any]) -> np.ndarray:
    """As llama.cpp's converter makes them."""
    out, length = [], scaling["original_max_position_embeddings"]
    for i in range(0, head, 2):
        wave = 2 * math.pi * theta ** (i / head)
        if wave < length / scaling["high_freq_factor"]:
            out.append(1.0)
        elif wave > length / scaling["low_freq_factor"]:
            out.append(scaling["factor"])
        else:
            smooth = (length / wave - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            out.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_from_gguf(case: str, tmp_path: Path) -> None:
    """Weights to the bit; and the model that the config found makes of them has the logits of the original, so that nothing it needs is lost."""
    import transformers
    from transformers import CONFIG_MAPPING

    model, path = original(case), tmp_path / "model.gguf"
    converted(case, model, path)
    wanted = {k: v.numpy() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    with open_weights(path) as weights:
        assert set(weights.names()) == set(wanted)
        state = {name: weights.floats(name) for name in weights.names()}
        config = dict(weights.config)
    for name, want in wanted.items():
        assert np.array_equal(state[name], want), name
    assert config["architectures"] == [MODELS[case][2]] and (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    again = getattr(transformers, config["architectures"][0])(CONFIG_MAPPING[config["model_type"]](**config)).eval()
    missing, unexpected = again.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ids = torch.randint(0, 67, (1, 48), generator=torch.Generator().manual_seed(1))  # longer than the sliding window
    with torch.no_grad():
        want, got = model(ids).logits, again(ids).logits
    assert torch.equal(want, got)  # epsilon and the factors, which the file has in float32, are used in float32
    assert float(want.std()) > 0.01


@pytest.mark.parametrize("case", ["llama", "llama, wide heads", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_weights_are_those_that_transformers_loads(case: str, tmp_path: Path) -> None:
    """transformers reads GGUF by code of its own, for some of the families."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "model.gguf"
    converted(case, original(case), path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    with open_weights(path) as weights:
        for name in weights.names():
            assert np.array_equal(weights.floats(name), theirs[name].numpy()), name


def test_stretched_positions_that_are_not_llama_3_s_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = original("llama 3")
    model.config.vocab_size = 67
    MODELS["bent"] = ("llama", "LlamaConfig", "LlamaForCausalLM", {**MODELS["llama 3"][3], "rope_scaling": {**LLAMA3, "high_freq_factor": 3.0}})
    try:
        converted("bent", model, path)
    finally:
        del MODELS["bent"]
    with pytest.raises(
        UnsupportedModelError, match=r"rotary frequencies divided by factors 1 to 32, expected Llama 3's \(low_freq_factor 1, .*; choose another file$"
    ):
        open_weights(path)


def test_layers_of_unequal_heads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    small(path, "F32", head_count_kv=[2, 4])
    with pytest.raises(
        UnsupportedModelError, match="^small.gguf: llama.attention.head_count_kv differs from layer to layer, expected one number; choose another file$"
    ):
        open_weights(path)


def test_longrope_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    header(writer)
    for name, shape in {"token_embd.weight": (4, D), "rope_factors_long.weight": (8,)}.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    finish(writer)
    with pytest.raises(
        UnsupportedModelError, match="^long.gguf: rotary positions stretched as longrope, expected none, linear, yarn or Llama 3's; choose another file$"
    ):
        open_weights(path)


# ---- the real one


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="scripts/fetch_model.py has not fetched SmolLM2")
def test_smollm2_is_what_transformers_loads() -> None:
    """Q4_1 but for the embedding in Q8_0, q and k permuted: all 272 parameters."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    state = theirs.state_dict()
    with open_weights(SMOLLM2) as weights:
        names = set(weights.names())
        assert names == set(state) - {"lm_head.weight"} and len(names) == 272
        for name in names:
            assert np.array_equal(weights.floats(name), state[name].numpy()), name
        q = weights.linear("model.layers.3.self_attn.q_proj")
        assert isinstance(q, Coded4) and q.minima is not None
        embedding = "model.embed_tokens.weight"
        assert np.array_equal(weights.rows(embedding, 1000, 1003), state[embedding][1000:1003].numpy())
        for key, value in weights.config.items():
            if key not in ("architectures", "rope_theta"):
                assert getattr(theirs.config, key) == value, key
        assert theirs.config.rope_parameters["rope_theta"] == weights.config["rope_theta"] == 100000.0
