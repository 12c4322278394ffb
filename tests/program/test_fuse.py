"""The pass that fuses a decode step's nodes: which it makes of decoders, and where it leaves nodes alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_emulator import emulated
from cuda_truth import MODELS, small_program

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson import cuda_library, cuda_program
from flashhead_edge.jetson.cuda_backend import Cuda, export_settings
from flashhead_edge.program import fuse
from flashhead_edge.program.nodes import Node, Stored


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = small_program(tmp_path_factory.mktemp("programs") / name, name)
        return made[name]

    return make


def ops(nodes) -> list[str]:
    return [step.node.op for step in fuse.fused(nodes)]


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_five_launches(programs, name: str) -> None:
    """With Gemma's four norms, too: the norm behind a branch goes into the product after it; the last norms stay before the head."""
    nodes = programs(name).nodes
    layers = sum(n.op == "DecodeAttention" for n in nodes)
    last = ["RmsNorm", "RmsNorm"] if name == "gemma" else ["RmsNorm"]
    assert ops(nodes) == ["TokenEmbedding", *[fuse.LINEAR, fuse.ATTENTION, fuse.LINEAR, fuse.LINEAR, fuse.LINEAR] * layers, *last, "FlashHead"]


@pytest.mark.parametrize("name", MODELS)
def test_every_node_is_in_one_step_and_what_others_read_is_written(programs, name: str) -> None:
    nodes = programs(name).nodes
    steps = fuse.fused(nodes)
    assert [at for s in steps for at in range(s.first, s.last + 1)] == list(range(len(nodes)))
    written = {"input_ids", "lengths"} | {n for node in nodes for n in node.inputs if n.startswith("past_key_values")} | set(nodes[-1].inputs[1:])
    for step in steps:
        assert {n for n in step.node.inputs if n} <= written, step.node.name
        written |= set(step.node.outputs)


def chain(*changes) -> list[Node]:
    """A norm with residual, a product, a gate and what reads it; changed node by node."""
    norm = {"weight": Stored("w"), "d": 64, "offset": 0.0, "epsilon": 1e-5, "bf16": 0}
    linear = {"codes": Stored("c"), "scales": Stored("s"), "zeros": Stored(""), "n": 128, "k": 64, "group": 64, "bf16": 0}
    nodes = [
        Node("RmsNorm", "a", ("x",), ("a",), norm),
        Node("RmsNorm", "b", ("a", "r"), ("b", "t"), norm),
        Node("W4A16Linear", "c", ("b",), ("c",), linear),
        Node("GatedProduct", "d", ("c",), ("d",), {"activation": 1, "bf16": 0}),
        Node("W4A16Linear", "e", ("d",), ("e",), linear),
        Node("FlashHead", "h", ("e",), ("token",), {}),
    ]
    for at, values in changes:
        nodes[at] = dataclasses.replace(nodes[at], **values)
    return nodes


def test_what_goes_into_a_product() -> None:
    first, second, _ = fuse.fused(chain())
    a = first.node.attributes
    assert (first.node.inputs, first.node.outputs, first.first, first.last) == (("x", "r"), ("d", "t"), 0, 3)
    assert (a["first_norm"], a["norm"], a["gated"], a["activation"], a["epsilon"], a["n"]) == (Stored("w"), Stored("w"), 1, 1, 1e-5, 128)
    assert second.node.inputs == ("d", "") and second.node.attributes["norm"] == fuse.NONE and second.node.attributes["gated"] == 0


def test_where_nodes_stay_as_they_are() -> None:
    other = dict(chain()[0].attributes) | {"epsilon": 1e-6}
    odd = dict(chain()[2].attributes) | {"n": 112}
    with_reader = [*chain()[:-1], Node("Add", "f", ("e", "c"), ("f",), {}, ""), chain()[-1]]
    assert ops(chain((0, {"attributes": other}))) == ["RmsNorm", fuse.LINEAR, fuse.LINEAR, "FlashHead"]  # the kernel has one epsilon
    assert ops(chain((1, {"inputs": ("r", "a")}))) == ["RmsNorm", fuse.LINEAR, fuse.LINEAR, "FlashHead"]  # the norm is of the residual
    assert ops(chain((2, {"attributes": odd}))) == [fuse.LINEAR, "GatedProduct", fuse.LINEAR, "FlashHead"]  # halves are no whole tiles
    assert ops(with_reader) == [fuse.LINEAR, "GatedProduct", fuse.LINEAR, "Add", "FlashHead"]  # somebody else reads the gate's input
    twice = [*chain()[:-1], Node("Add", "f", ("e", "b"), ("f",), {}, ""), chain()[-1]]
    assert ops(twice)[:2] == ["RmsNorm", "RmsNorm"]  # and the norm's output
    # behind a product without a norm, which lets the next launch begin early, no attention may stand
    attention = Node("DecodeAttention", "g", ("e", "past_key_values.0.key", "past_key_values.0.value", "lengths"), ("g", "k", "v"), {})
    assert ops([*chain()[:-1], attention, chain()[-1]])[1:] == ["W4A16Linear", fuse.ATTENTION, "FlashHead"]


@pytest.fixture
def native_library():
    try:
        return cuda_library.library()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODELS)
def test_fused_steps_have_the_programs_bits(programs, native_library, name: str) -> None:
    """States of a text, and tokens of a batch, to the last bit."""
    program, found = programs(name), []
    for fuses in (True, False):
        with emulated(program, fuses=fuses) as (m, called):
            b = Cuda(m, export_settings(program, dict(program.settings), "made"))
            body = b.body()
            body.feed([5, 6, 7])
            called.clear()
            states = [body.feed([token]) for token in (9, 11, 400)]
            assert ("fh_w4a16_fused" in called, "fh_rms_norm" in called, "fh_gated_product" in called) == (fuses, True, not fuses)
            found.append((states, [t.tolist() for t in b.decode([[1, 2], [3], [4, 5, 6]], 4)]))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0])) and found[0][1] == found[1][1]


def test_steps_that_do_not_fit_run_the_program_as_it_is(programs, native_library) -> None:
    """Rows whose norms need more shared memory than a block may have, and more rows than the fused kernels take."""
    program = programs("llama")
    with emulated(program) as (m, _):
        fused = cuda_program.step_nodes(m, 4)
        assert any(n.op == fuse.LINEAR for n in fused) and cuda_program.step_nodes(m, 9) == tuple(program.nodes[:-1])
        m.limits.shared_bytes = 3_000
        assert cuda_program.step_nodes(m, 4) == tuple(program.nodes[:-1])
        m.limits.shared_bytes = 99 << 10
        m.fuses = False
        assert cuda_program.step_nodes(m, 1) == tuple(program.nodes[:-1])
