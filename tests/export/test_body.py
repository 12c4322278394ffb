"""The decoder's body: every family against transformers, every precision and dialect against the family's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bodies import BODIES, VOCAB, decode, decode_with, save_body, session, states_of, warm_builder
from small_checkpoints import save_checkpoint
from small_models import small_model

pytest.importorskip("onnxruntime_genai")

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from flashhead_edge.errors import CheckpointError, ExportError, SettingsError, UnsupportedModelError
from flashhead_edge.export.body import Body, build_body, layer_rules
from flashhead_edge.export.body_dialects import to_dialect
from flashhead_edge.export.passes.products import Coded, coded_weights

Built = Callable[..., tuple[Path, Body]]
Folders = Callable[[str], Path]
InDialect = Callable[..., Path]
LENGTHS = [20, 15, 1, 1, 1, 1, 1]  # a prompt longer than the window of 16, a piece onto its cache, and steps of one token
ROUNDING = 3e-5  # of values about 3, after two layers of float32 sums of up to 128 terms in another order: 7e-6 was measured.
# The faults that this must see are larger: an embedding scale rounded to two decimals 4e-4, a wrong window or rotary table 1e-2 and more.


def ids_of(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 120, (batch, sum(LENGTHS)))


@pytest.fixture
def in_dialect(built: Built, tmp_path: Path) -> Callable[..., Path]:
    """The same body in a dialect, checked by onnx. `stored` is the precision where the builder's is another (fp16 comes from fp32)."""

    def make(family: str, dialect: str, precision: str = "fp32", stored: str | None = None) -> Path:
        path, body = built(family, precision)
        return save_dialect(Body(ir.load(path), body.genai_config, stored or precision, body.group), dialect, tmp_path / dialect)

    return make


def save_dialect(body: Body, dialect: str, out: Path) -> Path:
    """Turn a body into a dialect and write it, checked by onnx."""
    out.mkdir()
    to_dialect(body, dialect)
    ir.save(body.model, out / "model.onnx", external_data="model.onnx.data")
    if dialect != "onnxruntime":
        onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
        assert body.model.graph.opset_imports == {"": 21} and body.model.ir_version == 10
    return out / "model.onnx"


