"""A folder for TensorRT: what is said of one that is damaged, moved, of another machine, or on a machine without a GPU."""

import dataclasses
import hashlib
import json
import shutil
import struct
import subprocess
from types import SimpleNamespace

import pytest

from flashhead_edge.errors import CheckpointError, DeviceError, EngineError
from flashhead_edge.jetson import plugins
from flashhead_edge.jetson.driver import DeviceFacts, device_facts
from flashhead_edge.jetson.tensorrt_folder import check_files, check_machine, header_fingerprint, is_tensorrt, read_manifest

ORIN = DeviceFacts("Orin", 87, 8, 163 << 10, 8 << 30, 6 << 30, "540.4.0", "12.6")
LIBRARY = "ab" * 32


@pytest.fixture
def folder(tmp_path):
    """A whole folder whose engines are a few bytes: everything is looked at before TensorRT sees one."""
    header = json.dumps({"__metadata__": {"flashhead.format": "1"}, "embedding": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]}}).encode()
    data = bytes(range(64))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(struct.pack("<Q", len(header)) + header + data)
    (tmp_path / "config.json").write_text("{}")
    engines = {}
    for part in ("decoder", "head", "head_logits"):
        content = part.encode() * 20
        (tmp_path / f"{part}.engine").write_bytes(content)
        engines[part] = {"file": f"{part}.engine", "bytes": len(content), "seconds": 0.1, "sha256": hashlib.sha256(content).hexdigest()}
    document = {
        "format": 1, "fingerprint": "sha256:0", "weights_fingerprint": header_fingerprint(weights), "weights_bytes": weights.stat().st_size,
        "weights_sha256": hashlib.sha256(data).hexdigest(), "layers": "plugin", "precision": "float16", "tensorrt": "8.6.0", "gpu": "Orin", "capability": 87,
        "multiprocessors": 8, "plugin_library": "libflashhead_plugins_trt8.so", "plugin_sha256": LIBRARY, "max_batch": 2, "chunk": 16, "context": 64,
        "settings": {
            "vocab_size": 4, "hidden_size": 8, "stages": 1, "scale": 1.0, "softcap": None, "context_length": 64, "embedding_rows": 4, "fixed_bytes": 1,
            "item_bytes": [1, 2], "body_parameters": 5, "layers": 1, "kv_heads": 1, "head_size": 64, "q_heads": 1,
        },
        "engines": engines, "flashhead_config_fingerprint": hashlib.sha256(b"{}").hexdigest(),
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    return tmp_path


def changed(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_is_inspected_and_its_models_are_not(folder, flashhead):
    code, out, _ = flashhead("inspect", folder, "--json")
    assert code == 0 and json.loads(out)["layers"] == "plugin"
    code, out, err = flashhead("inspect", folder / "decoder.onnx")
    assert (code, out) == (2, "") and f"inspect {folder}" in err


def test_a_whole_folder_passes(folder):
    m = read_manifest(folder)
    assert is_tensorrt(folder) and m.settings.context_length == 64 and m.settings.item_bytes == (1, 2)
    check_files(m, contents=True)
    check_machine(m, ORIN, "8.6.0", LIBRARY)


def test_the_fingerprint_is_that_of_the_definition(folder):
    data = (folder / "weights.safetensors").read_bytes()[:-64]
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    assert header_fingerprint(folder / "weights.safetensors") == f"{value:016x}"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_header(path):
    path.write_bytes(path.read_bytes().replace(b"embedding", b"embeddinG"))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("decoder.engine", cut, "decoder.engine: the file has 139 bytes, expected 140: it is cut off"),
        ("decoder.engine", flip, "decoder.engine: the engine's bytes changed since it was built"),
        ("head.engine", lambda path: path.unlink(), "head.engine: the file is missing"),
        ("weights.safetensors", cut, "weights.safetensors: the file has"),
        ("weights.safetensors", other_header, "another model's"),
        ("weights.safetensors", flip, "the weights' bytes changed since they were written"),
        ("weights.safetensors", lambda path: path.unlink(), "weights.safetensors: the file is missing"),
        ("config.json", lambda path: path.write_text("{ }"), "config.json: the file is not the one that was exported"),
    ],
)
def test_a_changed_file_is_named(folder, file, change, words):
    change(folder / file)
    with pytest.raises(CheckpointError, match=words):
        check_files(read_manifest(folder), contents=True)


@pytest.mark.parametrize(
    ("facts", "tensorrt", "library", "words"),
    [
        ({}, "10.3.0", LIBRARY, r"built with TensorRT 8\.6\.0, found 10\.3\.0"),
        ({"name": "Thor", "capability": 110}, "8.6.0", LIBRARY, "built for the GPU Orin, found Thor"),
        ({"capability": 90}, "8.6.0", LIBRARY, "built for capability 87, found 90"),
        ({"multiprocessors": 4}, "8.6.0", LIBRARY, "planned for 8 multiprocessors, found 4"),
        ({}, "8.6.0", "cd" * 32, r"built with another build of libflashhead_plugins_trt8\.so"),
    ],
)
def test_another_machine_is_named(folder, facts, tensorrt, library, words):
    with pytest.raises(EngineError, match=words):
        check_machine(read_manifest(folder), dataclasses.replace(ORIN, **facts), tensorrt, library)


