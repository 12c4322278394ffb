"""The core of the TensorRT plugins as a library, and weights for it."""

import ctypes
import json
import shutil
import struct
import subprocess

import pytest
from plugin_core import ROOM, cuda_headers


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