@pytest.mark.parametrize("family", BODIES)
def test_family_has_transformers_hidden_states(family: str, model_folder: Folders, built: Built, in_dialect: InDialect) -> None:
    """Prompt, continued prompt and single steps, in ONNX Runtime's operators and in ai.onnx alone."""
    ids, folder = ids_of(), model_folder(family)
    want = states_of(folder, ids)
    path, body = built(family)
    assert np.abs(decode_with(session(path), ids, LENGTHS) - want).max() < ROUNDING
    portable = session(in_dialect(family, "portable"))
    assert np.abs(decode_with(portable, ids, LENGTHS) - want).max() < ROUNDING
    decoder = body.genai_config["model"]["decoder"]
    assert decoder["hidden_size"] == want.shape[-1] and "logits" not in decoder["outputs"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reference_evaluator_agrees_with_onnx_runtime(family: str, in_dialect: InDialect) -> None:
    """Two rows of different lengths, padded on their left."""
    path = in_dialect(family, "portable")
    s, reference = session(path), ReferenceEvaluator(str(path))
    ids, mask = ids_of(2), np.ones((2, sum(LENGTHS)), np.int64)
    mask[1, :5] = 0
    want = decode_with(s, ids, LENGTHS, mask)
    names = [o.name for o in s.get_outputs()]
    got = decode(lambda feed: reference.run(None, feed), s.get_inputs(), names, ids, LENGTHS, mask)
    assert np.abs(got - want)[mask == 1].max() < ROUNDING
    alone = decode_with(s, ids[1:, 5:], [LENGTHS[0] - 5, *LENGTHS[1:]])
    assert np.abs(want[1:, 5:] - alone).max() < ROUNDING


def test_embedding_is_the_checkpoint_s_own_matrix_stored_once(model_folder: Folders, built: Built) -> None:
    for family, name in (("llama_tied", "head.rows"), ("llama", "model.embed_tokens")):
        model = ir.load(built(family)[0])
        matrices = [v for v in model.graph.initializers.values() if VOCAB in v.shape.numpy()]
        assert [v.name for v in matrices] == [name]
        assert matrices[0].dtype == ir.DataType.BFLOAT16
        from flashhead_edge.checkpoint.source import open_source, weight_map
        from flashhead_edge.checkpoint.tensors import read_array, read_header

        file = weight_map(open_source(model_folder(family)).folder)["model.embed_tokens.weight"]
        stored = read_array(file, "model.embed_tokens.weight", read_header(file)["model.embed_tokens.weight"])
        assert np.array_equal(matrices[0].const_value.numpy().astype(np.float32), stored)


@pytest.mark.parametrize(("precision", "group"), [("int4", 32), ("int4", 64), ("int8", 32)])
def test_codes_lie_within_a_step_of_the_weights(precision: str, group: int, built: Built) -> None:
    """Every product is coded, for 8-bit activations, and its codes read as the portable dialect reads them are the weights."""
    floats = ir.load(built("llama_tied")[0])
    weights = {n.name: n.inputs[1].const_value.numpy() for n in floats.graph if n.op_type == "MatMul"}
    coded = [n for n in ir.load(built("llama_tied", precision, group)[0]).graph if n.op_type == "MatMulNBits"]
    assert len(coded) == len(weights) == 8
    for node in coded:
        c = coded_weights(node)
        assert (c.bits, c.group, node.attributes.get_int("accuracy_level")) == (int(precision[3:]), group, 4) and c.symmetric
        scale = np.repeat(c.scales.numpy().reshape(c.n, c.groups).T, group, axis=0)[: c.k]
        weight = weights[node.name.removesuffix("_Q4").removesuffix("_Q8")]
        error = np.abs((c.unpacked().astype(np.float32) - 2 ** (c.bits - 1)) * scale - weight)
        # half a step, and up to a whole one at the end of the range that has one code less
        assert (error <= np.abs(scale) * 1.001).all() and (error <= np.abs(scale) * 0.501).mean() > 0.97


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_coded_bodies_agree_across_dialects(precision: str, built: Built, in_dialect: InDialect, tmp_path: Path) -> None:
    """With 32-bit activations, ONNX Runtime's fused products, its plain ones and the reference evaluator read the same codes."""
    path = in_dialect("llama_tied", "portable", precision)
    s, reference, ids = session(path, exact=True), ReferenceEvaluator(str(path)), ids_of()
    want = decode_with(s, ids, LENGTHS)
    names = [o.name for o in s.get_outputs()]
    assert np.abs(decode(lambda feed: reference.run(None, feed), s.get_inputs(), names, ids, LENGTHS) - want).max() < ROUNDING
    fused = ir.load(built("llama_tied", precision)[0])
    for node in fused.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
            if precision == "int8":
                _least_code_is_one(node)
    ir.save(fused, tmp_path / "fused.onnx", external_data="fused.onnx.data")
    assert np.abs(decode_with(session(tmp_path / "fused.onnx"), ids, LENGTHS) - want).max() < ROUNDING


def _least_code_is_one(node: ir.Node) -> None:
    """What the portable dialect does to 8 bits: where a scale is negative, the least code, -128, becomes -127."""
    codes, scales = (v.const_value.numpy() for v in node.inputs[1:3])
    negative = scales.reshape(codes.shape[0], codes.shape[1], 1) < 0
    node.inputs[1].const_value = ir.tensor(np.where(negative & (codes == 0), 1, codes).astype(np.uint8), name=node.inputs[1].name)


@pytest.mark.parametrize(("stored", "builder"), [("fp16", "fp32"), ("int4", "int4"), ("int8", "int8")])
def test_tensorrt_types_are_in_the_file(stored: str, builder: str, in_dialect: InDialect) -> None:
    path = in_dialect("gemma3", "tensorrt", builder, stored)
    model = ir.load(path)
    products = [n for n in model.graph if n.op_type == "MatMul"]
    assert {n.inputs[0].dtype for n in products if n.inputs[0].dtype is not None} <= {ir.DataType.FLOAT16}
    assert all(v.dtype == ir.DataType.FLOAT16 for v in model.graph.inputs if v.name.startswith("past"))
    weights = {v.dtype for v in model.graph.initializers.values() if v.name.endswith((".codes", ".half"))}
    assert weights == {{"fp16": ir.DataType.FLOAT16, "int4": ir.DataType.INT4, "int8": ir.DataType.INT8}[stored]}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert len(node.inputs) == 2  # symmetric
            assert stored == "int4" or (node.inputs[1].const_value.numpy() > 0).all()
    ids = ids_of()
    want = decode_with(session(in_dialect("gemma3", "portable", builder), exact=True), ids, LENGTHS)
    got = decode_with(session(path, exact=True), ids, LENGTHS)
    assert np.abs(got - want).max() < 0.03  # 11 bits in each of some twenty roundings on the way, of values about 3


def test_sixteen_bit_weights_are_multiplied_in_thirty_two(model_folder: Folders, built: Built, in_dialect: InDialect) -> None:
    """ONNX Runtime has no 16-bit product on a CPU: an fp16 body is a file of half the size."""
    path = in_dialect("llama_tied", "onnxruntime", "fp32", "fp16")
    assert path.with_name("model.onnx.data").stat().st_size < 0.7 * built("llama_tied")[0].with_name("body.onnx.data").stat().st_size
    want, ids = states_of(model_folder("llama_tied"), ids_of()), ids_of()
    # bfloat16 weights are exact in float16 unless they are tiny, so nothing but float32 rounding is left
    assert np.abs(decode_with(session(path), ids, LENGTHS) - want).max() < 1e-3


def test_a_model_and_its_checkpoint_export_to_the_same_bytes(model_folder: Folders, built: Built, tmp_path: Path) -> None:
    """A FlashHead checkpoint is the model that it was made from, two exports are one, and a warm builder's body is the product's."""
    save_checkpoint(model_folder("llama_tied"), tmp_path / "checkpoint")
    (tmp_path / "work").mkdir()
    body = build_body(tmp_path / "checkpoint", tmp_path / "work", precision="int4")
    ir.save(body.model, tmp_path / "work/body.onnx", external_data="body.onnx.data")
    for file in ("body.onnx", "body.onnx.data", "body/genai_config.json"):
        assert (tmp_path / "work" / file).read_bytes() == (built("llama_tied", "int4")[0].parent / file).read_bytes(), file


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
@pytest.mark.parametrize(("family", "precision"), [("llama_tied", "int4"), ("gemma3", "int8"), ("phi3", "fp16")])
def test_tensorrt_rtx_parses_and_builds(dialect: str, family: str, precision: str, root: Path, in_dialect: InDialect) -> None:
    """On a machine without a GPU; in a process of its own, which TensorRT may abort."""
    pytest.importorskip("tensorrt_rtx_bindings")
    path = in_dialect(family, dialect, "fp32" if precision == "fp16" else precision, precision)
    result = subprocess.run([sys.executable, root / "scripts/check_tensorrt_rtx.py", path], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_layer_rules_follow_the_config() -> None:
    import transformers as t

    def rules(family: str) -> list[tuple[int | None, bool]]:
        return [(r.window, r.rotary) for r in layer_rules(BODIES[family](t).config)]

    assert rules("llama") == [(None, True)] * 2
    assert rules("mistral") == rules("phi3") == [(16, True)] * 2
    assert rules("qwen2") == [(None, True), (16, True)]
    assert rules("gemma3") == [(16, True), (None, True)]
    assert rules("smollm3") == [(None, True), (None, False)]


def refused(folder: Path, tmp_path: Path, **options: object) -> str:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    with pytest.raises((CheckpointError, ExportError, UnsupportedModelError, SettingsError)) as error:
        build_body(folder, work, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_what_cannot_be_exported_refused_before_anything_is_written(model_folder: Folders, tmp_path: Path) -> None:
    small_model("cohere").save_pretrained(tmp_path / "cohere")
    assert "CohereForCausalLM has no body in ONNX here, expected one of the families Gemma, Gemma2" in refused(tmp_path / "cohere", tmp_path)
    small_model("llama").save_pretrained(tmp_path / "narrow")
    assert "attention heads of 8 values, expected a multiple of 16" in refused(tmp_path / "narrow", tmp_path)
    assert "a body of int3 in groups of 32: expected one of fp32, fp16, int8, int4" in refused(model_folder("llama"), tmp_path, precision="int3")
    packed = tmp_path / "packed"
    save_body(packed, "llama")
    config = json.loads((packed / "config.json").read_text())
    for change, sentence in (
        ({"format": "int-quantized"}, "compressed-tensors with the format int-quantized, expected pack-quantized"),
        ({"config_groups": {}}, "compressed-tensors with 0 kinds of weights, expected one"),
        ({"config_groups": groups_of({"num_bits": 8})}, "compressed-tensors with 8 bits, a scale for each group (32), expected 4 bits in groups of 16, 32"),
        ({"config_groups": groups_of({"strategy": "channel", "group_size": None})}, "4 bits, a scale for each channel (None), expected 4 bits in groups"),
        ({}, "config.json says pack-quantized, but there is no weight_packed; fetch the model again"),
    ):
        (packed / "config.json").write_text(json.dumps(config | {"quantization_config": COMPRESSED | change}))
        assert sentence in refused(packed, tmp_path)
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}))
    assert "integers of 4 bits, expected a body of int4, found int8; pass --body int4" in refused(packed, tmp_path, precision="int8")
    scaled = save_body(tmp_path / "scaled", "gemma3")
    config = json.loads((scaled / "config.json").read_text())
    config["rope_parameters"]["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    (scaled / "config.json").write_text(json.dumps(config))
    assert "scaled rotary positions for full_attention layers" in refused(scaled, tmp_path)
    assert not any((tmp_path / "work").iterdir())


def test_builder_s_own_refusal_is_one_sentence(tmp_path: Path) -> None:
    folder = save_body(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder, tmp_path)
    assert "failed (NotImplementedError: The dynamic RoPE style is not currently supported.)" in message
    assert "\n" not in message and "onnxruntime-genai 0." in message


def groups_of(change: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | (change or {})
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups_of(), "ignore": ["lm_head"]}


@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("qwen2", False), ("phi3", False), ("phi", True), ("gemma3", False), ("granite", True)])
def test_a_compressed_tensors_checkpoint_keeps_its_integers(family: str, symmetric: bool, tmp_path: Path) -> None:
    """The builder codes floats; codes, scales and zero points in its graph are the checkpoint's, bit for bit, every product's."""
    from safetensors.torch import load_file, save_file

    from flashhead_edge.checkpoint.quantised import dequantised
    from flashhead_edge.quantize.grid import nearest, packed

    folder = save_body(tmp_path / "model", family, torch.float16)
    tensors, coded = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("_proj.weight", "dense.weight", "fc1.weight", "fc2.weight"))]:
        weight, stem = tensors.pop(name).float(), name.removesuffix(".weight")
        coded[stem] = nearest(weight * 0.9 + (0 if symmetric else 0.1), 32, symmetric, torch.float16)
        tensors |= {f"{stem}.{part}": tensor for part, tensor in packed(coded[stem]).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = COMPRESSED | {"config_groups": groups_of({"symmetric": symmetric})}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    (tmp_path / "work").mkdir()
    with warm_builder():
        body = build_body(folder, tmp_path / "work", precision="int4", group=128)  # the checkpoint's own is 32
    assert body.group == 32
    products = [coded_weights(n) for n in body.model.graph if n.op_type == "MatMulNBits"]
    assert sum(c.n for c in products) == sum(len(c.codes) for c in coded.values())
    for c in products:
        parts = [stem for stem, own in coded.items() if f".{c.name.split('/')[2]}." in stem and own.codes.shape[1] == c.k]
        stacked = c.unpacked().T
        zeros, scales = c.unpacked_zeros().T, c.scales.numpy().reshape(c.n, c.groups)
        at = 0
        while at < c.n:  # the linear layers on top of each other, each found by its own integers
            found = [s for s in parts if np.array_equal(coded[s].codes.numpy(), stacked[at : at + len(coded[s].codes)])]
            assert len(found) == 1, c.name
            own = coded[found[0]]
            span = slice(at, at + len(own.codes))
            assert np.array_equal(own.scales.float().numpy(), scales[span])
            assert np.array_equal(np.full_like(zeros[span], 8) if own.zeros is None else own.zeros.numpy(), zeros[span])
            at = span.stop
        assert at == c.n and c.symmetric == symmetric
    floats = dict(dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, family))
    plain = save_body(tmp_path / "plain", family, torch.float32)
    save_file({n: t.float().contiguous() for n, t in floats.items()}, plain / "model.safetensors", {"format": "pt"})
    path, ids = save_dialect(body, "portable", tmp_path / "portable"), ids_of()
    assert np.abs(decode_with(session(path, exact=True), ids, LENGTHS) - states_of(plain, ids)).max() < 10 * ROUNDING


