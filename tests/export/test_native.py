"""Our own operator for ONNX Runtime against the reference on every case: alone, in a batch, on two threads and without vector instructions."""

import dataclasses
import functools
import os
import shutil
import subprocess

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from candidates import not_the_references
from small_heads import fingerprint_of, gate, means_of, table_of

from flashhead_edge.bench.head import with_shares
from flashhead_edge.cases import CASES, made_index, made_rows, made_states
from flashhead_edge.coding import encode
from flashhead_edge.errors import SettingsError
from flashhead_edge.export.native import native_model
from flashhead_edge.index import HeadIndex, Stage
from flashhead_edge.jetson.onnxruntime_sessions import native_library, runtime_errors
from flashhead_edge.reference import step, torch_head

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the operator's library was not built: no C compiler where flashhead-edge was installed")
SMALL = [case for case in CASES if case.vocab_size < 10_000]
STATES = 24
OUTPUTS = ("token", "candidate_ids", "candidate_logits", "counts", "capped")


@functools.cache
def subject(case):
    """Index, rows, states, and what the reference says of them."""
    weight = torch.from_numpy(made_rows(case)).half()
    hidden = torch.from_numpy(made_states(case, STATES)).float()
    index = with_shares(made_index(case), weight, hidden[:16], case.shares)
    return index, weight, hidden, step(torch_head(index, weight), hidden)


def session(model, threads=1, library=LIBRARY):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def ran(model, hidden, **options):
    return dict(zip(OUTPUTS, session(model, **options).run(OUTPUTS, {"hidden_states": hidden})))


