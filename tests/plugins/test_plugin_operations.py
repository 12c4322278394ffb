"""The core of the TensorRT plugins without TensorRT and without a GPU: types and shapes, and what is launched."""

import functools
import json

import numpy as np
import pytest
from plugin_core import BF16, FP16, FP32, INT32, NUMBER, Plugin, X, arrays_of, attention_fields, attention_inputs, head_fields, norm_fields, shapes_of

# Types and shapes


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([(FP32, (2, 3, 64))], "input x is float32, expected float16; cast it in the network, or export with that precision"),
        ([X, (BF16, (2, 3, 64))], "input residual is bfloat16, expected float16"),
        ([X, X, X], "3 inputs, expected 1"),
        ([(FP16, (2, 3, 60))], "input x is [2, 3, 60], expected [.., 64]; the network and the export do not belong together, export again"),
        ([X, (FP16, (2, 4, 64))], "input residual is [2, 4, 64], expected [2, 3, 64]"),
        ([(FP16, (-1, -1, 64)), (FP16, (2, 4, 64))], ""),
        ([(FP16, ())], "input x is [], expected [.., 64]"),
    ],
)
def test_types_and_shapes_of_a_norm(inputs, said, core, weights):
    with Plugin(core, "RmsNorm", norm_fields(weights)) as plugin:
        assert plugin.fits(*inputs).startswith(said) and bool(said) == bool(plugin.fits(*inputs))


def test_the_number_of_inputs_says_whether_a_norm_sums(core, weights):
    fields = norm_fields(weights)
    x = np.zeros(384, np.uint16)
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert plugin.prepare() == ""
        assert core.core_outputs(plugin.handle) == 2
        assert plugin.run([X, X], [x, x])[2] == "rms_norm [6, 64] with residual"
        with Plugin(core, "RmsNorm") as stored:  # an engine knows what its builder saw
            assert stored.read(plugin.write()) == ""
            assert stored.prepare() == ""
            assert stored.run([X, X], [x, x])[2] == "rms_norm [6, 64] with residual"
    with Plugin(core, "RmsNorm", fields | {"residual": 0}) as plugin:
        assert core.core_outputs(plugin.handle) == 1
        assert plugin.fits(X, X) == "2 inputs, expected 1; the network and the export do not belong together, export again"


def test_shapes_of_the_outputs(core, weights):
    with Plugin(core, "GatedProduct", {"activation": 1}) as gated:
        assert gated.shapes((FP16, (2, 3, 272))) == ["float16 [2, 3, 136]"]
        assert "expected [.., 2 f] with f a multiple of 8" in gated.fits((FP16, (2, 3, 24)))
    with Plugin(core, "DecodeAttention", attention_fields(weights)) as attention:
        cache = "float16 [3, 2, 32, 64]"
        assert attention.wrong == ""
        assert attention.shapes(*attention_inputs(3, 5)) == ["float16 [3, 5, 256]", cache, cache]
        inputs = list(attention_inputs(3, 5))
        inputs[2] = (FP16, (4, 2, 32, 64))
        assert attention.fits(*inputs) == (
            "input cache_v is [4, 2, 32, 64], expected [3, 2, 32, 64]; the network and the export do not belong together, export again"
        )
        inputs[2] = (FP16, (-1, 2, 32, 64))
        assert attention.fits(*inputs) == ""
    with Plugin(core, "FlashHead", head_fields(weights, core, logits=1, sampling=1)) as head:
        assert head.wrong == ""
        inputs = [(FP16, (3, 7, 64)), *[(FP32, (3,))] * 3, (INT32, (3,)), (INT32, (3, 2)), (INT32, (3,))]
        assert head.fits(*inputs) == ""
        wanted = ["int32 [3]", "int32 [3, 16]", "float32 [3, 16]", "int32 [3, 3]", "int32 [3]", "float32 [3, 80]", "float32 [3]"]
        assert head.shapes(*inputs) == wanted
        assert head.fits((FP16, (4, 64)), *inputs[1:]).startswith("input temperature is [3], expected [4]")
        four = [(kind, (4, *shape[1:])) for kind, shape in inputs]
        assert head.fits(*four).startswith("4 states at once, expected at most 3, which the head was exported for")


# What is launched


def test_a_cache_in_place_is_not_copied(core, weights):
    inputs = attention_inputs(1, 1)
    with Plugin(core, "DecodeAttention", attention_fields(weights)) as plugin:
        assert plugin.prepare() == ""
        in_place = plugin.run(inputs, arrays_of(inputs), in_place=(None, 1, 2))
        assert in_place[0] == ""
        assert in_place[2] == "rope with norms in; attention_decode, 2 arrivals apart, zero"
        copied = plugin.run(inputs, arrays_of(inputs))  # older positions are written just before: nothing is read while that runs
        assert copied[2] == "copy 8192; copy 8192; rope with norms, alone, in; attention_decode, 2 arrivals apart, zero"


