"""The CUDA backend over a made driver (plugins_trt/tests/made_driver.cpp), in processes of their own: memory, what is launched, what is left."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.cuda_library import library
from flashhead_edge.jetson.nvrtc import find_nvrtc

BEGIN = """
import ctypes, json, sys
from pathlib import Path
import numpy as np
from flashhead_edge.errors import FlashHeadError
from flashhead_edge.jetson import cuda_memory, cuda_session, driver
from flashhead_edge.jetson.cuda_memory import Fence, Mailbox, Range, fill, laid_out
from flashhead_edge.jetson.driver import Device, Memory, Pinned, Stream
made = ctypes.CDLL("libcuda.so.1")
made.made_notes.restype, made.made_left.restype = ctypes.c_char_p, ctypes.POINTER(ctypes.c_longlong)
made.made_cuda(99_000)
made.made_virtual(1)
left = lambda: made.made_left()[:8]  # contexts, memory, pinned memory, streams, graphs, reserved ranges, pieces in them, events
notes = lambda: made.made_notes().decode().split("; ")
def error(f, *arguments):
    try:
        f(*arguments)
    except FlashHeadError as e:
        return str(e)
"""


def python(code: str, *arguments: str, **environment: str) -> object:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code + "\nprint(json.dumps(said))", *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths} | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run(made_driver: Path):
    """Run code in a process whose driver is the made one: what `said` holds at its end."""
    return lambda code, *arguments: python(code, *arguments, LD_LIBRARY_PATH=str(made_driver))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernels of the small model: the compiler looks into the driver, so that it has to work where there is no made one."""
    from cuda_emulator import FACTS
    from cuda_truth import CHUNK, small_program

    from flashhead_edge.jetson import cuda_kernels, cuda_program

    try:
        library(), find_nvrtc()
    except EngineError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cache")
    program = small_program(folder / "program", "llama")
    head, limits = cuda_program.head_of(program), cuda_program.native.limits_of(FACTS)
    m = cuda_program.Model(program, head, FACTS, limits, cuda_program.memory_plan(program, head, limits, CHUNK, 0), CHUNK)
    plain = dataclasses.replace(m, fuses=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(cuda_kernels, "_held", {})
        assert cuda_kernels.ready(lambda: cuda_program.dry_pass(m), FACTS).compiled > 8
        cuda_kernels.ready(lambda: cuda_program.dry_pass(plain), FACTS)
        patch.setattr(cuda_kernels, "_held", {})
        again = cuda_kernels.ready(lambda: cuda_program.dry_pass(m), FACTS)
    assert again.compiled == 0 and again.kernels > 8
    return folder


@pytest.fixture
def opened(made_driver: Path, cache: Path, tmp_path: Path):
    """Run code over the made driver that may open `program`."""
    code = "from cuda_truth import CHUNK, small_program\nprogram = small_program(Path(sys.argv[1]) / 'p', 'llama')\n"
    return lambda rest: python(code + rest, str(tmp_path), LD_LIBRARY_PATH=str(made_driver), XDG_CACHE_HOME=str(cache))


def test_a_range_is_pieces_under_one_address(run) -> None:
    seen, whole, after, plain, nothing = run("""
with Device() as device:
    notes()
    held = Range(device, (1 << 20) + 5, piece=400_000)
    seen, whole = notes(), left()
    for _ in range(2):
        held.close()
    after = left()
    made.made_virtual(0)
    held = Range(device, 1000)
    plain = [notes()[-1], held.virtual, left()]
    held.close()
said = [seen, whole, after, plain, left()]
""")  # fmt: skip
    pieces = ["piece 393216", "piece 393216", "piece 327680"]  # whole units of 65,536 bytes
    assert seen == ["reserve 1114112", *pieces, "access to 1114112"]
    assert whole == [1, 3, 0, 0, 0, 1, 3, 0] and after == [1, 0, 0, 0, 0, 0, 0, 0]
    assert plain == ["alloc 1000", False, [1, 1, 0, 0, 0, 0, 0, 0]] and nothing == [0] * 8


@pytest.mark.parametrize(("function", "calls"), [("cuMemAddressReserve", 0), ("cuMemCreate", 0), ("cuMemCreate", 2), ("cuMemMap", 1), ("cuMemSetAccess", 0)])
def test_no_memory_in_the_middle_leaves_nothing(run, function: str, calls: int) -> None:
    said, left = run(f"""
with Device() as device:
    made.made_fail_after(b"{function}", 2, {calls})
    said = [error(Range, device, 1 << 20, 1 << 18)]
said.append(left())
""")
    assert said == f"GPU: {function} gives CUDA_ERROR_OUT_OF_MEMORY, expected success; free memory of the GPU, or use a smaller context or batch"
    assert left == [0] * 8


def test_a_file_arrives_whole_through_two_small_buffers(run, tmp_path: Path) -> None:
    equal, copies, left = run("""
path, rng = Path(sys.argv[1]) / "weights", np.random.default_rng(0)
data = rng.integers(0, 256, 100_000, np.uint8)
data.tofile(path)
places = {"a": (64, 40_000), "b": (40_064, 16), "c": (40_080, 59_920)}
with Device() as device:
    stream = Stream()
    at, size = laid_out({name: n for name, (_, n) in places.items()})
    held = Range(device, size)
    notes()
    fill(stream, {name: held.pointer + a for name, a in at.items()}, path, places, 16_384)
    copies = notes()
    here = np.frombuffer((ctypes.c_ubyte * size).from_address(held.pointer), np.uint8)
    equal = [bool((here[at[name] : at[name] + n] == data[start : start + n]).all()) and at[name] % 256 == 0 for name, (start, n) in places.items()]
    places["c"] = (40_080, 60_000)
    short = error(fill, stream, {name: held.pointer for name in places}, path, places, 16_384)
    held.close(), stream.close()
said = [[*equal, short.endswith("the file ends within c, expected 80 bytes more; restore the file")], copies, left()]
""", str(tmp_path))  # fmt: skip
    assert equal == [True] * 4 and left == [0] * 8
    assert copies == [f"in {n}" for n in (16_384, 16_384, 7_232, 16, 16_384, 16_384, 16_384, 10_768)]


def test_what_a_model_opens_it_closes(opened) -> None:
    open_, captured, closed, again = opened("""
m = cuda_session.open_model(program, chunk=CHUNK)
open_ = left()
tokens = [[mail.token.tolist() for mail in cuda_session.decode(m, [[1, 2, 3], [7]], 5)] for _ in range(3)]
captured = [left(), m.captures, tokens]
for _ in range(2):
    m.close()
closed = left()
m = cuda_session.open_model(program, chunk=CHUNK)
text = cuda_session.decode(m, [[5]], 100)
next(text)
m.close()
text.close()
said = [open_, captured, closed, left()]
""")
    assert open_ == [1, 1, 4, 1, 0, 1, 1, 0]
    left, captures, tokens = captured
    assert left == [1, 1, 4, 1, 1, 1, 1, 0] and captures == 1  # one graph, however many texts
    assert tokens == [[[1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]] * 3  # the made driver counts up from the token that was fed
    assert closed == again == [0] * 8


def test_whatever_fails_while_a_model_opens_nothing_is_left(opened) -> None:
    """The first, the second, ... call of each function that allocates, until none is left to fail."""
    said = opened("""
said = []
names = (
    b"cuMemAddressReserve", b"cuMemCreate", b"cuMemMap", b"cuMemSetAccess", b"cuMemHostAlloc", b"cuMemHostGetDevicePointer_v2",
    b"cuMemAllocHost_v2",
)
for function in names:
    for calls in range(10):
        made.made_fail_after(function, 2, calls)
        m = []
        why = error(lambda: m.append(cuda_session.open_model(program, chunk=CHUNK)))
        if why is None:
            m[0].close()
            break
        said.append([why.startswith("GPU: " + function.decode()), left()])
    made.made_fail(b"", 0)
    said.append(calls)
""")
    counts = [s for s in said if isinstance(s, int)]
    assert all(s == [True, [0] * 8] for s in said if not isinstance(s, int))
    assert counts == [1, 1, 1, 1, 1, 1, 5]  # so often each is called: two buffers of the copy, settings, prompts, results


def test_launches_of_a_step_are_the_programs(opened) -> None:
    """In a graph, each node's kernels in their order, then the head's and the end of the step; nothing is copied."""
    (fused, fused_nodes), (names, nodes) = opened("""
said = []
for fuses in (True, False):
    m = cuda_session.open_model(program, chunk=CHUNK, fuses=fuses)
    notes()
    graph = cuda_session.step_graph(m, 2, True)
    seen = notes()
    names = [note.split(" ")[0] for note in seen[seen.index("begin 1") + 1 :] if not note.startswith("attribute")]
    said.append([names, graph.nodes])
    m.close()
""")
    layer = ["w4a16_fused", "attention_rope_decode", "w4a16_fused", "w4a16_fused", "w4a16_fused"]
    want = ["embedding", *layer * 3, "rms_norm", "flashhead_step", "flashhead_draw_settings", "flashhead_decode", "flashhead_advance"]
    assert len(fused) == fused_nodes == len(want) and all(plain in name for name, plain in zip(fused, want))
    layer = [
        "rms_norm",
        "w4a16_decode",
        "attention_rope_write",
        "attention_decode",
        "w4a16_decode",
        "rms_norm",
        "w4a16_decode",
        "gated_product",
        "w4a16_decode",
    ]
    want = ["embedding", *layer * 3, "rms_norm", "flashhead_step", "flashhead_draw_settings", "flashhead_decode", "flashhead_advance"]
    assert len(names) == nodes == len(want)
    assert all(plain in name for name, plain in zip(names, want))


def test_a_step_that_fails_is_the_launchers_sentence(opened) -> None:
    said = opened("""
m = cuda_session.open_model(program, chunk=CHUNK)
made.made_fail_after(b"cuLaunchKernelEx", 2, 3)
said = [error(cuda_session.step_graph, m, 1, False)]
made.made_fail(b"cuStreamQuery", 700)
said.append(error(m.stream.done))
made.made_fail(b"", 0)
m.close()
said.append(left())
""")
    assert said[0].startswith("cuda backend: w4a16_fused could not be launched in") and "out of memory" in said[0]
    assert said[1].startswith("GPU: cuStreamQuery gives")
    assert said[2] == [0] * 8


def test_measurements_replay_steps_that_the_host_does_not_count_and_texts_go_on(opened) -> None:
    times, alone, tokens, rates, left = opened("""
from flashhead_edge.bench import cuda, decode
cuda.WARM_SECONDS, decode.ROUNDS = 0.01, 2
m = cuda_session.open_model(program, chunk=CHUNK)
times, alone = cuda.step_times(m, 1).tolist(), cuda.step_times(m, 2, only="RmsNorm", together=4).tolist()
tokens = [mail.token.tolist() for mail in cuda_session.decode(m, [[1, 2, 3], [7]], 3)]
rates = [cuda.texts_of(m, 2, 20)[0] > 0, len(decode.first_token_seconds(m, 10)) == 2]
m.close()
said = [times, alone, tokens, rates, left()]
""")
    assert times == alone == [10.0] * 7  # the made driver's millisecond between two events, for a hundred steps
    assert tokens == [[2, 2], [3, 3], [4, 4]] and rates == [True, True]  # up from the token 1 of the measurement
    assert left == [0] * 8
