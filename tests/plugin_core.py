"""The core of the TensorRT plugins from Python, over a made device (plugins_trt/tests/host_core.cpp): instances, their fields, what they take."""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np

from flashhead_edge.kernels.packing import Layout, words_of

ROOM = Path(__file__).parents[1] / "plugins_trt"
FP16, BF16, FP32, INT32 = range(4)
NUMBER = {"float16": FP16, "float32": FP32, "int32": INT32}


def cuda_headers():
    """The folder of CUDA's headers, or None."""
    nvcc = shutil.which("nvcc")
    places = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    if nvcc:
        found = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
        places += [Path(p) for p in re.findall(r'"-I([^"]+)"', found)]
    places += sorted(Path("/usr/local").glob("cuda*/include"))
    return next((p.resolve() for p in places if (p / "cuda_runtime_api.h").exists()), None)


def to_bytes(fields, version=3):
    """Fields as fields.h lays them out."""
    out = b""
    for name, value in fields.items():
        if isinstance(value, str):
            kind, count, data = 2, len(value.encode()), value.encode()
        elif isinstance(value, float):
            kind, count, data = 1, 1, struct.pack("<f", value)
        else:
            whole = np.atleast_1d(np.asarray(value, "<i4"))
            kind, count, data = 0, len(whole), whole.tobytes()
        out += struct.pack("<3I", kind, len(name), count) + name.encode() + data
    return struct.pack("<4I", 0x4C504846, version, 16 + len(out), len(fields)) + out


def shapes_of(inputs):
    types = (ctypes.c_int * len(inputs))(*(t for t, _ in inputs))
    ranks = (ctypes.c_int * len(inputs))(*(len(s) for _, s in inputs))
    flat = [d for _, s in inputs for d in s]
    return types, ranks, (ctypes.c_longlong * max(1, len(flat)))(*flat), len(inputs)


class Plugin:
    """One instance of a plugin's core."""

    def __init__(self, core, name, fields=None, handle=None):
        self.core, self.name = core, name
        self.handle = ctypes.c_void_p(handle if handle else core.core_make(name.encode()))
        self.wrong = self.read(to_bytes(fields)) if fields is not None else ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.core.core_destroy(self.handle)

    def read(self, data):
        return self.core.core_read(self.handle, data, ctypes.c_size_t(len(data))).decode(errors="replace")

    def write(self):
        size = self.core.core_write(self.handle, None, ctypes.c_size_t(0))
        room = ctypes.create_string_buffer(size)
        self.core.core_write(self.handle, room, ctypes.c_size_t(size))
        return room.raw

    def prepare(self):
        return self.core.core_prepare(self.handle).decode()

    def release(self):
        self.core.core_release(self.handle)

    def clone(self):
        return Plugin(self.core, self.name, handle=self.core.core_clone(self.handle))

    def fits(self, *inputs):
        return self.core.core_fits(self.handle, *shapes_of(inputs)).decode()

    def shapes(self, *inputs):
        return [self.core.core_shape(self.handle, i, *shapes_of(inputs)).decode() for i in range(self.core.core_outputs(self.handle))]

    def run(self, inputs, arrays, in_place=()):
        """Run on these arrays; outputs, what was launched. Scratch memory and outputs end in a guard, and scratch begins with rubbish."""
        shapes = shapes_of(inputs)
        outputs = []
        for i, said in enumerate(self.shapes(*inputs)):
            kind, shape = said.split(" ", 1)
            dtype = {FP16: np.uint16, FP32: np.float32, INT32: np.int32}[NUMBER[kind]]
            outputs.append(arrays[in_place[i]] if in_place and in_place[i] is not None else np.zeros(int(np.prod(json.loads(shape))) + 4, dtype))
        scratch = np.full(self.core.core_scratch(self.handle, *shapes) + 16, 0xA5, np.uint8)
        pointers = [(ctypes.c_void_p * len(side))(*(a.ctypes.data for a in side)) for side in (arrays, outputs)]
        wrong = self.core.core_run(self.handle, *shapes, *pointers, ctypes.c_void_p(scratch.ctypes.data)).decode()
        assert (scratch[-16:] == 0xA5).all(), "written behind the scratch memory"
        for i, out in enumerate(outputs):
            if not (in_place and in_place[i] is not None):
                assert not out[-4:].any(), f"written behind output {i}"
        return wrong, outputs, self.core.core_notes().decode()


def norm_fields(weights, d=64, byte=3, **more):
    source, places = weights({"norm": bytes([byte]) * (2 * d)})
    return {"weight": places["norm"], "d": d, "epsilon": 1e-5} | source | more


X = (FP16, (2, 3, 64))


def attention_fields(weights, **more):
    source, places = weights({"rotations": bytes(32 * 64 * 4), "q": bytes(128), "k": bytes(128)})
    fields = {"q_heads": 4, "kv_heads": 2, "head_size": 64, "max_length": 32, "scale": 0.125, "rotations": places["rotations"]}
    return fields | {"q_norm": places["q"], "k_norm": places["k"]} | source | more


def attention_inputs(batch, queries, kv_heads=2, length=32, q_heads=4):
    cache = (batch, kv_heads, length, 64)
    return (FP16, (batch, queries, (q_heads + 2 * kv_heads) * 64)), (FP16, cache), (FP16, cache), (INT32, (batch,))


def head_fields(weights, core, rows=3, **more):
    layout = Layout(vocab_size=80, hidden_size=64, candidates=16, stages=1, row_bytes=512, multiprocessors=132, shared_bytes=200_000, image_bytes=256)
    source, places = weights({"rows": bytes(2 * 80 * 64), "image": bytes(256)})
    words = words_of(layout)
    assert len(words) == core.core_plan_words()
    fields = {"rows": places["rows"], "image": places["image"], "bias": "", "vocab": 80, "hidden": 64, "candidates": 16, "stages": 1}
    return fields | {"plans": words * rows, "plan_words": len(words), "max_rows": rows} | source | more


def arrays_of(inputs):
    kinds = {FP16: np.uint16, FP32: np.float32, INT32: np.int32}
    return [np.zeros(int(np.prod(shape)) or 1, kinds[kind]) for kind, shape in inputs]