@pytest.mark.parametrize(("queries", "launched"), [(8, "rope with norms in; attention_decode"), (9, "rope_write with norms; attention_decode")])
def test_more_new_tokens_than_one_launch_takes_are_two(queries, launched, core, weights):
    inputs = attention_inputs(2, queries)
    with Plugin(core, "DecodeAttention", attention_fields(weights)) as plugin:
        assert plugin.prepare() == ""
        wrong, _, found = plugin.run(inputs, arrays_of(inputs), in_place=(None, 1, 2))
    assert wrong == "" and found.startswith(launched)


def test_scratch_memory_holds_every_launch_up_to_the_largest(core, weights):
    """`Plugin.run` guards the end of what `scratch_bytes` asks for; here it is asked once, for the largest."""
    with Plugin(core, "DecodeAttention", attention_fields(weights, max_length=32)) as plugin:
        assert plugin.prepare() == ""
        most = core.core_scratch(plugin.handle, *shapes_of(attention_inputs(9, 30)))
        for batch in range(1, 10):
            for queries in (1, 2, 3, 8, 9, 30):
                inputs = attention_inputs(batch, queries)
                assert core.core_scratch(plugin.handle, *shapes_of(inputs)) <= most
                wrong, _, launched = plugin.run(inputs, arrays_of(inputs), in_place=(None, 1, 2))
                assert (wrong, launched.count("NOT ZERO")) == ("", 0)


def test_more_arrivals_than_an_instance_keeps_are_counted_in_scratch_memory(core, weights):
    inputs = attention_inputs(2100, 1)
    with Plugin(core, "DecodeAttention", attention_fields(weights)) as plugin:
        assert plugin.prepare() == ""
        assert plugin.run(inputs, arrays_of(inputs), in_place=(None, 1, 2))[2].endswith("4200 arrivals in scratch, zero")


def test_a_greedy_head_is_two_launches(core, weights):
    inputs = [(FP16, (2, 64))]
    with Plugin(core, "FlashHead", head_fields(weights, core)) as plugin:
        assert plugin.prepare() == ""
        wrong, (token, ids, logits, counts, capped), launched = plugin.run(inputs, arrays_of(inputs))
    assert (wrong, launched) == ("", "head_step 2, first state 0, workspace zero; narrow")
    assert token[:2].tolist() == [7, 8] and capped[:2].tolist() == [0, 1] and counts[:6].tolist() == [16] * 6
    assert ids[:16].tolist() == list(range(100, 116)) and logits[16:32].tolist() == list(range(16))


@pytest.mark.parametrize(("batch", "queries", "before", "state"), [(1, 5, "", 5), (3, 5, "copy 3 rows of 128, 640 apart; ", 5), (3, 1, "", 1)])
def test_the_head_reads_the_last_state_of_each(batch, queries, before, state, core, weights):
    inputs = [(FP16, (batch, queries, 64))]
    hidden = np.repeat(np.tile(np.arange(1, queries + 1, dtype=np.uint16), batch), 64)
    with Plugin(core, "FlashHead", head_fields(weights, core)) as plugin:
        assert plugin.prepare() == ""
        launched = plugin.run(inputs, [hidden])[2]
    assert launched == f"{before}head_step {batch}, first state {state}, workspace zero; narrow"


@pytest.mark.parametrize(("more", "settings"), [({}, "settings"), ({"softcap": 30.0}, "settings and logits"), ({"logit_scale": 0.5}, "settings and logits")])
def test_a_draw_reads_the_raw_logits_unless_the_model_changes_them(more, settings, core, weights):
    inputs = [(FP16, (2, 64)), *[(FP32, (2,))] * 3, (INT32, (2,)), (INT32, (2, 2)), (INT32, (2,))]
    arrays = arrays_of(inputs)
    arrays[1][:], arrays[4][:], arrays[5][:], arrays[6][:] = 0.5, 9, [7, 1, 8, 0], 5
    with Plugin(core, "FlashHead", head_fields(weights, core, logits=1, sampling=1, **more)) as plugin:
        assert plugin.prepare() == ""
        wrong, outputs, launched = plugin.run(inputs, arrays)
    drawn = f"decode temperature 0.5, top-k 9, seed {7 + (1 << 32)}, step 5"
    assert (wrong, launched) == ("", f"head_step 2, first state 0, workspace zero; widen 2 of 80; {settings}; {drawn}; narrow")
    assert outputs[0][:2].tolist() == [40, 41] and outputs[2][:16].tolist() == list(range(16)) and outputs[6][:2].tolist() == [-1, -1]


