"""The body as one operator of ours, against the standard body that it is made from: every family, and what only long texts and odd sizes reach."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_bodies import BODIES, GEMMA, LAYERS, SIZES, decode_with, save_body, session, warm_builder

pytest.importorskip("onnxruntime_genai")

import onnx_ir as ir
import onnxruntime as ort

from flashhead_edge.export.body import Body, build_body
from flashhead_edge.export.decoder import RECORD, NotNative, decoder_model
from flashhead_edge.jetson.onnxruntime_sessions import native_library, runtime_errors

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the operators' library was not built: no C compiler where flashhead-edge was installed")
Built = Callable[..., tuple[Path, Body]]
LENGTHS = [20, 15, 1, 1, 1, 1, 1]  # beyond the window of 16, a piece onto its cache, and steps of one token
NATIVE = [family for family in BODIES if family != "phi3_long"]


def ids_of(lengths: list[int] = LENGTHS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 120, (1, sum(lengths)))


def native_session(path: Path, threads: int = 1, library: Path | None = LIBRARY) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(path), options)


def native(body: Path, out: Path) -> Path:
    ir.save(decoder_model(ir.load(body), {}), out / "native.onnx", external_data="native.onnx.data")
    return out / "native.onnx"


def exact_activations(body: Path, out: Path) -> ort.InferenceSession:
    """The same codes times activations that are not rounded."""
    model = ir.load(body)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
    ir.save(model, out / "exact.onnx", external_data="exact.onnx.data")
    return session(out / "exact.onnx")


def check_against_standard(body: Path, out: Path, lengths: list[int] = LENGTHS) -> None:
    """Both round activations to 8 bits in the same blocks; where the two differ in a sum's last bit a value may be rounded to its other neighbour.

    So the judge is the body without that rounding: the native one is as near to it as the standard one. A wrong window, table, norm or
    cache moves states by 1e-2 and more of their size, the rounding by a tenth to a third of that.
    """
    ids = ids_of(lengths)
    exact = decode_with(exact_activations(body, out), ids, lengths)
    standard, found = decode_with(session(body), ids, lengths), decode_with(native_session(native(body, out)), ids, lengths)
    far, near = (np.linalg.norm(x - exact, axis=-1)[0] for x in (standard, found))
    assert near.mean() < 1.15 * far.mean() and (near < 2 * far.max()).all()
    assert np.linalg.norm(found - standard, axis=-1).max() < 2 * far.max()


@pytest.mark.parametrize("family", NATIVE)
def test_family_is_as_near_to_unrounded_activations_as_the_standard_body(family: str, built: Built, tmp_path: Path) -> None:
    check_against_standard(built(family, "int4")[0], tmp_path)


@pytest.mark.parametrize("group", [64, 128])
def test_groups_that_end_beyond_a_row(group: int, built: Built, tmp_path: Path) -> None:
    """Rows of 64 and 96 codes: a group of 64 or 128 is padded."""
    check_against_standard(built("llama_tied", "int4", group)[0], tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_long_texts_are_read_in_parts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of one token reads 256 positions at a time and joins them; a window begins within a part."""
    sizes = SIZES | {"max_position_embeddings": 1024}
    long: dict[str, Callable[[Any], Any]] = {
        "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
        "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**sizes | GEMMA | {"sliding_window": 300}, **LAYERS)),
    }
    monkeypatch.setitem(BODIES, family, long[family])
    with warm_builder():
        body = build_body(save_body(tmp_path / "model", family), tmp_path / "work", precision="int4")
    ir.save(body.model, tmp_path / "body.onnx", external_data="body.onnx.data")
    check_against_standard(tmp_path / "body.onnx", tmp_path, [3, 1, 250, 1, 1, 1, 1, 310, 1, 1, 200, 1])


