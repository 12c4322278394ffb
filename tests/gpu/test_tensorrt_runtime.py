"""Engines on a GPU, through the runtime: FLASHHEAD_TENSORRT is a folder of `flashhead export tensorrt` with engines, FLASHHEAD_PLUGIN its library.

They need TensorRT and no torch: under the Python that a Jetson has, `python -m pytest tests/gpu/test_tensorrt_runtime.py`.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import EngineError, SettingsError

pytest.importorskip("tensorrt", reason="needs TensorRT: see docs/tensorrt.md")

from flashhead_edge.generation import PromptCache, compile_grammar, exact_stream, stream
from flashhead_edge.jetson import open_engine, plugins
from flashhead_edge.jetson.tensorrt_backend import open_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("FLASHHEAD_TENSORRT" not in os.environ, reason="FLASHHEAD_TENSORRT names no folder with engines")]
LIBRARY = Path(os.environ["FLASHHEAD_PLUGIN"]) if "FLASHHEAD_PLUGIN" in os.environ else None
PROMPTS = [[1, 5, 9, 200, 31, 77, 1024, 8], [3, 17], [400, 12, 12, 12, 90, 7, 7, 300, 21, 55, 1000, 2]]


def opened():
    return open_folder(Path(os.environ["FLASHHEAD_TENSORRT"]), LIBRARY)


@pytest.fixture(scope="module")
def backend():
    with opened() as b:
        yield b


def fed(backend, pieces):
    """State and step after pieces of a text."""
    body = backend.body()
    for piece in pieces:
        hidden = body.feed(piece)
    return hidden, backend.head.step(hidden)


def test_a_prompt_is_its_tokens_one_by_one(backend):
    """Prefill and decode have kernels of their own, whose sums are made in other orders."""
    ids = [int(t) for t in np.random.default_rng(0).integers(0, 40_000, 300)]
    whole, step = fed(backend, [ids])
    parts, other = fed(backend, [ids[:256], ids[256:290], *([t] for t in ids[290:])])
    assert np.abs(whole - parts).max() < 0.02 * np.abs(whole).max()  # float16 activations through all layers
    logits = dict(zip(step.ids[0].tolist(), step.logits[0].tolist()))
    assert logits[int(other.token[0])] > step.logits.max() - 0.05 * np.abs(step.logits).max()  # the same token, or one beside it


def test_what_is_cut_leaves_no_trace(backend):
    body = backend.body()
    body.feed(PROMPTS[0])
    kept = body.snapshot()
    want = body.feed([100])
    body.restore(kept)
    body.feed([7])
    body.feed([8])
    body.cut(2)
    assert np.array_equal(body.feed([100]), want)  # bit by bit


def test_a_step_is_captured_once_for_each_number_of_rows(backend):
    for _ in range(2):
        for rows in (1, 2, 3):
            list(backend.decode(PROMPTS[:rows], 5))
    before = backend.captures
    for rows in (1, 2, 3):
        list(backend.decode(PROMPTS[:rows], 9))
    fed(backend, [[1, 2, 3], [4], [5]])
    assert backend.captures == before
    assert len({key for key in backend.captured if not key[2]}) == 3


def test_rows_do_not_see_each_other(backend):
    """Equal prompts give equal rows, and a row is what its text gives alone: decode's sums depend on the shapes alone, but attention's on the batch."""
    steps = 24
    rows = np.stack(list(backend.decode([PROMPTS[0]] * 3, steps)))
    assert (rows == rows[:, :1]).all()
    alone = [np.stack(list(backend.decode([p], steps)))[:, 0] for p in PROMPTS]
    together = np.stack(list(backend.decode(PROMPTS, steps))).T
    same = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), steps) for x, y in zip(alone, together)]
    assert sum(same) > 0.7 * steps * len(PROMPTS)


def test_the_loop_and_the_device_decode_the_same_text(backend):
    on_device = [int(t[0]) for t in backend.decode([PROMPTS[0]], 20)]
    engine = open_engine(os.environ["FLASHHEAD_TENSORRT"], "tensorrt", plugin=LIBRARY)
    with engine.backend:
        by_loop = [t.id for t in stream(engine, PROMPTS[0], 20)]
    assert by_loop == on_device[: len(by_loop)]


def test_a_cache_is_read_on_and_a_grammar_holds():
    """A prompt that goes on from an answer, then one that differs in the middle: both read what is new alone."""
    engine, cache = open_engine(os.environ["FLASHHEAD_TENSORRT"], "tensorrt", plugin=LIBRARY), PromptCache()
    with engine.backend:
        first = [t.id for t in stream(engine, PROMPTS[0], 12, cache=cache)]
        prompts, states = ([*PROMPTS[0], *first, 5, 6], [*PROMPTS[0], 5, 6, 7]), []
        for prompt in prompts:
            read, hidden = cache.begin(engine, prompt)
            assert read == 3
            states.append(hidden)
        for prompt, hidden in zip(prompts, states):
            alone = engine.body().feed(prompt)
            assert np.abs(alone - hidden).max() < 0.05 * np.abs(alone).max()  # parts of other lengths: sums in 16 bits in another order
        pytest.importorskip("llguidance")
        grammar = compile_grammar(engine, regex="[0-9]{12}")
        for way, more in ((stream, {}), (exact_stream, {}), (stream, {"sampling": Sampling(temperature=1.0, seed=2)})):
            run = way(engine, PROMPTS[0], 20, grammar=grammar, logprobs=2, **more)
            tokens = list(run)
            assert re.fullmatch("[0-9]{12}", "".join(t.text for t in tokens))
            assert all(len(t.logprobs.top) == 2 and t.logprobs.logprob <= 0 for t in tokens)
            assert run.summary.stopped == "grammar complete"
        with pytest.raises(SettingsError, match="speculate needs a body that gives the states of several tokens"):
            next(stream(engine, PROMPTS[0], 5, speculate=4))


@pytest.mark.parametrize("settings", [{"temperature": 0.75, "top_k": 40}, {"temperature": 1.25, "top_p": 0.875, "min_p": 0.015625}, {"temperature": 0.6875}])
def test_draws_are_those_of_the_definition(backend, settings):  # of settings that float32 holds exactly, as the device has them
    for seed in (0, 3, 2**63 + 5):
        s = Sampling(seed=seed, **settings)
        body = backend.body()
        backend._sample(s, [seed], 0)
        try:
            for step in range(6):
                backend.setting("step", 1)[:] = step
                found = backend.head.step(body.feed([30 + step]))
                assert found.token[0] == choose(found.ids, found.logits, s, [step], None, None, backend.settings.scale, backend.settings.softcap)[0]
        finally:
            backend._sample(Sampling(), [0], 0)
    drawn = [[int(t[0]) for t in backend.decode([PROMPTS[0]], 30, Sampling(temperature=1.0, seed=seed))] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_heads_own_engines_agree_with_the_steps(backend):
    hidden, step = fed(backend, [PROMPTS[2]])
    again, logits = backend.head.step_with_logits(hidden)
    alone = backend.head.step(hidden.copy())
    for other in (again, alone):
        assert other.token == step.token and np.array_equal(other.ids, step.ids) and np.array_equal(other.logits, step.logits)
    assert np.isfinite(logits).all() and logits.argmax() == step.token[0]
    assert np.array_equal(logits[0, step.ids[0]], step.logits[0])
    exact = backend.head.exact_logits(hidden, step.ids[0])
    assert np.abs(exact - step.logits).max() < 1e-4 * np.abs(exact).max()  # float32 sums in another order


def test_states_of_any_number(backend):
    states = np.random.default_rng(1).standard_normal((backend.manifest.max_batch + 3, backend.settings.hidden_size)).astype(np.float32)
    step, logits = backend.head.step_with_logits(states)
    assert logits.shape == (len(states), backend.settings.vocab_size) and (logits.argmax(1) == step.token).all()
    assert backend.head.step(states[-1:]).token == step.token[-1]


def test_what_does_not_fit_is_a_sentence(backend):
    limit = backend.manifest.context
    with pytest.raises(EngineError, match=f"expected at most the engine's {limit:,} positions"):
        backend.body().feed([1] * (limit + 1))
    with pytest.raises(SettingsError, match="expected 1 to"):
        next(backend.decode([[1]] * (backend.manifest.max_batch + 1), 2))
    older = backend.body()
    older.feed([1, 2])
    backend.body().feed([3])
    with pytest.raises(EngineError, match="another text has taken over the cache"):
        older.feed([4])


def test_two_backends_share_the_weights_and_end_in_any_order():
    first, second = opened(), opened()
    held = plugins.device_bytes(first.library)
    want = [int(t[0]) for t in second.decode([PROMPTS[0]], 8)]
    assert [int(t[0]) for t in first.decode([PROMPTS[0]], 8)] == want
    first.close()
    assert plugins.device_bytes(second.library) == held
    assert [int(t[0]) for t in second.decode([PROMPTS[0]], 8)] == want
    second.close()


def test_pycudas_stream_and_arrays_are_ours_too():
    """Both live in the primary context."""
    pytest.importorskip("pycuda")
    import pycuda.autoprimaryctx
    import pycuda.driver as cuda
    from pycuda.gpuarray import GPUArray

    theirs = cuda.Stream()
    with open_folder(Path(os.environ["FLASHHEAD_TENSORRT"]), LIBRARY, theirs.handle) as b:
        hidden = b.body().feed(PROMPTS[0])
        memory = b.memory["results"]
        place = b.places(1)[0]["token"]
        seen = GPUArray((1,), np.int32, gpudata=memory.pointer + place.offset)
        theirs.synchronize()
        assert seen.get()[0] == b.head.step(hidden).token[0]
        assert memory.__cuda_array_interface__["data"][0] == memory.pointer
    assert pycuda.autoprimaryctx.context is not None


def test_a_truncated_engine_is_refused(tmp_path):
    import json
    import shutil

    from flashhead_edge.errors import CheckpointError

    folder = tmp_path / "copy"
    shutil.copytree(os.environ["FLASHHEAD_TENSORRT"], folder)
    engine = folder / "decoder.engine"
    engine.write_bytes(engine.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="is cut off"):
        open_folder(folder, LIBRARY)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["decoder"]["bytes"] -= 5000
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="does not read the engine"):
        open_folder(folder, LIBRARY)


def test_what_trtexec_does_works_without_our_builder():
    """The library, the ONNX file, TensorRT's own calls: load, parse, build, deserialise."""
    import tensorrt as trt

    folder, logger = Path(os.environ["FLASHHEAD_TENSORRT"]), trt.Logger(trt.Logger.ERROR)
    library = LIBRARY or plugins.find_library(int(trt.__version__.split(".")[0]))
    plugins.load_library(trt, library)
    for part in ("head", "decoder"):
        builder = trt.Builder(logger)
        flags = trt.NetworkDefinitionCreationFlag
        typed = hasattr(flags, "STRONGLY_TYPED")
        network = builder.create_network(1 << int(flags.STRONGLY_TYPED if typed else flags.EXPLICIT_BATCH))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(folder / f"{part}.onnx")), parser.get_error(0)
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            shape = tuple(1 if n < 0 else n for n in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
        if not typed:
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_tactic_sources(0)
        plan = builder.build_serialized_network(network, config)
        assert plan is not None and plan.nbytes < 2_000_000, plugins.last_error(library)
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        assert engine.num_io_tensors == network.num_inputs + network.num_outputs


def test_the_example_builds_its_network():
    import subprocess
    import sys

    example = Path(__file__).parents[2] / "examples" / "tensorrt_head.py"
    done = subprocess.run(
        [sys.executable, example, os.environ["FLASHHEAD_TENSORRT"], *([str(LIBRARY)] if LIBRARY else [])], capture_output=True, text=True, check=False
    )
    assert "\nan engine of " in f"\n{done.stdout}", done.stdout + done.stderr  # after what TensorRT's logger says


OWN = """
import json, sys
from pathlib import Path
from flashhead_edge.export.tensorrt import build_engines
from flashhead_edge.export.tensorrt.engines import Build
from flashhead_edge.jetson.tensorrt_backend import open_folder
folder, library, prompts, steps = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
build_engines(folder, build=Build(plugin=library))
with open_folder(folder, library) as b:
    state = b.body().feed(prompts[0])
    alone = [[int(t[0]) for t in b.decode([p], steps)] for p in prompts]
    together = [t.tolist() for t in b.decode(prompts, steps)]
print(json.dumps({"state": state.tolist(), "alone": alone, "together": together}))
"""


@pytest.mark.skipif("TENSORRT_INCLUDE" not in os.environ, reason="TENSORRT_INCLUDE names no folder of TensorRT's headers")
def test_the_library_that_gpp_and_nvrtc_make_decodes_the_same_text(backend, tmp_path):
    """`flashhead plugin build`, engines built with it, and texts: in a process of its own, since TensorRT takes one library a process.

    Two compilers may order a float32 sum's multiplications and additions differently.
    """
    import json
    import shutil
    import subprocess
    import sys

    from flashhead_edge.jetson.plugin_build import build

    made = build(Path(os.environ["TENSORRT_INCLUDE"]), tmp_path / "own" / (LIBRARY or backend.library).name)
    folder, steps = tmp_path / "copy", 24
    shutil.copytree(os.environ["FLASHHEAD_TENSORRT"], folder)
    done = subprocess.run([sys.executable, "-c", OWN, folder, made.path, json.dumps(PROMPTS), str(steps)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    state = backend.body().feed(PROMPTS[0])
    assert np.abs(np.array(found["state"]) - state).max() < 0.02 * np.abs(state).max()
    alone = [[int(t[0]) for t in backend.decode([p], steps)] for p in PROMPTS]
    together = [t.tolist() for t in backend.decode(PROMPTS, steps)]
    for mine, theirs in ((alone, found["alone"]), (list(zip(*together)), list(zip(*found["together"])))):
        same = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), steps) for x, y in zip(mine, theirs)]
        assert sum(same) > 0.7 * steps * len(PROMPTS)
