"""`export_onnx` end to end on a tiny model: every file and dialect, GenAI, the same bytes twice, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from small_checkpoints import NAMED, content, save_model
from small_exports import VOCAB, write_exportable, write_with_index
from small_heads import everything_open, few_probes

from flashhead_edge.errors import CheckpointError, SettingsError, UnsupportedModelError
from flashhead_edge.export import export_onnx
from flashhead_edge.generation import stream
from flashhead_edge.jetson.engine import open_engine
from flashhead_edge.jetson.inspection import describe_model

PARTS = ("body", "head", "head_logits", "rescore", "model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_exportable(folder / "model", tie_word_embeddings=True)
    return write_with_index(model, folder / "out", lambda weight, fingerprint: everything_open(weight, cascade=True, vocab_size=VOCAB, fingerprint=fingerprint))


@pytest.fixture(scope="module", params=["onnxruntime", "portable"])
def exported(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    export_onnx(checkpoint, out, dialect=request.param, body="fp32")
    return out


def test_every_part_says_what_it_is(exported, checkpoint):
    told = describe_model(exported)["models"]
    assert set(PARTS) <= set(told)
    fingerprint = json.loads((checkpoint / "config.json").read_text())["flash_head"]["fingerprint"]
    assert {m["fingerprint"] for m in told.values()} == {fingerprint}
    assert {m["dialect"] for m in told.values()} == {exported.parent.name.rstrip("0123456789")}
    assert told["head"]["stages"] == ["Probe", "Score", "Rescore", "Decode"]
    assert told["head_logits"]["stages"] == [*told["head"]["stages"], "Widen"]
    assert told["model"]["cached_layers"] == 2


def test_a_tied_matrix_is_stored_once(exported):
    used = {}
    for part in PARTS:
        for tensor in onnx.load(exported / f"{part}.onnx", load_external_data=False).graph.initializer:
            if tensor.external_data:
                where = {e.key: e.value for e in tensor.external_data}
                used.setdefault(int(where["offset"]), set()).add(tensor.name)
    assert all(len(names) == 1 for names in used.values())
    assert any("head.rows" in names for names in used.values())
    size = sum(int(np.prod(t.dims)) for t in onnx.load(exported / "body.onnx", load_external_data=False).graph.initializer if list(t.dims) == [VOCAB, 32])
    assert size == VOCAB * 32  # the embedding, and no other matrix of the vocabulary's size


def test_genai_writes_the_sessions_text(exported):
    og = pytest.importorskip("onnxruntime_genai")
    engine = open_engine(exported, threads=1)
    prompt = [72, 101, 108, 108, 111, 32]
    run = stream(engine, prompt, 20)
    ours = [token.id for token in run]
    model = og.Model(str(exported))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + len(ours), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    theirs = []
    while not generator.is_done() and len(theirs) < len(ours):
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours
    parameters.set_search_options(do_sample=True, temperature=1.5, top_k=20, top_p=0.9, random_seed=3)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    for _ in range(5):
        generator.generate_next_token()  # every logit is finite, so that any rule of sampling works


@pytest.mark.parametrize("body", [None, "int4"])
def test_exporting_twice_gives_the_same_bytes(checkpoint, tmp_path, body):
    from small_bodies import warm_builder

    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        with warm_builder():
            export_onnx(checkpoint, out, body=body, stages=True)
    assert content(one) == content(two)


def test_the_head_alone_is_written_for_any_family(tmp_path):
    source = save_model(tmp_path / "gpt2", "gpt2")
    folder = write_with_index(source, tmp_path / "out", lambda weight, fingerprint: everything_open(weight, vocab_size=NAMED, fingerprint=fingerprint))
    with pytest.raises(UnsupportedModelError, match="export the head alone"):
        export_onnx(folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    written = export_onnx(folder, tmp_path / "head", body=None)
    assert "head.onnx" in written.files and "body.onnx" not in written.files


def test_what_is_refused(checkpoint, tmp_path):
    plain = save_model(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no head index.*run flashhead convert first"):
        export_onnx(plain, tmp_path / "a")
    for broken in ({"dialect": "tflite"}, {"body": "int3"}, {"group": 48}):
        with pytest.raises(SettingsError, match="choose one of them"):
            export_onnx(checkpoint, tmp_path / "b", **broken)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        export_onnx(checkpoint, other)
    with pytest.raises(CheckpointError, match="no folder that flashhead export wrote"):
        export_onnx(checkpoint, other, overwrite=True)
    with pytest.raises(CheckpointError, match="apart from it"):
        export_onnx(checkpoint, checkpoint / "inside", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "plain"]
    assert (other / "mine.txt").read_text() == "x"


def run_cli(*arguments):
    return subprocess.run([sys.executable, "-m", "flashhead_edge", *arguments], capture_output=True, text=True, timeout=300)


def test_the_verbs(checkpoint, tmp_path):
    out = tmp_path / "out"
    done = run_cli("export", "onnx", str(checkpoint), str(out), "--body", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert "head.onnx" in json.loads(done.stdout)["files"]
    done = run_cli("inspect", str(out / "head.onnx"), "--json")
    assert json.loads(done.stdout)["opset"] == 21
    again = run_cli("export", "onnx", str(checkpoint), str(out), "--body", "none")
    assert again.returncode == 2 and "exists already" in again.stderr
    foreign = tmp_path / "foreign.onnx"
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), foreign)
    done = run_cli("inspect", str(foreign))
    assert done.returncode == 2 and "does not come from flashhead export" in done.stderr


def test_a_published_head_is_exported(tmp_path, checkpoint):
    source = checkpoint.parent / "model"
    folder = write_with_index(source, tmp_path / "ck", lambda weight, fingerprint: few_probes(weight, 3, fingerprint=fingerprint))
    export_onnx(folder, tmp_path / "out", body=None)
    assert describe_model(tmp_path / "out" / "head.onnx")["stages"] == ["Probe", "Score", "Rescore", "Decode"]