def test_a_builder_that_turns_rows_round_is_noticed() -> None:
    """Codes are put where the floats that they stand for were found, or not at all."""
    from flashhead_edge.export import packed as packing

    made = [Coded("m", 8, 32, 4, 32, *(ir.tensor(x) for x in parts), None) for parts in _two_products()]
    packing._compare(made[0], made[0], "m")
    with pytest.raises(ExportError, match="m: m has its rows in another order than the checkpoint"):
        packing._compare(made[0], made[1], "m")


def _two_products() -> list[tuple[np.ndarray, np.ndarray]]:
    codes = np.random.default_rng(0).integers(0, 256, (8, 1, 16), dtype=np.uint8)
    scales = np.full((8, 1), 0.1, np.float32)
    return [(codes, scales), (codes[::-1].copy(), scales)]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
SCHEMES: dict[str, tuple[dict[str, Any], int | None, int]] = {  # config, the one zero point that a symmetric file stores, what a stored one is short of
    "gptq": (GPTQ | {"sym": False}, None, 1),
    "gptq, symmetric": (GPTQ | {"sym": True}, 7, 1),
    "gptq_v2": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, None, 0),
    "gptq_v2, symmetric": (GPTQ | {"sym": True, "checkpoint_format": "gptq_v2"}, 8, 0),
    "gptq_v2, 8 bits": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2", "bits": 8}, None, 0),
    "gptq, symmetric, zeros of version 2": (GPTQ | {"sym": True}, 8, 0),  # as GPTQModel wrote them
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, None, 0),
}
AWQ_SLOTS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours a word holds in its slots, from the lowest bits on


