"""The core of the TensorRT plugins without TensorRT and without a GPU: fields, files of weights, who shares them, the build."""

import ctypes
import random
import shutil
import struct
import subprocess
import threading

import numpy as np
import pytest
from plugin_core import INT32, ROOM, Plugin, X, norm_fields, to_bytes

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
        ({"format": 1}, "the engine holds this plugin in format 1, this library reads 3; build the engine again with this library, or load"),
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
    fields = norm_fields(weights) | {"plugin_version": "1", "plugin_namespace": "flashhead", "offset": 1, "format": 3}
    with Plugin(core, "RmsNorm", fields) as plugin:
        assert plugin.wrong == ""


def test_damaged_bytes_of_an_engine_are_a_sentence(core, weights):
    whole = to_bytes(norm_fields(weights))
    with Plugin(core, "RmsNorm") as plugin:
        for size in range(len(whole)):
            wrong = plugin.read(whole[:size])
            assert ("are no plugin of ours" if size < 16 else f"the engine holds {size} bytes of this plugin, expected {len(whole)}") in wrong
        assert "in format 1, this library reads 3" in plugin.read(to_bytes(norm_fields(weights), version=1))
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
