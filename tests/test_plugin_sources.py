"""The core of the TensorRT plugins without TensorRT and without a GPU: a made device stands below it (plugins_trt/tests/host_core.cpp)."""

import ctypes
import functools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    """The core as a library, compiled by g++ alone."""
    headers = cuda_headers()
    if shutil.which("g++") is None or headers is None:
        pytest.skip("needs g++ and CUDA's headers (cuda_runtime_api.h beside nvcc, in CUDA_HOME or in /usr/local/cuda)")
    target = tmp_path_factory.mktemp("core") / "libcore.so"
    sources = sorted(p for p in (ROOM / "plugins").glob("*.cpp") if not p.name.startswith(("shell", "library")))
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-D_GLIBCXX_ASSERTIONS", "-shared", "-fPIC", "-pthread"]
    includes = [f"-I{ROOM / 'kernels'}", f"-I{ROOM / 'plugins'}", "-isystem", str(headers)]
    command = ["g++", *flags, *includes, *map(str, sources), str(ROOM / "tests" / "host_core.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(target))
    for name in ("notes", "add_folder", "read", "prepare", "fits", "shape", "run"):
        getattr(library, f"core_{name}").restype = ctypes.c_char_p
    for name in ("make", "clone"):
        getattr(library, f"core_{name}").restype = ctypes.c_void_p
    for name in ("write", "scratch"):
        getattr(library, f"core_{name}").restype = ctypes.c_size_t
    for name in ("blocks", "device_bytes"):
        getattr(library, f"core_{name}").restype = ctypes.c_longlong
    return library


@pytest.fixture(autouse=True)
def clean(request):
    """Each test begins with device 0, an H100, and leaves nothing on it."""
    if "core" not in request.fixturenames:
        yield
        return
    library = request.getfixturevalue("core")
    library.core_device(0, 132, 232448, 9)
    library.core_memory(ctypes.c_longlong(1 << 40))
    library.core_notes()
    yield
    assert library.core_device_bytes() == 0
    assert library.core_blocks() == 0


def to_bytes(fields, version=2):
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


@pytest.fixture
def weights(tmp_path):
    """A file of weights of named tensors in `tmp_path`: the fields that find it, and each tensor's place."""

    def write(tensors, folder=tmp_path, pad=0):
        header, at = {}, 0
        for name, data in tensors.items():
            header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header).encode() + b" " * pad
        head = struct.pack("<Q", len(text)) + text
        value = 0xCBF29CE484222325
        for byte in head:
            value = (value ^ byte) * 0x100000001B3 % 2**64
        folder.mkdir(exist_ok=True)
        (folder / "weights.safetensors").write_bytes(head + b"".join(tensors.values()))
        places = {n: f"{len(head) + header[n]['data_offsets'][0]} {len(d)}" for n, d in tensors.items()}
        return {"file": "weights.safetensors", "folder": str(folder), "fingerprint": f"{value:016x}"}, places

    return write


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


# Fields and their bytes


def test_fields_come_back_as_they_were_given(core, weights):
    fields = norm_fields(weights, bf16=1, offset=1.0)
    with Plugin(core, "RmsNorm", fields) as first, Plugin(core, "RmsNorm") as second:
        assert first.wrong == ""
        assert second.read(first.write()) == ""
        assert first.write() == second.write()
        assert fields["fingerprint"].encode() in first.write()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": None}, "field weight is missing; see docs/tensorrt.md for the fields"),
        ({"colour": 1}, "there is no field colour; see docs/tensorrt.md for the fields"),
        ({"d": 64.0}, "field d holds real numbers, expected whole numbers; see docs/tensorrt.md for the fields"),
        ({"d": [64, 64]}, "field d holds 2 values, expected one; see docs/tensorrt.md for the fields"),
        ({"d": 60}, "d is 60, expected a multiple of 8 up to 16384; use TensorRT's own norm for this model"),
        ({"format": 1}, "the engine holds this plugin in format 1, this library reads 2; build the engine again with this library, or load"),
        ({"weight": "12"}, 'field weight is "12", expected where a tensor lies as "offset bytes", or nothing; export the model again'),
        ({"weight": "0 126"}, "field weight names a tensor of 126 bytes, expected 128; export the model again"),
        ({"weight": "99999999999999999999999 128"}, "expected where a tensor lies"),
        ({"fingerprint": "12"}, 'field fingerprint is "12", expected 16 hexadecimal digits; export again'),
        ({"file": "../weights"}, 'field file is "../weights", expected a file\'s name; the folder is apart'),
        ({"residual": 2}, "residual is 2, expected 0 or 1; see docs/tensorrt.md for the fields"),
    ],
)  # fmt: skip
def test_wrong_fields_are_a_sentence(change, said, core, weights):
    fields = {n: v for n, v in (norm_fields(weights) | change).items() if v is not None}
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert said in plugin.wrong