def test_a_head_planned_for_another_device_is_refused(core, weights):
    with Plugin(core, "FlashHead", head_fields(weights, core)) as plugin:
        core.core_device(2, 114, 232448, 9)
        assert plugin.prepare() == (
            "the head's launches are planned for a GPU of 132 multiprocessors and 200000 bytes of shared memory a block or more, "
            "this one has 114 and 232448; export on this device"
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_rows": 33}, "max_rows is 33, expected 1 to 32; export again"),
        ({"max_rows": 2}, "words of plans"),
        ({"vocab": 81}, "the plan of 1 states is of another head than the fields; export again"),
        ({"sampling": 2}, "logits is 0 and sampling 2, expected 0 or 1"),
        ({"logit_scale": 0.0}, "logit_scale is 0 and softcap 0, expected above 0, and 0 or more"),
        ({"image": "0 255"}, "field image names a tensor of 255 bytes, expected 256"),
    ],
)
def test_a_head_that_does_not_fit_itself_is_refused(change, said, core, weights):
    with Plugin(core, "FlashHead", head_fields(weights, core) | change) as plugin:
        assert said in plugin.wrong


@pytest.mark.parametrize(("tokens", "zeros"), [(1, ""), (40, "zeros")])
def test_a_product_is_one_launch_over_all_leading_extents(tokens, zeros, core, weights):
    source, places = weights({"codes": bytes(32 * 128 // 2), "scales": bytes(32 * 2 * 2), "zeros": bytes(32 * 2)})
    fields = {"codes": places["codes"], "scales": places["scales"], "zeros": places.get(zeros, ""), "n": 32, "k": 128, "group": 64} | source
    inputs = [(FP16, (2, tokens, 128))]
    with Plugin(core, "W4A16Linear", fields) as plugin:
        assert (plugin.wrong, plugin.prepare()) == ("", "")
        assert plugin.shapes(*inputs) == [f"float16 [2, {tokens}, 32]"]
        assert plugin.run(inputs, arrays_of(inputs))[2] == f"w4a16_linear {2 * tokens} x [32, 128]" + ("" if zeros else ", symmetric")
    with Plugin(core, "W4A16Linear", fields | {"group": 48}) as plugin:
        assert plugin.wrong.startswith("the matrix is [32, 128] in groups of 48, expected n % 16 == 0")


def product_fields(weights, n=64, k=128, **more):
    """Of a product; `norm` and `first_norm` = 1 become places."""
    sizes = {"codes": n * k // 2, "scales": n * k // 32 * 2, "norm": 2 * k, "first_norm": 2 * k}
    source, places = weights({name: bytes(size) for name, size in sizes.items()})
    fields = {"codes": places["codes"], "scales": places["scales"], "n": n, "k": k, "group": 32} | source
    return fields | {name: places[name] if name in places and value == 1 else value for name, value in more.items()}


AROUND = [
    ({}, "w4a16_linear {} x [64, 128], symmetric", "w4a16_linear {} x [64, 128], symmetric"),
    ({"early": 1}, "w4a16_fused {} x [64, 128]", "w4a16_linear {} x [64, 128], symmetric"),
    ({"norm": 1}, "w4a16_fused {} x [64, 128], norm", "rms_norm [{}, 128]; w4a16_linear {} x [64, 128], symmetric"),
    (
        {"norm": 1, "residual": 1, "gated": 1},
        "w4a16_fused {} x [64, 128], norm, residual, silu",
        "rms_norm [{}, 128] with residual; w4a16_linear {} x [64, 128], symmetric; gated_product [{}, 32] of 0",
    ),
    (
        {"norm": 1, "first_norm": 1, "residual": 1, "gated": 1, "activation": 1},
        "w4a16_fused {} x [64, 128], first norm, norm, residual, gelu",
        "rms_norm [{}, 128]; rms_norm [{}, 128] with residual; w4a16_linear {} x [64, 128], symmetric; gated_product [{}, 32] of 1",
    ),
]


@pytest.mark.parametrize(("around", "few", "many"), AROUND)
def test_what_stands_around_a_product_is_in_its_launch_for_few_rows(around, few, many, core, weights):
    with Plugin(core, "W4A16Linear", product_fields(weights, **around)) as plugin:
        assert (plugin.wrong, plugin.prepare()) == ("", "")
        for rows in (1, 8, 9, 70):
            inputs = [(FP16, (1, rows, 128))] * (1 + around.get("residual", 0))
            columns = 32 if around.get("gated") else 64
            assert plugin.fits(*inputs) == ""
            assert plugin.shapes(*inputs) == [f"float16 [1, {rows}, {columns}]", f"float16 [1, {rows}, 128]"][: len(inputs)]
            wrong, _, launched = plugin.run(inputs, arrays_of(inputs))
            assert (wrong, launched) == ("", (few if rows <= 8 else many).replace("{}", str(rows)))


def test_a_launch_that_needs_more_shared_memory_than_there_is_becomes_several(core, weights):
    core.core_device(4, 16, 36_000, 8)  # 32,768 bytes beside those of a row of 320
    with Plugin(core, "W4A16Linear", product_fields(weights, norm=1)) as plugin:
        assert plugin.prepare() == ""
        for rows, launch in ((8, "w4a16_fused"), (1, "w4a16_fused")):
            inputs = [(FP16, (rows, 128))]
            assert plugin.run(inputs, arrays_of(inputs))[2].startswith(launch)
    with Plugin(core, "W4A16Linear", product_fields(weights, k=320, norm=1)) as plugin:
        assert plugin.prepare() == ""
        for rows, launch in ((4, "w4a16_fused"), (5, "rms_norm"), (8, "rms_norm")):
            inputs = [(FP16, (rows, 320))]
            assert plugin.run(inputs, arrays_of(inputs))[2].startswith(launch)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"residual": 1}, "a residual, a gate or first_norm stands beside no norm, expected the place of one in field norm"),
        ({"first_norm": 1}, "a residual, a gate or first_norm stands beside no norm"),
        ({"norm": 1, "gated": 2}, "residual, gated and early are 0, 2 and 0, expected 0 or 1"),
        ({"norm": 1, "residual": -1}, "residual, gated and early are -1, 0 and 0, expected 0 or 1"),
        ({"norm": 1, "activation": 2}, "activation is 2, expected 0 (silu) or 1 (gelu with tanh)"),
        ({"norm": "0 254"}, "field norm names a tensor of 254 bytes, expected 256"),
        ({"norm": 1, "gated": 1, "n": 48}, "n is 48 beside a gate, expected a multiple of 32"),
        ({"norm": 1, "n": 16, "k": 16448}, "k is 16448 beside a norm, expected at most 16384"),
    ],
)
def test_what_stands_around_a_product_and_does_not_fit_it_is_refused(change, said, core, weights):
    with Plugin(core, "W4A16Linear", product_fields(weights, **change)) as plugin:
        assert plugin.wrong.startswith(said)