def quantise(folder: Path, scheme: dict[str, Any], zero: int | None) -> dict[str, torch.Tensor]:
    """Put random words in the place of every projection's floats: any bits are codes. Returns the file's tensors."""
    from safetensors.torch import load_file, save_file

    tensors, group, bits = load_file(folder / "model.safetensors"), scheme["group_size"], scheme["bits"]
    codes = 32 // bits  # in a word
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        words = {"qweight": (k, n // codes) if scheme["quant_method"] == "awq" else (k // codes, n), "qzeros": (k // group, n // codes)}
        for part, shape in words.items():
            tensors[name.replace("weight", part)] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).int()
        if zero is not None:
            tensors[name.replace("weight", "qzeros")].fill_(int.from_bytes(bytes([zero * 0x11] * 4), "little", signed=True))
        tensors[name.replace("weight", "scales")] = (torch.rand(k // group, n, generator=generator) * 0.1 + 0.01).half()
        if scheme["quant_method"] == "gptq":
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k)) if scheme["desc_act"] else torch.arange(k)  # alike where inputs are
            tensors[name.replace("weight", "g_idx")] = (order // group).int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return tensors


def fields(words: torch.Tensor, axis: int, bits: int, slots: Sequence[int]) -> np.ndarray:
    """The codes in each word along an axis; the lowest bits hold number slots[0] of them."""
    packed = np.moveaxis(words.numpy(), axis, -1)
    codes = np.empty((*packed.shape, 32 // bits), np.uint8)
    for slot, number in enumerate(slots):
        codes[..., number] = packed >> bits * slot & 2**bits - 1
    return np.moveaxis(codes.reshape(*packed.shape[:-1], -1), -1, axis)


@pytest.mark.parametrize("case", SCHEMES)
def test_own_integers_of_a_checkpoint_are_kept(case: str, tmp_path: Path) -> None:
    """Codes, zero points and scales come out as they went in, every product's, and the portable dialect reads them as they are meant."""
    from flashhead_edge.checkpoint.quantised import dequantised

    scheme, zero, short = SCHEMES[case]
    folder = save_body(tmp_path / "model", "llama", torch.float16)
    tensors = quantise(folder, scheme, zero)
    floats = dict(dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, case))
    (tmp_path / "work").mkdir()
    with warm_builder():
        body = build_body(folder, tmp_path / "work", precision=f"int{scheme['bits']}")
    along, slots = (1, AWQ_SLOTS) if scheme["quant_method"] == "awq" else (0, range(32 // scheme["bits"]))  # outputs or inputs share a word
    products = [coded_weights(n) for n in body.model.graph if n.op_type == "MatMulNBits"]
    assert len(products) == 2 * 5
    for c in products:
        layer, block, product = c.name.split("/")[2:5]
        parts = ("q_proj", "k_proj", "v_proj") if product == "qkv_proj" else (product,)
        stems = [f"model.{layer}.{block.replace('attn', 'self_attn')}.{part}" for part in parts]
        scales = c.scales.numpy().reshape(c.n, c.groups).T
        codes = [fields(tensors[f"{stem}.qweight"], along, c.bits, slots) for stem in stems]
        zeros = [fields(tensors[f"{stem}.qzeros"], 1, c.bits, slots) + short & 2**c.bits - 1 for stem in stems]
        assert np.array_equal(c.unpacked(), np.hstack(codes))
        assert np.array_equal(c.unpacked_zeros(), np.hstack(zeros))
        assert np.array_equal(scales, np.hstack([tensors[f"{stem}.scales"].numpy() for stem in stems]))
        wide = [np.repeat(x, c.group, 0) for x in (c.unpacked_zeros().astype(np.float32), scales)]
        assert np.array_equal(((c.unpacked() - wide[0]) * wide[1]).T, np.vstack([floats[f"{stem}.weight"] for stem in stems]))
        assert c.symmetric == (zero is not None)
    path, ids = save_dialect(body, "portable", tmp_path / "portable"), ids_of()
    exact = decode_with(session(path, exact=True), ids, LENGTHS)
    assert np.abs(exact - states_of(folder, ids)).max() < 10 * ROUNDING  # random codes make weights of about 0.6, twice the others', and in 8 bits of 6


def test_columns_in_the_order_of_activations_are_those_of_a_symmetric_file(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 is right where all zero points are equal; where they differ, states were 5 away, of values about 3."""
    folder, ids = save_body(tmp_path / "model", "llama", torch.float16), ids_of()
    quantise(folder, GPTQ | {"sym": True, "desc_act": True}, 7)
    (tmp_path / "work").mkdir()
    with warm_builder():
        body = build_body(folder, tmp_path / "work", precision="int4")
    for node in body.model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))  # activations in 32 bits
    path = save_dialect(body, "onnxruntime", tmp_path / "onnxruntime")
    assert np.abs(decode_with(session(path), ids, LENGTHS) - states_of(folder, ids)).max() < 10 * ROUNDING
    with pytest.raises(ExportError, match="columns in another order, .*expected codes of 4 or 8 bits in the order of the columns"):
        to_dialect(body, "portable")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sym"] = False
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "work")
    assert "GPTQ with zero points and columns in the order of activations (desc_act), which ONNX Runtime multiplies wrongly" in refused(folder, tmp_path)
    assert not any((tmp_path / "work").iterdir())