def test_what_onnx_adds_and_whole_numbers_for_real_ones_are_taken(core, weights):
    fields = norm_fields(weights) | {"plugin_version": "1", "plugin_namespace": "flashhead", "offset": 1, "format": 2}
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert plugin.wrong == ""


def test_damaged_bytes_of_an_engine_are_a_sentence(core, weights):
    whole = to_bytes(norm_fields(weights))
    with Plugin(core, "RmsNorm") as plugin:
        for size in range(len(whole)):
            wrong = plugin.read(whole[:size])
            assert ("are no plugin of ours" if size < 16 else f"the engine holds {size} bytes of this plugin, expected {len(whole)}") in wrong
        assert "in format 1, this library reads 2" in plugin.read(to_bytes(norm_fields(weights), version=1))
        assert "1 bytes follow the plugin's last field" in plugin.read(whole[:8] + struct.pack("<I", len(whole) + 1) + whole[12:] + b"\0")
        generator = random.Random(1)
        for _ in range(2000):  # any other damage is a sentence or a harmless other value, never a crash or a huge allocation
            damaged = bytearray(whole)
            damaged[generator.randrange(16, len(whole))] = generator.randrange(256)
            plugin.read(bytes(damaged))


# The file of weights


def test_weights_reach_the_device_once_and_leave_with_the_last_who_holds_them(core, weights):
    source, places = weights({"rows": bytes(range(256)) * 40, "other": bytes(64)})
    fields = {"rows": places["rows"], "vocab": 80, "d": 64} | source
    first, second = Plugin(core, "TokenEmbedding", fields), Plugin(core, "TokenEmbedding", fields)
    assert (first.wrong, first.prepare(), second.prepare()) == ("", "", "")
    assert core.core_device_bytes() == 10_240
    twin = first.clone()
    core.core_destroy(first.handle)
    second.release()
    assert core.core_device_bytes() == 10_240
    wrong, _, launched = twin.run([(INT32, (1, 3))], [np.zeros(3, np.int32)])
    assert (wrong, launched) == ("", "embedding 3 of [80, 64] times 1, first byte 0")
    core.core_device(1, 132, 232448, 9)
    assert second.prepare() == ""
    assert core.core_device_bytes() == 20_480
    for plugin in (second, twin):
        core.core_destroy(plugin.handle)


def test_building_puts_no_weights_on_the_device(core, weights):
    with Plugin(core, "RmsNorm", norm_fields(weights)) as plugin, plugin.clone() as twin:
        assert twin.fits(X) == ""
        assert core.core_blocks() == 0
        wrong, *_ = twin.run([X], [np.zeros(384, np.uint16)])
        assert wrong == "it is run before it was made ready; create an execution context of the engine first"


def test_a_missing_file_is_named_with_what_was_looked_for(core, weights, tmp_path):
    fields = norm_fields(weights)
    (tmp_path / "weights.safetensors").rename(tmp_path / "moved")
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert plugin.prepare() == (
            f"the weights of this engine, weights.safetensors of fingerprint {fields['fingerprint']}, exported to {tmp_path}, were not found: "
            f"{tmp_path}/weights.safetensors cannot be opened (No such file or directory); call flashhead_add_folder with their folder, or export again"
        )
        (tmp_path / "moved").rename(tmp_path / "weights.safetensors")
        assert plugin.prepare() == ""


def test_a_foreign_file_is_named_with_both_fingerprints(core, weights, tmp_path):
    fields = norm_fields(weights)
    other = norm_fields(weights, d=128)
    with Plugin(core, "RmsNorm", fields) as plugin:
        wrong = plugin.prepare()
    assert f"of fingerprint {fields['fingerprint']}, exported to {tmp_path}" in wrong
    assert f"{tmp_path}/weights.safetensors has {other['fingerprint']}" in wrong


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "has 0 bytes"), (b"\xff" * 40, "is no whole safetensors file"), (b"\x20" + bytes(20), "is no whole safetensors file")]
)
def test_a_file_that_is_no_safetensors_file(content, said, core, weights, tmp_path):
    fields = norm_fields(weights)
    (tmp_path / "weights.safetensors").write_bytes(content)
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert f"{tmp_path}/weights.safetensors {said}" in plugin.prepare()


