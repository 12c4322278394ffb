"""The head as ONNX models against the reference: every case, both dialects that run here, alone and in a batch, and each stage alone."""

import functools
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from candidates import not_the_references

from flashhead_edge.bench.head import with_shares
from flashhead_edge.cases import CASES, made_index, made_rows, made_states
from flashhead_edge.coding import encode
from flashhead_edge.export.arrays import grid
from flashhead_edge.export.dialects import DIALECTS
from flashhead_edge.export.head import head_functions
from flashhead_edge.export.parts import head_model, rescore_model, stage_models
from flashhead_edge.reference import coordinates, exact_logits, probe, run_stages, state_unit, step_with_logits, torch_head

SMALL = [case for case in CASES if case.vocab_size < 10_000]
STATES = 24
RUN = ("onnxruntime", "portable")  # tensorrt says the head as portable does
# Activations are rounded to 1/65024 of their largest (two 8-bit limbs): a score of these cases, up to 10, moves by less than this
LIMBS_WITHIN = 2e-3


@functools.cache
def subject(case):
    """Index, rows, states, and what the reference says of them."""
    weight = torch.from_numpy(made_rows(case)).half()
    hidden = torch.from_numpy(made_states(case, STATES)).float()
    index = with_shares(made_index(case), weight, hidden[:16], case.shares)
    head = torch_head(index, weight)
    return index, weight, hidden, head, step_with_logits(head, hidden)


def functions(case, dialect):
    index, weight, *_ = subject(case)
    return index, head_functions(index, weight.numpy(), None, DIALECTS[dialect])


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def ran(case, dialect):
    """Outputs of the head with full-width logits: of each state alone, and of all together."""
    index, f = functions(case, dialect)
    model = session(head_model(f, index, DIALECTS[dialect], {}, logits=True))
    names = [o.name for o in model.get_outputs()]
    hidden = subject(case)[2].numpy()
    alone = [dict(zip(names, model.run(None, {"hidden_states": hidden[i : i + 1]}))) for i in range(len(hidden))]
    return alone, dict(zip(names, model.run(None, {"hidden_states": hidden})))


@pytest.mark.parametrize("dialect", RUN)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_token_is_the_references(case, dialect):
    want = subject(case)[4][0]
    alone, together = ran(case, dialect)
    assert together["token"].tolist() == want.token.tolist()
    assert [int(a["token"][0]) for a in alone] == want.token.tolist()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_batch_changes_nothing(case):
    """Sums of integers are exact in any order; the portable dialect's float sums are not, so that an item at a margin may change sides."""
    alone, together = ran(case, "onnxruntime")
    for i, one in enumerate(alone):
        n = one["candidate_ids"].shape[1]
        real = together["candidate_ids"][i] >= 0
        assert one["candidate_ids"][0][one["candidate_ids"][0] >= 0].tolist() == together["candidate_ids"][i][real].tolist()
        assert one["counts"][0].tolist() == together["counts"][i].tolist()
        assert one["capped"][0] == together["capped"][i]
        # the sums of an exact row may be made in another order
        assert np.allclose(one["candidate_logits"][0][: real.sum()], together["candidate_logits"][i][real][:n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", RUN)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_candidates_are_the_references_but_for_those_at_a_margin(case, dialect):
    index, weight, hidden, _, (want, _) = subject(case)
    _, got = ran(case, dialect)
    at_a_margin = not_the_references(got, want, weight, hidden)
    total = int(want.counts[:, -1].sum())
    # of the ids on either side, those of one state at most where sums are float32, one in fifty where they are of limbs
    assert at_a_margin <= (1 if dialect == "portable" else max(3, 0.02 * total)), f"{at_a_margin} of {total}"
    moved = np.abs(got["counts"] - want.counts.numpy())
    assert moved[:, 0].max() <= 1  # clusters
    assert moved[:, 1:].max() <= 2 * index.cluster_size  # their slots
    assert (got["capped"] == want.capped.numpy()).all()


@pytest.mark.parametrize("dialect", RUN)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_full_width_logits_are_finite_and_the_references(case, dialect):
    _, _, _, _, (want, full) = subject(case)
    _, got = ran(case, dialect)
    assert np.isfinite(got["logits"]).all()
    same = np.array([got["counts"][i].tolist() == want.counts[i].tolist() for i in range(STATES)])
    if not same.any():
        pytest.skip("every state of this case has an item at a margin")
    difference = np.abs(got["logits"] - full.numpy())[same]
    within = (LIMBS_WITHIN if dialect == "onnxruntime" else 1e-4) * (1 + np.abs(full.numpy())[same])
    # an item that a margin turns away here and another one that it lets through there leave the counts equal
    assert (difference > within).mean() <= (1e-2 if dialect == "onnxruntime" else 0)
    assert (got["logits"].argmax(1) == want.token.numpy()).all()


@pytest.mark.parametrize("dialect", RUN)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[4], SMALL[5], SMALL[18]], ids=str)
def test_each_stage_alone(case, dialect):
    index, weight, hidden, head, (want, _) = subject(case)
    _, f = functions(case, dialect)
    stages = {name: session(model) for name, model in stage_models(f, index, DIALECTS[dialect], {}).items()}

    def run(name, feeds):
        model = stages[name]
        return dict(zip([o.name for o in model.get_outputs()], model.run(None, {i.name: feeds[i.name] for i in model.get_inputs()})))

    found = run("probe", {"hidden_states": hidden.numpy()})
    z = coordinates(head, hidden)
    within = LIMBS_WITHIN if dialect == "onnxruntime" else 1e-4
    assert np.abs(found["z"] - z.numpy()).max() <= within * (1 + z.abs().max())
    assert np.allclose(found["unit"], state_unit(head, z).numpy(), rtol=1e-3)
    assert np.abs(found["clusters"] - probe(head, z).numpy()).max() <= within * (1 + probe(head, z).abs().max())
    assert np.abs(np.minimum(found["opened_count"], index.probe.cap) - want.counts[:, 0].numpy()).max() <= 1
    scored = run("score", found)
    exact = run("rescore", {"hidden_states": hidden.numpy(), "tokens": scored["tokens"]})["logits"]
    trail = run_stages(head, hidden)
    for i in range(3):
        left = head.token_table[trail.slot[trail.exact & (trail.row == i)]]
        assert len(np.setxor1d(scored["tokens"][i][scored["valid"][i]], left.numpy())) <= 1
        ids = torch.from_numpy(scored["tokens"][i])
        assert np.allclose(exact[i], exact_logits(weight, None, hidden[i : i + 1], ids)[0], rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(exact[i]).max())))
    decoded = run("decode", scored | {"logits": exact})
    assert decoded["token"].tolist() == want.token.tolist()


