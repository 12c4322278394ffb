"""Decoders of plugin nodes: the file of weights, the lowering of every family, and what is refused. No GPU: the nodes run in numpy."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plugin_interpreter import Interpreter, decode_plugins, fingerprint, unpack_codes, unpack_groups
from small_bodies import decode_with, session
from small_plugins import CONTEXT, FAMILIES, ORIN, plugin_body, prepare, save_plugin_model, write_plugins

pytest.importorskip("onnxruntime_genai")

import ml_dtypes
import onnx
import onnx_ir as ir
from safetensors import safe_open

from flashhead_edge.errors import ExportError
from flashhead_edge.export.body import Body
from flashhead_edge.export.tensorrt.dense import add_dense_head
from flashhead_edge.jetson.tensorrt_folder import header_fingerprint
from flashhead_edge.program.nodes import Decoder
from flashhead_edge.program.weights import Item, float_item, norm_item, pack_codes, pack_groups, rounded, widened, write_weights

LENGTHS = [20, 15, 1, 1, 1, 1, 1]  # a prompt longer than the window of 16, a piece onto its cache, and steps of one token
ROUNDING = 3e-5  # of values about 4, after two layers of float32 sums of up to 256 terms in another order: 7e-6 was measured.
# The faults that this must see are larger: a wrong window, table, norm or row of a tile moves states by 1e-2 and more.
HALF = 0.03  # some twenty roundings to 11 bits of values about 4; bfloat16 has 8 bits
Bodies = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Bodies:
    """A family's model folder, and its body with 4-bit products on disk."""

    @lru_cache
    def make(family: str, group: int, changes: tuple[tuple[str, Any], ...]) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        model = save_plugin_model(folder / "model", family, **dict(changes))
        body = plugin_body(model, folder / "work", group)
        ir.save(body.model, folder / "body.onnx", external_data="body.onnx.data")
        return model, folder / "body.onnx"

    return lambda family, group=64, **changes: make(family, group, tuple(changes.items()))


def body_of(path: Path) -> Body:
    return Body(ir.load(path), {}, "int4", 64)


def ids_of(batch: int = 2, lengths: list[int] = LENGTHS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 120, (batch, sum(lengths)))


def standard_states(body: Body, ids: np.ndarray, folder: Path) -> np.ndarray:
    """ONNX Runtime's hidden states, text after text: its attention reads one prompt onto a cache at a time."""
    ir.save(body.model, folder / "standard.onnx", external_data="standard.onnx.data")
    return np.concatenate([decode_with(session(folder / "standard.onnx"), row[None], LENGTHS) for row in ids])


def check_against_standard(body: Body, model: Path, folder: Path, precision: str = "float16") -> Interpreter:
    """Lower a body and compare both texts' states, read together, with ONNX Runtime's. Returns what ran."""
    prepare(body.model, precision)
    want = standard_states(body, ids_of(), folder)
    head = write_plugins(body, model, folder / "out", precision=precision)
    p = Interpreter(folder / "out", head)
    assert np.abs(decode_plugins(p, ids_of(), LENGTHS)["hidden_states"] - want).max() < ROUNDING
    return p