@functools.cache
def together(case):
    index, weight, hidden, _ = subject(case)
    return ran(native_model(index, weight.numpy(), None, {}), hidden.numpy())


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in OUTPUTS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_step_is_the_references_but_for_what_lies_at_a_margin(case):
    index, weight, hidden, want = subject(case)
    got = together(case)
    assert got["token"].tolist() == want.token.tolist()
    at_a_margin = not_the_references(got, want, weight, hidden)
    # states are rounded to 16 bits, so that an item whose gap is its margin may change sides
    assert at_a_margin <= max(3, 0.002 * int(want.counts[:, -1].sum()))
    moved = np.abs(got["counts"] - want.counts.numpy())
    assert moved[:, 0].max() <= 1  # clusters
    assert moved[:, 1:].max() <= index.cluster_size  # their slots
    assert (got["capped"] == want.capped.numpy()).all()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_neither_the_batch_nor_threads_change_a_bit(case):
    index, weight, hidden, _ = subject(case)
    model = native_model(index, weight.numpy(), None, {})
    assert same(ran(model, hidden.numpy(), threads=2), together(case))
    for threads in (1, 2):
        alone = session(model, threads)
        for i in range(STATES):
            one = dict(zip(OUTPUTS, alone.run(OUTPUTS, {"hidden_states": hidden.numpy()[i : i + 1]})))
            n = one["candidate_ids"].shape[1]
            assert all(np.array_equal(one[name][0], together(case)[name][i]) for name in ("token", "counts", "capped"))
            assert all(np.array_equal(one[name][0], together(case)[name][i, :n]) for name in ("candidate_ids", "candidate_logits"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [256, 250])
def test_exact_rows_of_every_type_with_a_bias(dtype, width):
    """A hidden size that no vector divides, too."""
    case = dataclasses.replace(SMALL[18], hidden_size=width)  # the published head: any hidden size has an index
    weight = torch.from_numpy(made_rows(case)).to(dtype)
    hidden = torch.from_numpy(made_states(case, STATES)).float()
    bias = torch.linspace(-1, 1, len(weight))
    index = made_index(case)
    index = dataclasses.replace(index, probe=dataclasses.replace(index.probe, margin=float("inf")))
    rows = weight.numpy() if dtype != torch.bfloat16 else ir.tensor(weight.view(torch.uint16).numpy(), dtype=ir.DataType.BFLOAT16, name="head.rows")
    got = ran(native_model(index, rows, bias.numpy(), {}), hidden.numpy())
    want = step(torch_head(index, weight, bias), hidden)
    assert got["token"].tolist() == want.token.tolist()
    assert np.array_equal(got["candidate_ids"], want.ids.numpy())
    real = want.ids.numpy() >= 0
    # sums of 256 products in float32
    assert np.allclose(got["candidate_logits"][real], want.logits.numpy()[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3e38])
def test_a_state_that_is_not_finite_has_no_candidate_and_leaves_its_neighbours_alone(wrong):
    index, weight, hidden, _ = subject(SMALL[0])
    broken = hidden.numpy().copy()
    broken[3, 5:9] = wrong
    model = native_model(index, weight.numpy(), None, {})
    got = ran(model, broken)
    assert got["counts"][3, -1] == 0 and got["token"][3] == -1 and (got["candidate_ids"][3] == -1).all()
    others = np.arange(STATES) != 3
    assert all(np.array_equal(got[name][others], together(SMALL[0])[name][others]) for name in ("token", "counts", "capped"))
    alone = ran(model, broken[3:4])
    assert alone["counts"][0, -1] == 0 and alone["candidate_ids"].tolist() == [[-1]]


def test_no_states_give_no_rows():
    index, weight, hidden, _ = subject(SMALL[0])
    got = ran(native_model(index, weight.numpy(), None, {}), hidden.numpy()[:0])
    assert [len(got[name]) for name in OUTPUTS] == [0] * 5


@pytest.mark.skipif(os.name == "nt" or shutil.which("cc") is None, reason="no C compiler is called cc here")
def test_vector_instructions_change_no_bit(root, tmp_path):
    """The plain loops, which processors without AVX2 run, against those that this one runs."""
    plain = tmp_path / "plain.so"
    flags = ["-O2", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC", "-DFLASHHEAD_PLAIN"]
    sources = sorted(path for path in (root / "jetson/native").glob("*.c") if path.name != "module.c")  # which needs Python's headers
    subprocess.run(["cc", *flags, "-o", plain, *sources, "-lm"], check=True, timeout=120)
    for case in (SMALL[0], SMALL[6], SMALL[18]):
        index, weight, hidden, _ = subject(case)
        assert same(ran(native_model(index, weight.numpy(), None, {}), hidden.numpy(), library=plain), together(case))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda node: node.replace_input_with(3, node.inputs[2]), "the token table is not of whole clusters"),
        (lambda node: node.replace_input_with(5, node.inputs[3]), "another type or fewer elements"),
        (lambda node: node.attributes.add(ir.AttrInt64s("caps", [1])), "attributes of the head do not fit each other"),
        (lambda node: node.attributes.add(ir.AttrInt64s("caps", [10**6] * 5)), "columns or caps of a stage are out of range"),
        (lambda node: node.replace_input_with(6, node.inputs[9]), "a matrix of the head has another type or shape than its sizes say"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_when_the_model_is_opened(change, text):
    index, weight, *_ = subject(SMALL[0])
    model = native_model(index, weight.numpy(), None, {})
    (node,) = model.graph
    change(node)
    with pytest.raises(runtime_errors(), match=text):
        session(model)


def test_states_of_another_width_are_refused():
    index, weight, *_ = subject(SMALL[0])
    model = native_model(index, weight.numpy(), None, {})
    model.graph.inputs[0].shape = ir.Shape(("N", "d"))
    with pytest.raises(runtime_errors(), match="do not have the shape"):
        ran(model, np.zeros((1, 255), np.float32))


def test_making_the_model_twice_gives_the_same_bytes():
    index, weight, *_ = subject(SMALL[0])
    one, two = (ir.to_proto(native_model(index, weight.numpy(), None, {})).SerializeToString() for _ in range(2))
    assert one == two


def test_a_cluster_without_tokens_that_opens_alone_gives_no_token():
    """Its slots are empty, so that there is no row to score, nor a first one to compare others with."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(64, 32, generator=generator), torch.randn(1, 32, generator=generator)
    table = table_of(64, 8)
    centroids = encode(torch.cat([means_of(weight, table), 10 * hidden]), "float16")
    rows = torch.cat([weight, torch.zeros(8, 32)])
    table = np.concatenate([table, np.full((1, 8), -1, np.int32)])
    stages = (Stage(encode(rows, "int8/8"), gate(72)),)
    probe = dataclasses.replace(gate(9, cap=1), margin=0.0)
    index = HeadIndex(64, 32, table, centroids, probe, stages, np.zeros(0, np.int32), None, None, 1.0, -1.0, fingerprint_of(weight))
    got = ran(native_model(index, weight.numpy(), None, {}), hidden.numpy())
    assert got["token"].tolist() == [-1] and got["counts"].tolist() == [[1, 0, 0]] and got["candidate_ids"].tolist() == [[-1]]
    with pytest.raises(SettingsError, match="a hidden state is not finite"):  # the reference refuses a step without candidates
        step(torch_head(index, weight), hidden)