def test_decode_takes_the_smaller_id_on_ties_and_leaves_out_what_is_not_real():
    index, f = functions(SMALL[0], "onnxruntime")
    model = session(stage_models(f, index, DIALECTS["onnxruntime"], {})["decode"])
    tokens = np.array([[9, 4, 7, 4], [3, 2, 1, 0]])
    logits = np.array([[5.0, 5.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    valid = np.array([[True, True, True, False], [True, True, False, False]])
    token, ids, values = model.run(None, {"tokens": tokens, "logits": logits, "valid": valid})
    assert token.tolist() == [4, 2]
    assert ids.tolist() == [[4, 7, 9, -1], [2, 3, -1, -1]]
    assert values.tolist() == [[5.0, 5.0, 5.0, -np.inf], [2.0, 1.0, -np.inf, -np.inf]]


def test_rescore_scores_any_tokens_for_all_states():
    index, weight, hidden, *_ = subject(SMALL[0])
    bias = np.linspace(-1, 1, len(weight), dtype=np.float32)
    f = head_functions(index, weight.numpy(), bias, DIALECTS["onnxruntime"])
    tokens = np.array([5, 0, 4_002, 5])
    (got,) = session(rescore_model(f, index, DIALECTS["onnxruntime"], {})).run(None, {"hidden_states": hidden.numpy(), "tokens": tokens})
    assert np.allclose(got, exact_logits(weight, torch.from_numpy(bias), hidden, torch.from_numpy(tokens)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[18]], ids=str)
def test_onnx_own_evaluator_agrees_with_onnx_runtime_on_the_portable_head(case):
    from onnx.reference import ReferenceEvaluator

    index, f = functions(case, "portable")
    model = ir.to_proto(head_model(f, index, DIALECTS["portable"], {}, logits=True))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    got = dict(zip([o.name for o in model.graph.output], ReferenceEvaluator(model).run(None, {"hidden_states": subject(case)[2].numpy()[:4]})))
    _, want = ran(case, "portable")
    assert got["token"].tolist() == want["token"][:4].tolist()
    assert np.allclose(got["logits"], want["logits"][:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("code", ["bits24", "product6", "columns40", "int8/64", "int4/16", "float16"])
def test_an_unpacked_code_has_the_codes_own_values(code):
    from flashhead_edge.coding import decode, to_torch

    values = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0.1, 64)
    coded = encode(values, code)
    g = grid(coded)
    got = (g.whole.astype(np.float64) + g.half * (g.steps != 0)) * g.steps * (1 if g.scale is None else g.scale[:, None])
    want = decode(to_torch(coded)).numpy()
    # float16 holds what several scales a row gave to within half a step of its 11 bits
    assert np.allclose(got, want, rtol=2**-11 if g.whole.dtype == np.float16 else 1e-6, atol=1e-7)


def test_a_state_that_is_not_finite_leaves_no_candidate():
    index, _, hidden, *_ = subject(SMALL[0])
    _, f = functions(SMALL[0], "onnxruntime")
    broken = hidden.numpy()[:1].copy()
    broken[0, 3] = np.nan
    counts = session(head_model(f, index, DIALECTS["onnxruntime"], {}, logits=False)).run(["counts"], {"hidden_states": broken})[0]
    assert counts[0, -1] == 0


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[18]], ids=str)
def test_tensorrt_rtx_parses_and_builds(case, dialect, root, tmp_path):
    """Without a plugin and without a GPU: what a current TensorRT takes."""
    pytest.importorskip("tensorrt_rtx_bindings")
    index, f = functions(case, dialect)
    for logits in (False, True):
        ir.save(head_model(f, index, DIALECTS[dialect], {}, logits=logits), tmp_path / f"head{logits}.onnx")
    files = sorted(str(p) for p in tmp_path.glob("*.onnx"))
    result = subprocess.run([sys.executable, root / "scripts/check_tensorrt_rtx.py", *files], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_exporting_twice_gives_the_same_bytes():
    for dialect in DIALECTS:
        index, _ = functions(SMALL[0], dialect)
        one, two = (ir.to_proto(head_model(functions(SMALL[0], dialect)[1], index, DIALECTS[dialect], {}, logits=True)).SerializeToString() for _ in range(2))
        assert one == two
