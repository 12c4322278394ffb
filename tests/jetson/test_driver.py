"""The driver's layer over a made driver (plugins_trt/tests/made_driver.cpp), in a process of its own; on a real one see tests/gpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge.jetson.driver import driver_version

BEGIN = """
import ctypes, json
import numpy as np
from flashhead_edge.errors import DeviceError
from flashhead_edge.jetson import driver
from flashhead_edge.jetson.driver import Device, Memory, Pinned, Stream, device_facts
made = ctypes.CDLL("libcuda.so.1")
made.made_notes.restype, made.made_left.restype = ctypes.c_char_p, ctypes.POINTER(ctypes.c_longlong)
left = lambda: made.made_left()[:5]  # contexts, memory, pinned memory, streams, graphs
notes = lambda: made.made_notes().decode()
def error(f, *arguments):
    try:
        f(*arguments)
    except DeviceError as e:
        return str(e)
"""


@pytest.fixture
def run(made_driver: Path):
    """Run code in a process whose driver is the made one: what `said` holds at its end."""

    def run(code: str):
        environment = os.environ | {"LD_LIBRARY_PATH": str(made_driver)}
        done = subprocess.run([sys.executable, "-c", BEGIN + code + "\nprint(json.dumps(said))"], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_facts_are_the_drivers(run) -> None:
    facts, missing, left = run("from dataclasses import asdict; said = [asdict(device_facts()), error(device_facts, 1), left()]")
    version = facts.pop("driver_version")
    assert version is None or version == driver_version()
    assert facts == {
        "name": "Made Orin", "capability": 87, "multiprocessors": 16, "shared_bytes": 163 << 10, "total_bytes": 8_000_000_000, "free_bytes": 6_000_000_000,
        "cuda_version": "12.6",
    }  # fmt: skip
    assert missing == "GPU 1: the driver sees 1, expected one of that number; choose another, or look at CUDA_VISIBLE_DEVICES"
    assert left == [0, 0, 0, 0, 0]


def test_a_driver_without_a_gpu_is_a_sentence(run) -> None:
    (said,) = run("made.made_fail(b'cuInit', 100); said = [error(device_facts)]")
    assert said.startswith("GPU: the driver does not start (CUDA_ERROR_NO_DEVICE), expected a GPU that it knows")


def test_bytes_go_there_and_back(run) -> None:
    equal, zero, interface, pointer, left = run("""
with Device():
    here, there, stream, values = Pinned(64), Memory(64), Stream(), np.arange(16, dtype=np.int32)
    zero = bool((here.array == 0).all())
    here.array[:] = values.view(np.uint8)
    stream.to_device(there.pointer, here.pointer, 64)
    stream.on_device(there.pointer, there.pointer + 32, 16)
    stream.fill(there.pointer + 48, 16, 255)
    here.array[:] = 0
    stream.to_host(here.pointer, there.pointer, 64)
    stream.wait()
    values[:4], values[12:] = values[8:12], -1
    equal, interface, pointer = bool((here.array.view(np.int32) == values).all()), there.__cuda_array_interface__, there.pointer
    for held in (here, there, stream, here, there, stream):  # closing twice is harmless
        held.close()
said = [equal, zero, interface, pointer, left()]
""")
    assert equal and zero and left == [0, 0, 0, 0, 0]
    assert interface == {"shape": [64], "typestr": "|u1", "data": [pointer, False], "version": 3}


def test_what_nobody_holds_is_freed(run) -> None:
    held, left = run("""
with Device():
    for _ in range(5):
        here, there, stream = Pinned(8), Memory(8), Stream()
        with stream.captured() as graph:
            stream.to_device(there.pointer, here.pointer, 8)
    held = left()
    del here, there, stream, graph
said = [held, left()]
""")
    assert held == [1, 1, 1, 1, 1] and left == [0, 0, 0, 0, 0]


def test_a_stream_of_somebody_else_is_left_alone(run) -> None:
    seen, left = run("""
with Device(), Stream().captured() as graph:
    pass
theirs = Stream(4711)
graph.launch(theirs)
theirs.close()
seen = notes()
del graph
said = [seen, left()]
""")
    assert seen.endswith("graph in 4711") and left == [0, 0, 0, 0, 0]


def test_a_driver_without_a_function_is_a_sentence(run) -> None:
    (said,) = run("said = [error(driver.call, 'cuOfTomorrow')]")
    assert said == "GPU: the driver has no cuOfTomorrow, expected one for CUDA 12 or newer; install a newer driver"


def test_no_memory_is_a_sentence_that_says_what_helps(run) -> None:
    said, left, beside = run("""
import sys
beside = []
sys.unraisablehook = lambda found: beside.append(str(found.exc_value))  # what a half-made object's end would put on stderr
with Device():
    made.made_fail(b"cuMemAlloc_v2", 2)
    said = [error(Memory, 1 << 40)]
said += [left(), beside]
""")
    assert said == "GPU: cuMemAlloc_v2 gives CUDA_ERROR_OUT_OF_MEMORY, expected success; free memory of the GPU, or use a smaller context or batch"
    assert left == [0, 0, 0, 0, 0] and beside == []


def test_a_capture_is_thread_local_and_whole(run) -> None:
    """Work inside is not done, nodes are counted; a capture that fails, by an error inside or by the driver, leaves no graph."""
    seen, nodes, untouched, spoilt, inside, instantiate, left = run("""
with Device():
    there, stream = Memory(8), Stream()
    here = Pinned(8)
    notes()
    with stream.captured() as graph:
        stream.fill(there.pointer, 8, 7)
        stream.to_host(here.pointer, there.pointer, 8)
    seen, nodes, untouched = notes(), graph.nodes, int(here.array.sum())
    def capture(stop=None):
        with stream.captured():
            if stop:
                raise DeviceError(stop)
    made.made_fail(b"cuStreamEndCapture", 901)
    spoilt = error(capture)
    made.made_fail(b"", 0)
    inside = error(capture, "refused inside")
    made.made_fail(b"cuGraphInstantiateWithFlags", 2)
    instantiate = error(capture)
    graph.close()
    for held in (here, there, stream):
        held.close()
said = [seen, nodes, untouched, spoilt, inside, instantiate, left()]
""")
    assert seen == "begin 1; set 8 to 7; out 8" and nodes == 2 and untouched == 0
    assert spoilt.startswith("GPU: a capture was spoilt by work that a graph cannot hold")
    assert inside == "refused inside" and "cuGraphInstantiateWithFlags gives CUDA_ERROR_OUT_OF_MEMORY" in instantiate
    assert left == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Sun Nov  1 2026\nGCC version:  gcc version 12.2.0 (Debian)\n", "580.159.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)  Tue Jan  7 2025\n", "540.4.0"),
        ("NVRM version: NVIDIA UNIX Kernel Module  580.159  Sun\n", "580.159"),
        ("nothing of it", None),
    ],
)
def test_the_drivers_version_is_read(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") is None