def test_zero_points_of_a_quantised_checkpoint(built: Built, tmp_path: Path) -> None:
    """As GPTQ and AWQ have them: four bits for each group, two in a byte."""
    path, _ = built("llama", "int4")
    model, generator = ir.load(path), np.random.default_rng(0)
    for node in [n for n in model.graph if n.op_type == "MatMulNBits"]:
        n, groups = node.attributes.get_int("N"), -(-node.attributes.get_int("K") // 32)
        zeros = generator.integers(0x55, 0xBB, (n, -(-groups // 2)), dtype=np.uint8)
        value = ir.Value(name=f"{node.name}.zeros", shape=ir.Shape(zeros.shape), type=ir.TensorType(ir.DataType.UINT8), const_value=ir.tensor(zeros))
        model.graph.initializers[value.name] = value
        node.resize_inputs(4)
        node.replace_input_with(3, value)
    ir.save(model, tmp_path / "zeros.onnx", external_data="zeros.onnx.data")
    check_against_standard(tmp_path / "zeros.onnx", tmp_path)


def test_threads_change_no_bit(built: Built, tmp_path: Path) -> None:
    path, ids = native(built("qwen3", "int4")[0], tmp_path), ids_of()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    one, two = (decode_with(native_session(path, threads), ids, LENGTHS) for threads in (1, 2))
    assert np.array_equal(one, two)
    # a helper may leave a processor to the thread that called; that thread is not ours to move
    assert before is None or os.sched_getaffinity(0) == before


@pytest.mark.skipif(os.name == "nt" or shutil.which("cc") is None, reason="no C compiler is called cc here")
@pytest.mark.parametrize("define", ["FLASHHEAD_PLAIN", "FLASHHEAD_NARROW"])
def test_vector_instructions_change_no_bit(define: str, root: Path, built: Built, tmp_path: Path) -> None:
    """The plain loops and those for AVX2, against those that this processor runs."""
    other = tmp_path / "other.so"
    flags = ["-O2", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi", "-shared", "-fPIC", f"-D{define}"]
    sources = sorted(p for p in (root / "jetson/native").glob("*.c") if p.name != "module.c")  # which needs Python's headers
    subprocess.run(["cc", *flags, "-o", other, *sources, "-lm"], check=True, timeout=120)
    for family, group in (("gemma3", 32), ("phi", 32), ("llama_tied", 64)):
        out = tmp_path / f"{family}-{group}"
        out.mkdir()
        path, ids = native(built(family, "int4", group)[0], out), ids_of()
        assert np.array_equal(decode_with(native_session(path, library=other), ids, LENGTHS), decode_with(native_session(path), ids, LENGTHS))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_no_number_makes_states_that_are_none(wrong: float, built: Built, tmp_path: Path) -> None:
    """Rounded to 8 bits it would be one again: a damaged model would decode nonsense without a word."""
    model = ir.load(native(built("llama", "int4")[0], tmp_path))
    norm = model.graph.initializers["model.layers.0.input_layernorm.weight"]
    damaged = norm.const_value.numpy().copy()
    damaged[5] = wrong
    norm.const_value = ir.tensor(damaged, name=norm.name)
    ir.save(model, tmp_path / "damaged.onnx", external_data="damaged.onnx.data")
    states = decode_with(native_session(tmp_path / "damaged.onnx"), ids_of(), LENGTHS)
    assert np.isnan(states).all(-1).all()


def test_cache_in_place_gives_what_a_growing_one_gives(built: Built, tmp_path: Path) -> None:
    """Past and present in one buffer that is longer than the text."""
    path, ids = native(built("mistral", "int4")[0], tmp_path), ids_of()
    s = native_session(path)
    want, binding, start, found = decode_with(s, ids, LENGTHS), s.io_binding(), 0, []
    binding.bind_output("hidden_states")  # the first of the outputs
    for value in (v for v in s.get_inputs() if v.name.startswith("past_key_values.")):
        buffer = ort.OrtValue.ortvalue_from_numpy(np.full((1, value.shape[1], 64, value.shape[3]), np.nan, np.float32))
        binding.bind_ortvalue_input(value.name, buffer)
        binding.bind_ortvalue_output(value.name.replace("past_key_values.", "present."), buffer)
    for length in LENGTHS:
        binding.bind_output("hidden_states")
        binding.bind_cpu_input("input_ids", ids[:, start : start + length])
        binding.bind_cpu_input("texts", np.array([[length, start, 0]]))
        s.run_with_iobinding(binding)
        found.append(binding.get_outputs()[0].numpy())
        start += length
    assert np.array_equal(np.concatenate(found, 1), want)


def test_a_body_with_an_operator_that_has_no_instruction_says_which(built: Built) -> None:
    for family, precision, words in (("phi3_long", "int4", "no initializer"), ("llama", "fp32", "MatMul has no instruction"), ("llama_tied", "int8", "8 bits")):
        with pytest.raises(NotNative, match=words):
            decoder_model(ir.load(built(family, precision)[0]), {})


def test_making_the_model_twice_gives_the_same_bytes(built: Built) -> None:
    one, two = (ir.to_proto(decoder_model(ir.load(built("gemma3", "int4")[0]), {})).graph.node[0].SerializeToString() for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (0, 99, "does not fit the arrays or slots"),  # the operation
        (1, 10**6, "does not fit the arrays or slots"),  # columns beyond a slot
        (3, 60, "does not fit the arrays or slots"),  # a slot that there is not
        (4, 10**6, "does not fit the arrays or slots"),
        (11, 500, "does not fit the arrays or slots"),  # an initializer that there is not
    ],
)
def test_instructions_that_do_not_fit_are_refused_when_the_model_is_opened(field: int, value: int, words: str, built: Built, tmp_path: Path) -> None:
    model = decoder_model(ir.load(built("llama", "int4")[0]), {})
    (node,) = model.graph
    original = list(node.attributes["instructions"].as_ints())
    for at in range(0, len(original), RECORD):
        if field == 11 and original[at] in (4, 5, 8):  # operations without an initializer
            continue
        changed = [*original]
        changed[at + field] = value
        node.attributes.add(ir.AttrInt64s("instructions", changed))
        ir.save(model, tmp_path / "wrong.onnx", external_data="wrong.onnx.data")
        with pytest.raises(runtime_errors(), match=words):
            native_session(tmp_path / "wrong.onnx")


@dataclass
class Text:
    """Of a test: what is fed of it at a time, and where in the cache it stands."""

    ids: list[int]
    lengths: list[int]
    start: int
    read: int = 0
    states: list[np.ndarray] = field(default_factory=list)

    def next(self, number: int) -> int:
        return self.lengths[number] if number < len(self.lengths) else 0


def feed_side_by_side(s: ort.InferenceSession, texts: list[Text], capacity: int) -> None:
    """Feed texts in passes of all that have something left: what each says comes to its states."""
    binding = s.io_binding()
    binding.bind_output("hidden_states")
    for value in (v for v in s.get_inputs() if v.name.startswith("past_key_values.")):
        buffer = ort.OrtValue.ortvalue_from_numpy(np.full((1, value.shape[1], capacity, value.shape[3]), np.nan, np.float32))
        binding.bind_ortvalue_input(value.name, buffer)
        binding.bind_ortvalue_output(value.name.replace("past_key_values.", "present."), buffer)
    for number in range(max(len(text.lengths) for text in texts)):
        binding.bind_output("hidden_states")
        parts = [text.ids[text.read : text.read + text.next(number)] for text in texts]
        binding.bind_cpu_input("input_ids", np.array([[token for part in parts for token in part]], np.int64))
        binding.bind_cpu_input("texts", np.array([[len(part), text.read, text.start] for text, part in zip(texts, parts)]))
        s.run_with_iobinding(binding)
        found, at = binding.get_outputs()[0].numpy()[0], 0
        for text, part in zip(texts, parts):
            text.states.append(found[at : at + len(part)])
            text.read, at = text.read + len(part), at + len(part)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gemma3", "phi"])
def test_texts_in_one_pass_have_the_states_that_each_has_alone(family: str, threads: int, built: Built, tmp_path: Path) -> None:
    """To the bit: prompts beside single tokens, texts that have ended, more than one part of a cache, windows, and no order in the cache."""
    s, generator = native_session(native(built(family, "int4")[0], tmp_path), threads), np.random.default_rng(1)
    lengths = [[20, 1, 1, 1, 15, 1, 1], [1, 1, 1, 1, 1], [3, 30, 1], [2, 0, 0, 1, 1, 1, 1], [1, 60, 1, 1, 1, 1, 1]]
    starts = [70, 0, 140, 8, 200]
    made = [generator.integers(3, 120, sum(some)).tolist() for some in lengths]
    together = [Text(ids, some, start) for ids, some, start in zip(made, lengths, starts)]
    feed_side_by_side(s, together, 300)
    for text in together:
        alone = Text(text.ids, [n for n in text.lengths if n], 0)
        feed_side_by_side(s, [alone], 80)
        assert np.array_equal(np.concatenate(text.states), np.concatenate(alone.states))


def test_long_texts_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of 256 positions of some texts, one of others."""
    monkeypatch.setitem(BODIES, "llama", lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES | {"max_position_embeddings": 1024})))
    with warm_builder():
        body = build_body(save_body(tmp_path / "model", "llama"), tmp_path / "work", precision="int4")
    ir.save(body.model, tmp_path / "body.onnx", external_data="body.onnx.data")
    s, generator = native_session(native(tmp_path / "body.onnx", tmp_path)), np.random.default_rng(2)
    lengths = [[700, 1, 1, 1], [5, 1, 1, 1], [255, 1, 1, 1], [513, 1, 1, 1]]
    together = [Text(generator.integers(3, 120, sum(some)).tolist(), some, start) for some, start in zip(lengths, (0, 720, 740, 1000))]
    feed_side_by_side(s, together, 1600)
    for text in together:
        alone = Text(text.ids, text.lengths, 0)
        feed_side_by_side(s, [alone], 800)
        assert np.array_equal(np.concatenate(text.states), np.concatenate(alone.states))


def test_a_body_of_one_text_still_runs(built: Built, tmp_path: Path) -> None:
    """As it was exported before there were several: the mask's length says how many positions there are."""
    path, ids = native(built("llama", "int4")[0], tmp_path), ids_of()
    want = decode_with(native_session(path), ids, LENGTHS)
    model = ir.load(path)
    (node,) = model.graph
    del node.attributes["texts"]
    model.graph.inputs[1].name, model.graph.inputs[1].shape = "attention_mask", ir.Shape((1, "T"))
    ir.save(model, tmp_path / "older.onnx", external_data="older.onnx.data")
    older = native_session(tmp_path / "older.onnx")
    assert np.array_equal(decode_with(older, ids, LENGTHS), want)
    cache = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in older.get_inputs() if v.name.startswith("past")}
    with pytest.raises(runtime_errors(), match="one text at a time"):
        older.run(None, {"input_ids": np.full((1, 2), 5), "attention_mask": np.ones((1, 1), np.int64)} | cache)


def test_inputs_that_do_not_fit_are_refused(built: Built, tmp_path: Path) -> None:
    s = native_session(native(built("llama", "int4")[0], tmp_path))
    cache = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in s.get_inputs() if v.name.startswith("past")}

    def refused(ids: np.ndarray, *texts: tuple[int, ...], **other: np.ndarray) -> str:
        with pytest.raises(runtime_errors()) as error:
            s.run(None, {"input_ids": ids, "texts": np.array(texts, np.int64)} | cache | other)
        return str(error.value)

    one = np.full((1, 1), 5, np.int64)
    assert "input_ids is not [1, S]" in refused(np.repeat(one, 2, 0), (2, 0, 0))
    assert "a token of input_ids is none of the vocabulary" in refused(one + 10**6, (1, 0, 0))
    assert "all positions before the tokens" in refused(one, (1, 3, 0))
    assert "all positions before the tokens" in refused(one, (1, 0, 3))
    assert "are not those of input_ids" in refused(one, (1, 0, 0), (1, 0, 1))
    assert "below 0 or beyond all caches" in refused(one, (1, 0, -1))
    assert "below 0 or beyond all caches" in refused(one, (1, 1 << 40, 0))
    assert "longer than the model's rotary tables" in refused(one, (1, 10**6, 0), **{n: np.zeros((1, 2, 10**6 + 1, 16), np.float32) for n in cache})
    for rows in ((), ((0, 0, 0),)):
        empty = {"input_ids": one[:, :0], "texts": np.array(rows, np.int64).reshape(-1, 3)}
        assert s.run(["hidden_states"], empty | cache)[0].shape == (1, 0, 64)