# ---- the file of weights


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (32, 1088)])
def test_packed_codes_are_where_the_header_says(n: int, k: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (n, k), dtype=np.uint8)
    packed = pack_codes(codes[:, ::2] | codes[:, 1::2] << 4)
    assert packed.shape == (n // 16, k // 64, 512) and np.array_equal(unpack_codes(packed, n, k), codes)
    groups = np.random.default_rng(1).random((n, k // 32)).astype(np.float16)
    assert pack_groups(groups).shape == (n // 16, k // 32, 16) and np.array_equal(unpack_groups(pack_groups(groups), n, k // 32), groups)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    values = (np.random.default_rng(0).standard_normal(100_000) * 10.0 ** np.random.default_rng(1).integers(-30, 30, 100_000)).astype(np.float32)
    values[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8)  # ties
    assert np.array_equal(rounded(values, "bfloat16", "x"), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(widened(rounded(values, "bfloat16", "x"), "bfloat16"), values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("precision", "value", "words"),
    [
        ("float16", 7e4, "model.norm: values up to 7e+04, expected at most 65504, which float16 holds; pass --precision bfloat16"),
        ("float16", np.inf, "values that are not finite"),
        ("bfloat16", np.nan, "values that are not finite, expected at most 3.3895e+38, which bfloat16 holds; repair the checkpoint"),
        ("bfloat16", 3.4e38, "values up to 3.4e+38"),  # would be rounded to infinity
    ],
)
def test_a_value_that_the_type_does_not_hold_is_named(precision: str, value: float, words: str) -> None:
    with pytest.raises(ExportError) as error:
        rounded(np.array([1.0, value]), precision, "model.norm")
    assert words in str(error.value)


def test_norms_about_one_are_stored_about_nought() -> None:
    """What exporters add up for Gemma is taken apart again; other norms stay."""
    small = np.random.default_rng(0).standard_normal(64).astype(ml_dtypes.bfloat16).astype(np.float32) / 8
    item, offset = norm_item("norm", 1 + small, "bfloat16")
    assert offset == 1.0 and np.array_equal(widened(next(iter(item.blocks())), "bfloat16"), small)
    item, offset = norm_item("norm", 30 * small, "bfloat16")
    assert offset == 0.0 and np.array_equal(widened(next(iter(item.blocks())), "bfloat16"), (30 * small).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_file_is_a_safetensors_file_with_the_sums_that_it_states(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix, codes = random.standard_normal((20_000, 8)).astype(np.float32), random.integers(0, 256, (4, 512), dtype=np.uint8)
    items = [float_item("rows", lambda: matrix, matrix.shape, "float16"), Item("codes", "U8", codes.shape, lambda: [codes[:3], codes[3:]])]
    path = tmp_path / "weights.safetensors"
    written = write_weights(path, items, "sha256:head")
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert (8 + length) % 64 == 0 and written.size == len(data)
    with safe_open(path, "np") as file:
        assert np.array_equal(file.get_tensor("rows"), matrix.astype(np.float16)) and np.array_equal(file.get_tensor("codes"), codes)
        about = file.metadata()
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert about == {"flashhead.format": "1", "flashhead.fingerprint": "sha256:head", "flashhead.part": "weights", "flashhead.sha256": digest}
    assert written.sha256 == digest and written.fingerprint == fingerprint(path) == header_fingerprint(path)
    for name, (offset, size) in written.places.items():
        assert offset % 16 == 0 and data[offset : offset + size] == {"rows": matrix.astype(np.float16), "codes": codes}[name].tobytes()
    matrix[0, 0] += 1
    again = write_weights(tmp_path / "other.safetensors", items, "sha256:head")
    assert again.fingerprint != written.fingerprint  # a byte of a tensor changes the header's sum of them, and with it the fingerprint


def test_two_tensors_of_one_name_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    one = Item("a", "U8", (2,), lambda: [np.zeros(2, np.uint8)])
    with pytest.raises(ExportError, match="a: two tensors have this name"):
        write_weights(tmp_path / "w", [one, one], "x")
    with pytest.raises(ExportError, match="b: 2 bytes were made, expected 3 for U8"):
        write_weights(tmp_path / "v", [Item("b", "U8", (3,), one.blocks)], "x")


# ---- families


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_standard_body_s_hidden_states(family: str, precision: str, bodies: Bodies, tmp_path: Path) -> None:
    """Two texts at once: prompt, continued prompt, single steps, beyond the window; and the head's tokens are those of the reference on these states."""
    model, path = bodies(family)
    p = check_against_standard(body_of(path), model, tmp_path, precision)
    assert {n.op_type for n in p.model.graph.node} <= p.seen
    found = decode_plugins(Interpreter(tmp_path / "out", p.head, rounding=precision), ids_of(), LENGTHS)
    want = decode_plugins(p, ids_of(), LENGTHS)
    assert np.abs(found["hidden_states"] - want["hidden_states"]).max() < HALF * (8 if precision == "bfloat16" else 1)
    ends = np.cumsum(LENGTHS) - 1
    logits = want["hidden_states"][:, ends] @ p.head.weight[: p.head.index.vocab_size].numpy().T  # the head leaves nothing out
    assert np.array_equal(want["token"], logits.argmax(-1))
    assert (want["counts"][:, -1] == p.head.index.vocab_size).all()


@pytest.mark.parametrize(("family", "size"), [("llama", 96), ("llama", 128), ("llama", 256), ("qwen3", 128), ("gemma3", 256)])
def test_other_sizes_of_heads(family: str, size: int, bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies(family, head_dim=size)
    check_against_standard(body_of(path), model, tmp_path)


def test_one_key_value_head_is_normalised_as_a_head(bodies: Bodies, tmp_path: Path) -> None:
    """Its width is that of the norm, as a whole row's is."""
    model, path = bodies("gemma3", num_key_value_heads=1)
    check_against_standard(body_of(path), model, tmp_path)


@pytest.mark.parametrize("group", [32, 128])
def test_groups(group: int, bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies("llama", group, intermediate_size=256)
    check_against_standard(body_of(path), model, tmp_path)


def part_products(model: ir.Model, name: str, parts: list[int], outputs: list[ir.Value]) -> None:
    """Put products of their own in the place of a fused one, each with its part of the rows and, where there was one, of the bias."""
    graph = model.graph
    node = next(n for n in graph if n.name == name)
    after = next((use.node for use in node.outputs[0].uses()), None)
    bias = after.inputs[1].const_value.numpy() if after is not None and after.op_type == "Add" else None
    at, made = 0, []
    for i, (n, out) in enumerate(zip(parts, outputs)):
        arrays = [ir.tensor(v.const_value.numpy()[at : at + n], name=f"{v.name}.{i}") for v in node.inputs[1:3]]
        values = [ir.Value(name=a.name, shape=ir.Shape(a.shape), type=ir.TensorType(a.dtype), const_value=a) for a in arrays]
        new = ir.node("MatMulNBits", [node.inputs[0], *values], dict(node.attributes), domain=node.domain, name=f"{name}.{i}")
        new.attributes.add(ir.AttrInt64("N", n))
        made.append(new)
        result = new.outputs[0]
        result.name = f"{name}.{i}.out"
        if bias is not None:
            b = ir.tensor(bias[at : at + n], name=f"{name}.{i}.bias")
            values.append(ir.Value(name=b.name, shape=ir.Shape(b.shape), type=ir.TensorType(b.dtype), const_value=b))
            made.append(ir.node("Add", [result, values[-1]], name=f"{name}.{i}.add"))
            result = made[-1].outputs[0]
            result.name = f"{name}.{i}.sum"
        for value in values:
            graph.initializers[value.name] = value
        out.replace_all_uses_with(result)
        at += n
    graph.insert_after(node, made)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "qwen2"])
def test_products_of_their_own_become_one(family: str, bodies: Bodies, tmp_path: Path) -> None:
    """As checkpoints in other quantisations have them: queries, keys, values, gate and up apart, with norms or biases of each."""
    model, path = bodies(family)
    body = body_of(path)
    for layer in range(2):
        nodes = {n.name: n for n in body.model.graph}
        at = f"/model/layers.{layer}"
        if family == "qwen3":
            part_products(body.model, f"{at}/attn/qkv_proj/MatMul_Q4", [256, 128, 128], list(nodes[f"{at}/attn/qkv_proj/Split"].outputs))
        else:  # nothing takes them apart: attention does
            attention = nodes[f"{at}/attn/GroupQueryAttention"]
            names = [ir.Value(name=f"{at}/{part}") for part in "qkv"]
            for i, value in enumerate(names):
                attention.replace_input_with(i, value)
            part_products(body.model, f"{at}/attn/qkv_proj/MatMul_Q4", [256, 128, 128], names)
        part_products(body.model, f"{at}/mlp/gate_up_proj/MatMul_Q4", [192, 192], list(nodes[f"{at}/mlp/gate_up_proj/Split"].outputs))
    from flashhead_edge.export.passes.lowering import remove_unused

    remove_unused(body.model)
    assert len([n for n in body.model.graph if n.op_type == "MatMulNBits"]) == 2 * 7
    p = check_against_standard(body, model, tmp_path)
    linears = [n for n in p.model.graph.node if n.op_type == "W4A16Linear"]
    assert [n.output[0] for n in linears] == [f"layers.{layer}.{part}" for layer in range(2) for part in ("qkv", "o", "gated", "down")]


def test_zero_points_of_a_quantised_checkpoint(bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies("llama")
    body, random = body_of(path), np.random.default_rng(0)
    for node in [n for n in body.model.graph if n.op_type == "MatMulNBits"][::2]:
        n, groups = node.attributes.get_int("N"), node.attributes.get_int("K") // 64
        zeros = ir.tensor(random.integers(0x55, 0xBB, (n, -(-groups // 2)), dtype=np.uint8), name=f"{node.name}.zeros")
        value = ir.Value(name=zeros.name, shape=ir.Shape(zeros.shape), type=ir.TensorType(ir.DataType.UINT8), const_value=zeros)
        body.model.graph.initializers[value.name] = value
        node.resize_inputs(4)
        node.replace_input_with(3, value)
    p = check_against_standard(body, model, tmp_path)
    linears = [n for n in p.model.graph.node if n.op_type == "W4A16Linear"]
    assert [bool(a.s) for n in linears for a in n.attribute if a.name == "zeros"] == [True, False] * 4  # none where all are 8


def test_a_model_is_plain_onnx_but_for_its_plugins(bodies: Bodies, tmp_path: Path) -> None:
    """Names, types and shapes of the contract; no weight in the file; the same bytes each time."""
    model, path = bodies("qwen2")
    write_plugins(body_of(path), model, tmp_path / "one", dense_head=True)
    write_plugins(body_of(path), model, tmp_path / "two", dense_head=True)
    for name in ("decoder", "head", "head_logits", "decoder_dense"):
        file = tmp_path / "one" / f"{name}.onnx"
        onnx.checker.check_model(str(file))
        data = file.read_bytes()
        assert data.replace(bytes(tmp_path / "one"), b"") == (tmp_path / "two" / f"{name}.onnx").read_bytes().replace(bytes(tmp_path / "two"), b"")
        assert len(data) < 100_000
    assert (tmp_path / "one/weights.safetensors").read_bytes() == (tmp_path / "two/weights.safetensors").read_bytes()
    graph = onnx.load(tmp_path / "one/decoder.onnx").graph

    def said(values: Any) -> dict[str, tuple[int, list[Any]]]:
        return {v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values}

    inputs, outputs = said(graph.input), said(graph.output)
    float16, float32, int32, cache = 10, 1, 6, ["batch", 2, CONTEXT, 64]
    past = {f"past_key_values.{i}.{part}": (float16, cache) for i in range(2) for part in ("key", "value")}
    sampling = {n: (float32, ["batch"]) for n in ("temperature", "top_p", "min_p")} | {"top_k": (int32, ["batch"]), "seed": (int32, ["batch", 2])}
    assert inputs == {"input_ids": (int32, ["batch", "sequence"]), "lengths": (int32, ["batch"])} | past | sampling | {"step": (int32, ["batch"])}
    assert outputs == {
        **{"token": (int32, ["batch"]), "candidate_ids": (int32, ["batch", 128]), "candidate_logits": (float32, ["batch", 128])},
        **{"counts": (int32, ["batch", 2]), "capped": (int32, ["batch"]), "logprob": (float32, ["batch"])},
        "hidden_states": (float16, ["batch", "sequence", 256]),
        **{name.replace("past_key_values", "present"): value for name, value in past.items()},
    }
    assert {(n.op_type, n.domain) for n in graph.node} == {
        ("Add", ""), *((op, "flashhead") for op in ("TokenEmbedding", "RmsNorm", "W4A16Linear", "DecodeAttention", "FlashHead"))
    }  # fmt: skip
    head = onnx.load(tmp_path / "one/head_logits.onnx")
    assert list(said(head.graph.input)) == ["hidden_states"] and said(head.graph.output)["logits"] == (float32, ["batch", 127])
    about = {p.key: p.value for p in head.metadata_props}
    assert about["flashhead.part"] == "head_logits" and json.loads(about["flashhead.settings"])["kv_heads"] == 2


def test_the_head_s_node_has_image_and_plans(bodies: Bodies, tmp_path: Path) -> None:
    from flashhead_edge.kernels.packing import STATIC_SHARED, layout_of, pack, plans, words_of

    model, path = bodies("llama")
    head = write_plugins(body_of(path), model, tmp_path / "out", batch=3)
    p = Interpreter(tmp_path / "out", head)
    (node,) = [n for n in p.model.graph.node if n.op_type == "FlashHead"]
    at = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    packed = pack(head.index)
    assert np.array_equal(p.tensor(at, "image", np.uint8), packed.image) and at["max_rows"] == 3 and at["candidates"] == packed.layout.candidates
    words = np.array(at["plans"]).reshape(3, at["plan_words"]).tolist()
    assert words == [words_of(plan) for plan in plans(packed, ORIN.multiprocessors, ORIN.shared_bytes - STATIC_SHARED, 3)]
    assert layout_of(words[0]).multiprocessors == 16
    assert (at["logits"], at["sampling"], at["logit_scale"], at["softcap"]) == (0, 1, 1.0, 0.0)


def test_nodes_have_the_fields_that_the_plugins_read(root: Path, bodies: Bodies, tmp_path: Path) -> None:
    """Those of plugins_trt/plugins: a field that a plugin does not know, and one that it misses, is an error there."""
    model, path = bodies("qwen2")
    write_plugins(body_of(path), model, tmp_path / "out")
    of_all = {"file", "folder", "fingerprint"}
    for node in onnx.load(tmp_path / "out/decoder.onnx").graph.node:
        if node.domain != "flashhead":
            continue
        file = re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", node.op_type).lower().replace("w4_a16", "w4a16")
        source = (root / f"plugins_trt/plugins/{file}.cpp").read_text()
        known = {name: bool(optional) for name, optional in re.findall(r'bind\("(\w+)", \w+(, true)?\)', source)}
        said = {a.name for a in node.attribute} - {"plugin_version", "plugin_namespace"}
        assert said & of_all == (of_all if "weights_.bind_to" in source else set()), node.op_type
        assert {name for name, optional in known.items() if not optional} <= said - of_all <= known.keys(), node.op_type


@pytest.mark.parametrize("family", ["llama_tied", "llama"])
def test_the_dense_head_to_compare_with_gives_the_same_tokens(family: str, bodies: Bodies, tmp_path: Path) -> None:
    """Its matrix is the file's own: once where it is tied to the embedding. Four rows of padding are cut off."""
    model, path = bodies(family)
    body = body_of(path)
    prepare(body.model, "float16")
    head = write_plugins(body, model, tmp_path / "out", dense_head=True)
    want = decode_plugins(Interpreter(tmp_path / "out", head), ids_of(), LENGTHS)
    found = decode_plugins(Interpreter(tmp_path / "out", model="decoder_dense.onnx"), ids_of(), LENGTHS)
    assert np.array_equal(found["token"], want["token"]) and np.array_equal(found["hidden_states"], want["hidden_states"])
    with safe_open(tmp_path / "out/weights.safetensors", "np") as file:
        assert ("head.rows" in file.keys()) == (family == "llama")  # noqa: SIM118  # no mapping
    model_file = tmp_path / "out/decoder_dense.onnx"
    wanted = model_file.read_bytes()
    model_file.unlink()
    add_dense_head(tmp_path / "out")  # of the decoder: padding and all
    assert model_file.read_bytes() == wanted


def test_logits_are_scaled_for_a_draw_alone(bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies("granite", logits_scaling=4.0)
    write_plugins(body_of(path), model, tmp_path / "out")
    graph = onnx.load(tmp_path / "out/decoder.onnx").graph
    (node,) = [n for n in graph.node if n.op_type == "FlashHead"]
    at = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert at["logit_scale"] == 0.25
    (lookup,) = [n for n in graph.node if n.op_type == "TokenEmbedding"]
    assert [a.f for a in lookup.attribute if a.name == "scale"] == [3.0]


# ---- what is refused


def refused(body: Body, model: Path, out: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as error:
        write_plugins(body, model, out, **options)
    assert "\n" not in str(error.value) and not out.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma2", "GroupQueryAttention: GroupQueryAttention with scores capped at 50, for which the attention kernel has no code"),
        ("phi", "LayerNorm: LayerNormalization has no plugin, expected one of Gather, Cast, SimplifiedLayerNormalization"),
    ],
)
def test_families_that_the_kernels_lack_are_refused_by_their_operator(family: str, words: str, bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies(family)
    message = refused(body_of(path), model, tmp_path / "out")
    assert words in message and "export with --layers native" in message


def test_sizes_that_the_kernels_lack_are_refused(bodies: Bodies, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, path = bodies("llama", hidden_size=64, intermediate_size=128)
    assert "attention heads of 16 values, expected one of 64, 96, 128, 256" in refused(body_of(path), model, out)
    model, path = bodies("llama", intermediate_size=160)
    assert "layers.0.down: a matrix [256, 160] in groups of 64, expected outputs in multiples of 16, inputs in multiples of 64" in refused(
        body_of(path), model, out
    )
    model, path = bodies("llama", 128)
    assert "layers.0.down: a matrix [256, 192] in groups of 128, expected" in refused(body_of(path), model, out)


def test_rotary_tables_that_the_kernel_lacks_are_refused(bodies: Bodies, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, path = bodies("llama")
    assert "the model's table has 256 positions, expected 512; pass --context 256" in refused(body_of(path), model, out, context=512)
    body = body_of(path)
    for name in ("cos_cache", "sin_cache"):
        table = body.model.graph.initializers[name]
        table.const_value = ir.tensor(table.const_value.numpy()[:, :16].copy(), name=name)
    assert "rotary positions: 32 of a head's 64 values are turned, expected all of them" in refused(body, model, out)
    model, path = bodies("phi3_long")
    message = refused(body_of(path), model, out, context=65)
    assert (
        "positions that change for all of a text when it grows beyond 64 tokens (LongRoPE), expected one table for the context of 65; pass --context 64"
        in message
    )


def test_a_graph_that_is_not_a_decoder_s_is_refused_by_its_operator(bodies: Bodies, tmp_path: Path) -> None:
    """Operators in places where no plugin can take them."""
    model, path = bodies("llama")

    def changed(change: Callable[[dict[str, ir.Node]], None]) -> str:
        body = body_of(path)
        change({n.name: n for n in body.model.graph})
        return refused(body, model, tmp_path / "out")

    def attribute(name: str, key: str, value: int) -> Callable[[dict[str, ir.Node]], None]:
        return lambda nodes: nodes[name].attributes.add(ir.AttrInt64(key, value))

    at = "/model/layers.0"
    assert "interleaved positions, sinks or a bias" in changed(attribute(f"{at}/attn/GroupQueryAttention", "rotary_interleaved", 1))
    assert "codes of 8 bits, expected 4" in changed(attribute(f"{at}/attn/o_proj/MatMul_Q4", "bits", 8))

    def other_gate(nodes: dict[str, ir.Node]) -> None:
        nodes[f"{at}/mlp/Mul"].replace_input_with(1, nodes[f"{at}/attn/o_proj/MatMul_Q4"].outputs[0])

    assert "an activation that is multiplied with something else than the other half of its product" in changed(other_gate)

    def other_cache(nodes: dict[str, ir.Node]) -> None:
        nodes[f"{at}/attn/GroupQueryAttention"].replace_input_with(3, nodes["/model/layers.1/attn/GroupQueryAttention"].inputs[3])

    assert "the cache past_key_values.1.key in layer 0" in changed(other_cache)

    def no_gate(nodes: dict[str, ir.Node]) -> None:
        nodes[f"{at}/mlp/down_proj/MatMul_Q4"].replace_input_with(0, nodes[f"{at}/mlp/act_fn/Mul"].outputs[0])

    assert "an activation that is not multiplied with its gate" in changed(no_gate)

    def relu(nodes: dict[str, ir.Node]) -> None:
        nodes[f"{at}/mlp/act_fn/Sigmoid"].op_type = "HardSigmoid"

    assert "Sigmoid: HardSigmoid has no plugin" in changed(relu)


def test_values_beyond_float16_propose_bfloat16(bodies: Bodies, tmp_path: Path) -> None:
    model, path = bodies("llama")
    body = body_of(path)
    norm = body.model.graph.initializers["model.layers.1.input_layernorm.weight"]
    norm.const_value = ir.tensor(np.full(256, 7e4, np.float32), name=norm.name)
    assert "layers.1.input_layernorm: values up to 7e+04, expected at most 65504, which float16 holds; pass --precision bfloat16" in refused(
        body, model, tmp_path / "out"
    )
    write_plugins(body, model, tmp_path / "out", precision="bfloat16")


def test_a_recorder_refuses_values_of_one_name() -> None:
    d = Decoder("float16", 64)
    rows = float_item("embedding", lambda: np.zeros((4, 8), np.float32), (4, 8), "float16")
    d.embedding("input_ids", rows, 1.0)
    with pytest.raises(ExportError, match="embedding: two values have this name"):
        d.embedding("input_ids", rows, 1.0)