def test_a_folder_without_engines_says_how_to_build_them(folder):
    changed(folder, tensorrt=None, engines={})
    with pytest.raises(EngineError, match="holds models without engines, expected built ones; build its engines"):
        check_machine(read_manifest(folder), ORIN, "8.6.0", LIBRARY)
    with pytest.raises(CheckpointError, match="engines for decoder, head, head_logits are missing"):
        check_files(read_manifest(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "the file cannot be read"),
        ("[]", "the manifest has format list, expected 1"),
        ('{"format": 2}', "the manifest has format 2, expected 1"),
        ('{"format": 1}', "does not have the expected form"),
    ],
)
def test_a_damaged_manifest_is_named(folder, text, words):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(folder)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_without_a_gpu_a_sentence_comes_before_tensorrt_is_touched(folder, flashhead):
    with pytest.raises(DeviceError, match="expected NVIDIA's driver; run this on a machine with an NVIDIA GPU|expected a GPU that it knows"):
        device_facts()
    code, out, err = flashhead("generate", folder, "--prompt", "x")
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("flashhead: GPU")


def test_a_library_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(EngineError, match=r"no\.so: the plugin library is not there"):
        plugins.find_library(8, tmp_path / "no.so")
    from flashhead_edge.jetson.onnxruntime_sessions import native_library

    foreign = native_library()
    if foreign is None:
        pytest.skip("this installation has no shared library to be taken for ours")
    with pytest.raises(EngineError, match="the library is not ours"):
        plugins.version(foreign)


def test_a_missing_library_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EngineError, match=r"libflashhead_plugins_trt99\.so: no plugin library was found .* flashhead plugin build --tensorrt-include DIR"):
        plugins.find_library(99)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_for_another_gpu_is_refused_when_it_is_looked_up(tmp_path, monkeypatch):
    source = tmp_path / "made.c"
    text = 'const char* flashhead_plugin_version(void) { return "0.1.0 tensorrt 8.6.1"; }\n'
    for number, (capabilities, fits, not_) in enumerate(((None, (), (90,)), ("87", (87,), (80, 86, 89, 90)), ("80 86 90", (80, 86, 89, 90), (87, 100)))):
        source.write_text(text + (f'const char* flashhead_plugin_capabilities(void) {{ return "{capabilities}"; }}\n' if capabilities else ""))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))  # a process loads a path once
        place = plugins.cache_folder() / "libflashhead_plugins_trt8.so"
        place.parent.mkdir(parents=True)
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", place], check=True)
        assert plugins.find_library(8) == place
        for capability in fits:
            assert plugins.find_library(8, None, capability) == place
        said = (
            f"has kernels for capability {', '.join(capabilities.split())}, found a GPU of"
            if capabilities
            else "of an older version, which does not say its GPUs"
        )
        for capability in not_:
            with pytest.raises(EngineError, match=rf"trt8\.so: the plugin library.*{said}.* flashhead plugin build"):
                plugins.find_library(8, None, capability)
            with pytest.raises(EngineError, match=said):
                plugins.find_library(8, place, capability)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_second_library_in_a_process_is_refused(tmp_path, monkeypatch):
    """TensorRT would keep the first one's plugins, which look for weights in other folders, without a word."""
    source = tmp_path / "made.c"
    source.write_text('const char* flashhead_plugin_version(void) { return "0.1.0 tensorrt 8.6.1"; }\n')
    first, second = tmp_path / "first.so", tmp_path / "second.so"
    for path in (first, second):
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", path], check=True)
    creators = []

    def load(path):
        creators.append(SimpleNamespace(name="FlashHead", plugin_namespace="flashhead"))
        return object()

    registry = SimpleNamespace(plugin_creator_list=creators, load_library=load)
    trt = SimpleNamespace(__name__="made", __version__="8.6.0", get_plugin_registry=lambda: registry)
    monkeypatch.setattr(plugins, "_loaded", {})
    plugins.load_library(trt, first)
    plugins.load_library(trt, first)
    with pytest.raises(EngineError, match=r"second\.so: this process has loaded another plugin library \(.*first\.so\), expected one library a process"):
        plugins.load_library(trt, second)
    assert len(creators) == 1
    with pytest.raises(EngineError, match=r"was made for TensorRT 8, found TensorRT 10\.3\.0, expected equal majors"):
        plugins.load_library(SimpleNamespace(__version__="10.3.0"), first)