def test_a_residual_of_another_shape_is_refused(core, weights):
    with Plugin(core, "W4A16Linear", product_fields(weights, norm=1, residual=1)) as plugin:
        assert plugin.fits((FP16, (2, 3, 128)), (FP16, (2, 4, 128))).startswith("input residual is [2, 4, 128], expected [2, 3, 128]")
        assert plugin.fits((FP16, (2, 3, 128))).startswith("1 inputs, expected 2")


# An exported decoder

TYPE_OF_ONNX = {10: FP16, 16: BF16, 1: FP32, 6: INT32}


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize(("batch", "queries"), [(2, 1), (1, 9)])
def test_an_exported_decoder_is_taken_node_by_node(family, batch, queries, exported, core):
    """Every node's fields are read, its weights found, its inputs fit, its outputs are as long as those that the graph declares."""
    import onnx

    def shape_of(value):
        extents = {"batch": batch, "sequence": queries}
        kind = value.type.tensor_type
        return TYPE_OF_ONNX[kind.elem_type], tuple(extents.get(d.dim_param, d.dim_value) for d in kind.shape.dim)

    folder = exported(family)
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    known = {value.name: shape_of(value) for value in graph.input}
    core.core_device(3, 16, 100 << 10, 8)
    held, seen = [], set()
    for node in graph.node:
        if node.domain != "flashhead":
            known[node.output[0]] = known[node.input[0]]
            continue
        plugin = Plugin(core, node.op_type, {a.name: readable(onnx.helper.get_attribute_value(a)) for a in node.attribute})
        held.append(plugin)
        seen.add(node.op_type)
        inputs = [known[name] for name in node.input]
        assert (plugin.wrong, plugin.fits(*inputs), plugin.prepare()) == ("", "", ""), node.name
        for name, said in zip(node.output, plugin.shapes(*inputs)):
            kind, shape = said.split(" ", 1)
            known[name] = NUMBER[kind], tuple(json.loads(shape))
    for value in graph.output:
        assert known[value.name] == shape_of(value), value.name
    assert seen == {"TokenEmbedding", "RmsNorm", "W4A16Linear", "DecodeAttention", "FlashHead"}
    size = (folder / "weights.safetensors").stat().st_size
    assert 0.8 * size < core.core_device_bytes() <= size  # each tensor once, whoever reads it
    for plugin in held:
        core.core_destroy(plugin.handle)


def readable(value):
    return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, list) else value


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of a small decoder of a family, for a GPU of 16 multiprocessors."""
    pytest.importorskip("onnxruntime_genai")
    from small_plugins import plugin_body, save_plugin_model, write_plugins

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        model = save_plugin_model(folder / "model", family)
        write_plugins(plugin_body(model, folder / "work"), model, folder / "out")
        return folder / "out"

    return make