def test_a_truncated_file_says_how_long_it_should_be(core, weights, tmp_path):
    fields = norm_fields(weights)
    path = tmp_path / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert plugin.prepare() == f"{path} has {len(whole) - 1} bytes, expected {len(whole)} or more; copy the file again"


def test_the_folder_that_was_added_last_is_searched_first(core, weights, tmp_path):
    def fields_in(folder, byte):
        source, places = weights({"rows": bytes([byte]) * 128}, folder)
        return {"rows": places["rows"], "vocab": 1, "d": 64} | source

    fields = fields_in(tmp_path / "stored", 1)
    for name, byte in (("older", 2), ("newer", 3)):
        fields_in(tmp_path / name, byte)  # the same header, so the same fingerprint: only the place tells them apart
        assert core.core_add_folder(str(tmp_path / name).encode()).decode() == ""
    weights({"rows": bytes(128)}, tmp_path / "foreign", pad=1)
    assert core.core_add_folder(str(tmp_path / "foreign").encode()).decode() == ""
    with Plugin(core, "TokenEmbedding", fields) as plugin:
        assert plugin.prepare() == ""
        assert plugin.run([(INT32, (1,))], [np.zeros(1, np.int32)])[2].endswith("first byte 3")
    said = core.core_add_folder(str(tmp_path / "nowhere").encode()).decode()
    assert said == f"folder {tmp_path / 'nowhere'} cannot be read (No such file or directory); give the folder that holds the engine and its weights"
    assert "is no folder" in core.core_add_folder(str(tmp_path / "older" / "weights.safetensors").encode()).decode()
    shutil.rmtree(tmp_path / "newer")
    with Plugin(core, "TokenEmbedding", fields) as plugin:
        assert plugin.prepare() == ""
        assert plugin.run([(INT32, (1,))], [np.zeros(1, np.int32)])[2].endswith("first byte 2")


def test_a_full_device_says_what_was_asked_for_and_keeps_nothing(core, weights):
    with Plugin(core, "RmsNorm", norm_fields(weights)) as plugin:
        core.core_memory(ctypes.c_longlong(100))
        assert plugin.prepare() == (
            '128 bytes of device memory for weights, of 100 that are free: CUDA says "out of memory", expected success; look that a GPU is there and has room'
        )
        assert core.core_device_bytes() == 0
        core.core_memory(ctypes.c_longlong(1 << 40))
        assert plugin.prepare() == ""


def test_no_device_and_too_old_a_device_are_sentences(core, weights):
    with Plugin(core, "RmsNorm", norm_fields(weights)) as plugin:
        core.core_device(-1, 0, 0, 0)
        assert plugin.prepare().startswith("the GPU's facts: CUDA says")
        core.core_device(7, 68, 65536, 7)
        assert plugin.prepare() == "the GPU has capability 7.0, expected 8.0 or more; use another backend on this device"


def test_launches_overlap_from_capability_9_on(core, weights):
    for device, capability, said in ((0, 9, "rms_norm [6, 64]"), (8, 8, "rms_norm [6, 64], alone")):
        core.core_device(device, 16, 232448, capability)
        with Plugin(core, "RmsNorm", norm_fields(weights)) as plugin:
            assert plugin.prepare() == ""
            assert plugin.run([X], [np.zeros(384, np.uint16)])[2] == said


def test_many_threads_share_one_copy(core, weights):
    fields = norm_fields(weights, d=4096)
    wrong, most = [], []

    def work():
        for _ in range(30):
            with Plugin(core, "RmsNorm", fields) as plugin:
                wrong.append(plugin.prepare())
                most.append(core.core_device_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(wrong) == {""}
    assert max(most) <= 4 * 8192  # the last of one copy may go while the next is made


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


# The build


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("cmake") is None, reason="needs nvcc and cmake")
def test_without_headers_the_build_says_so(tmp_path):
    configure = ["cmake", "-S", str(ROOM), "-B", str(tmp_path), "-DTENSORRT_INCLUDE=/nowhere"]
    subprocess.run(configure, check=True, capture_output=True, timeout=300)
    result = subprocess.run(["cmake", "--build", str(tmp_path), "--target", "plugin"], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "flashhead plugins: NvInferRuntime.h was not found, expected it where the system keeps headers or in TENSORRT_INCLUDE (/nowhere)" in result.stdout


def test_the_core_knows_no_tensorrt():
    for path in (ROOM / "plugins").iterdir():
        if not path.name.startswith(("shell", "library")):
            assert "NvInfer" not in path.read_text(), path.name
