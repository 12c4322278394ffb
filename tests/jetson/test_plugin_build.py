"""The plugin library that g++ and NVRTC make: launchers over a made driver (plugins_trt/tests/made_driver.cpp), and what is said where tools are missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.jetson import nvrtc, plugin_build, plugins

ROOM = Path(__file__).parents[2] / "plugins_trt"


def tools() -> str | None:
    """What is missing to build a library here."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "g++ and binutils are not installed"
    try:
        plugin_build.cuda_headers()
        nvrtc.find_nvrtc()
    except EngineError as error:
        return str(error)
    return None


can_build = pytest.mark.skipif(tools() is not None, reason=str(tools()))
has_driver = shutil.which("nvidia-smi") is not None

CALLS = """
import ctypes, json, sys, threading
library, driver = ctypes.CDLL(sys.argv[1]), ctypes.CDLL("libcuda.so.1") if sys.argv[2] == "made" else None
P, I, F, Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_size_t
class Device(ctypes.Structure):
    _fields_ = [(name, I) for name in ("capability", "multiprocessors", "shared_bytes", "overlap")]
class Shape(ctypes.Structure):
    _fields_ = [(n, I) for n in ("batch", "queries", "q_heads", "kv_heads", "head_size", "max_length", "window")] + [("scale", F), ("dtype", I)]
class Plan(ctypes.Structure):
    _fields_ = [(n, I) for n in ("splits", "cluster", "rows", "row_blocks", "threads")] + [("workspace_bytes", Z), ("items", I)]
for name in ("fh_embedding", "fh_attention_make_plan", "fh_attention_decode", "fh_head_step", "cudaGetErrorString"):
    getattr(library, name).restype = ctypes.c_char_p
said = []
if driver:
    driver.made_notes.restype = ctypes.c_char_p

def note(result):
    notes = driver.made_notes().decode() if driver else ""
    said.append([result.decode() if isinstance(result, bytes) else result, notes])

def embedding(dtype, overlap=1, d=64):
    device = Device(90, 132, 232448, overlap)
    return library.fh_embedding(P(4321), P(2), F(1.0), P(3), I(3), I(10), I(d), I(dtype), ctypes.byref(device), P(77))

note(embedding(0))
if driver:
    note(embedding(0, 0))
    note(embedding(1))
    thread = threading.Thread(target=lambda: note(embedding(0)))
    thread.start(), thread.join()
    driver.made_context(ctypes.c_ulonglong(5))
    note(embedding(0))
    driver.made_context(ctypes.c_ulonglong(9))
    driver.made_fail(b"cuModuleLoadData", 209)
    note(embedding(0))
    driver.made_fail(b"cuLaunchKernelEx", 1)
    note(embedding(0))
    driver.made_fail(b"", 0)
    driver.made_context(ctypes.c_ulonglong(1))

    # attention of a cluster, with more shared memory than a block has unasked
    device, shape, plan = Device(90, 132, 232448, 0), Shape(1, 1, 32, 8, 128, 4096, 0, 0.125, 0), Plan()
    assert library.fh_attention_make_plan(ctypes.byref(shape), ctypes.byref(device), ctypes.byref(plan)) is None
    note(library.fh_attention_decode(ctypes.byref(shape), ctypes.byref(plan), P(11), P(12), P(13), P(14), P(15), P(0), P(0), ctypes.byref(device), P(0)))

    # a head's step: one structure, all blocks resident
    from flashhead_edge.kernels.packing import Arguments
    arguments = Arguments(hidden=31, rows=2)
    arguments.layout.blocks, arguments.layout.multiprocessors, arguments.layout.shared_bytes = 5, 132, 99_000
    note(library.fh_head_step(ctypes.byref(arguments), ctypes.byref(device), P(0)))

    # memory
    data, host = P(), ctypes.create_string_buffer(10)
    note(library.cudaMalloc(ctypes.byref(data), Z(100)))
    note(library.cudaMemcpyAsync(data, host, Z(10), 1, P(0)) + library.cudaMemcpyAsync(data, data, Z(20), 3, P(0)))
    note(library.cudaMemcpyAsync(host, data, Z(10), 2, P(0)))  # to the host: nobody asks for it
    note(library.cudaMemcpy2DAsync(P(1), Z(8), P(2), Z(16), Z(4), Z(3), 3, P(0)))
    note(library.cudaMemsetAsync(data, 0, Z(7), P(0)))
    thread = threading.Thread(target=lambda: note(library.cudaFree(data)))
    thread.start(), thread.join()
    driver.made_fail(b"cuMemAlloc_v2", 2)
    note(library.cudaGetErrorString(library.cudaMalloc(ctypes.byref(data), Z(100))))
else:
    device = I()
    note(library.cudaGetErrorString(library.cudaGetDevice(ctypes.byref(device))))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Launchers of some sources over nvrtc/runtime.cpp, with everything shown."""
    folder = tmp_path_factory.mktemp("library")
    exports = folder / "exports.map"
    exports.write_text("{ global: fh_*; cuda*; local: *; };\n")
    includes = [word for path in plugin_build.cuda_headers() for word in ("-isystem", str(path))]
    made = folder / "liblaunchers.so"
    s = plugin_build.sources()
    flags = [f"-I{s.kernels}", *includes, "-fvisibility=default"]
    launchers = [s.kernels / f"{stem}.cu" for stem in ("embedding", "head_step", "attention")]
    plugin_build.make_library(made, launchers, [s.nvrtc / "runtime.cpp"], exports, flags, nvrtc.find_nvrtc(), "sm_87")
    return made


def calls(library: Path, driver: Path | None) -> list[list]:
    """What the library says, and what it asks of the driver, call by call."""
    environment = os.environ | ({"LD_LIBRARY_PATH": str(driver)} if driver else {})
    done = subprocess.run([sys.executable, "-c", CALLS, library, "made" if driver else "none"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@can_build
def test_launchers_reach_their_kernels_through_the_driver(library: Path, made_driver: Path) -> None:
    fp16, bf16 = (f"_ZN2fh9embeddingINS_4{kind}EEEvPKiPKtfPtii" for kind in ("Fp16", "Bf16"))
    launch = "3 1 1 by 32, 0 shared, first 4321, stream 77"
    said = iter(calls(library, made_driver))
    assert next(said) == [None, f"retain 0; load in 1; {fp16} {launch} overlap 1"]
    assert next(said) == [None, f"{fp16} {launch}"]
    assert next(said) == [None, f"{bf16} {launch} overlap 1"]  # of the same cubin
    assert next(said) == [None, f"{fp16} {launch} overlap 1"]  # a thread of its own gets the same context
    assert next(said) == [None, f"load in 5; {fp16} {launch} overlap 1"]
    assert next(said) == ["embedding could not be launched: no binary for this GPU; build it for capability 90", "load in 9"]
    wrong, notes = next(said)
    assert wrong.startswith("embedding could not be launched in 3 x 1 blocks of 32 threads: an error;") and notes.startswith("load in 9; ")
    wrong, notes = next(said)
    name = "_ZN2fh16attention_decodeINS_4Fp16ELi128ELb1EEEvPKtS3_S3_PKiPtPfPjiiiiiiif"
    assert (wrong, notes) == (None, f"load in 1; {name} 8 8 1 by 256, 19392 shared, first 11, stream 0 cluster 8 1 1")
    step = "flashhead_step 10 1 1 by 512, 99000 shared, first 31, stream 0 cooperative 1"
    assert next(said) == [None, f"load in 1; attribute 8 = 99000; {step}"]
    assert next(said) == [0, "alloc 100"]
    assert next(said) == [0, "in 10; across 20"]
    assert next(said)[0] != 0
    assert next(said) == [0, "3 rows of 4, 16 to 8 apart"]
    assert next(said) == [0, "set 7 to 0"]
    assert next(said) == [0, "free in 1"]
    assert next(said) == ["out of memory", "alloc 100"]
    assert next(said, None) is None


@can_build
@pytest.mark.skipif(has_driver, reason="this machine has a driver")
def test_without_a_driver_launchers_say_so(library: Path) -> None:
    (wrong, _), (text, _) = calls(library, None)
    assert text == "libcuda.so.1 is missing, or older than CUDA 12"
    assert wrong.startswith("embedding could not be launched in 3 x 1 blocks of 32 threads: libcuda.so.1 is missing")


@can_build
def test_every_instance_is_in_the_library_once(library: Path) -> None:
    """The table is what the launchers name: attention has three kernels, two in 16 instances and one in two; embedding one in two; the head two."""
    text = (library.parent / "kernels.s").read_text()
    rows = [line for line in text.splitlines() if line.startswith("    .quad _ZN2fh") or line.startswith("    .quad flashhead_")]
    assert len(rows) == len(set(rows)) == 2 * 16 + 2 + 2 + 2
    assert text.count(".incbin") == 5  # a template or all that are none: one compilation


@can_build
@pytest.mark.slow
@pytest.mark.skipif("TENSORRT_INCLUDE" not in os.environ, reason="TENSORRT_INCLUDE names no folder of TensorRT's headers")
def test_the_whole_library_is_built_from_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = plugin_build.build(Path(os.environ["TENSORRT_INCLUDE"]), target=plugin_build.Target(87, None))
    major = int(made.version.split()[-1].split(".")[0])
    assert made.path == plugins.find_library(major) and made.path.parent == plugins.cache_folder() and made.bytes > 1_000_000
    assert [p.name for p in made.path.parent.iterdir()] == [plugins.library_name(major)]
    assert plugins.device_bytes(made.path) == 0 and plugins.last_error(made.path) == ""


@can_build
@pytest.mark.slow
@pytest.mark.skipif("TENSORRT_INCLUDE" not in os.environ, reason="TENSORRT_INCLUDE names no folder of TensorRT's headers")
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="there is no compiler for aarch64")
def test_a_board_s_library_is_built_on_a_pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    made = plugin_build.build(Path(os.environ["TENSORRT_INCLUDE"]), tmp_path / "board.so", target=plugin_build.Target(87, None))
    aarch64 = 183  # ELF's number of the machine, at byte 18
    assert int.from_bytes(made.path.read_bytes()[18:20], "little") == aarch64
    assert made.version.startswith(f"{plugin_build.__version__} tensorrt ")


@can_build
def test_a_build_that_fails_leaves_the_old_library(tmp_path: Path) -> None:
    include, old = tmp_path / "include", tmp_path / "out" / "lib.so"
    include.mkdir()
    (include / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n")
    (include / "NvInferRuntime.h").write_text("#error no header of TensorRT\n")
    old.parent.mkdir()
    old.write_bytes(b"old")
    with pytest.raises(EngineError, match=r"plugin library: g\+\+ fails \(.*no header of TensorRT.*\), expected it to compile"):
        plugin_build.build(include, old, plugin_build.Target(87, None))
    assert [p.name for p in old.parent.iterdir()] == ["lib.so"] and old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, r"NvInferRuntime\.h is not in .*include, expected it there; name their folder with --tensorrt-include"),
        ("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5\n#define NV_TENSORRT_PATCH 2", r"headers of TensorRT 8\.5\.2, expected 8\.6 or newer"),
        ("", "headers of TensorRT without a version"),
    ],
)
def test_headers_are_looked_at(tmp_path: Path, version: str | None, words: str) -> None:
    include = tmp_path / "include"
    include.mkdir()
    if version is not None:
        (include / "NvInferRuntime.h").write_text("")
        (include / "NvInferVersion.h").write_text(version)
    with pytest.raises(EngineError, match=words):
        plugin_build.tensorrt_headers(include)


def test_both_ways_of_writing_a_version_are_read(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").write_text("")
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (11, 1, 0))
    lines = [f"#define TRT_{part}_ENTERPRISE {n}\n#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< version" for part, n in numbers]
    (tmp_path / "NvInferVersion.h").write_text("\n".join(lines))
    assert plugin_build.tensorrt_headers(tmp_path) == (tmp_path, (11, 1, 0))


def test_a_board_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_build, "machine_of_compiler", lambda: "aarch64")
    assert plugin_build.target_named("Jetson Orin Nano") == plugin_build.target_named("agx-orin-64gb") == plugin_build.Target(87, 12)
    assert plugin_build.target_named("thor").capability == 110 and plugin_build.target_named("89") == plugin_build.Target(89, None)
    with pytest.raises(SettingsError, match="board xavier: not known, expected one of orin-nano-4gb, .*; name one of them, or give its GPU's numbers"):
        plugin_build.target_named("xavier")


@can_build
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is a board's")
def test_a_board_s_library_needs_a_compiler_for_its_processor(headers: Path, flashhead) -> None:
    code, out, err = flashhead("plugin", "build", "--for", "orin-nano-8gb", "--tensorrt-include", headers)
    said = "board orin-nano-8gb: g++ compiles for x86_64, expected a compiler for aarch64"
    assert (code, out) == (2, "") and said in err.splitlines()[-1] and "set CXX=aarch64-linux-gnu-g++" in err.splitlines()[-1]


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A folder that looks like TensorRT's headers."""
    (tmp_path / "NvInferRuntime.h").write_text("")
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n")
    return tmp_path


def test_what_is_missing_is_named(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="capability 75: the kernels run from 80 on"):
        plugin_build.build(headers, target=plugin_build.Target(75, None))
    with monkeypatch.context() as m:
        m.setenv("CXX", "no-such-compiler")
        with pytest.raises(EngineError, match="no-such-compiler: it is not installed, .* install g"):
            plugin_build.build(headers, target=plugin_build.Target(87, None))
    with monkeypatch.context() as m:
        m.setattr(plugin_build, "cuda_folders", list)
        m.setattr(plugin_build, "wheel_folders", list)
        with pytest.raises(EngineError, match=r"cuda\.h, cuda_runtime\.h, crt/host_defines\.h not found, .* pip install nvidia-cuda-runtime nvidia-cuda-crt"):
            plugin_build.cuda_headers()


@can_build
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="there is no compiler for aarch64")
def test_a_board_s_library_does_not_take_this_machine_s_place(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    with pytest.raises(SettingsError, match="for another processor, expected --out then"):
        plugin_build.build(headers, target=plugin_build.Target(87, None))


def test_headers_of_two_wheels_are_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA 12 has crt/ in the wheel of nvcc."""
    for name in ("cuda_runtime/include/cuda.h", "cuda_runtime/include/cuda_runtime.h", "cuda_nvcc/include/crt/host_defines.h"):
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).write_text("")
    monkeypatch.setattr(plugin_build, "cuda_folders", list)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert plugin_build.cuda_headers() == [tmp_path / "nvidia/cuda_runtime/include", tmp_path / "nvidia/cuda_nvcc/include"]


@can_build
def test_an_architecture_that_nvrtc_does_not_know_is_named(headers: Path) -> None:
    with pytest.raises(EngineError, match=r"it does not compile for capability 999, expected one of .*87.*; install a newer NVRTC"):
        plugin_build.build(headers, target=plugin_build.Target(999, None))


def test_an_nvrtc_newer_than_the_driver_is_not_taken(tmp_path: Path) -> None:
    newer, broken = tmp_path / "libnvrtc.so.13", tmp_path / "libnvrtc.so.12.6.85"
    newer.write_bytes(b"")
    broken.write_bytes(b"no library")
    words = r"NVRTC: none was found \(.*libnvrtc\.so\.13 is of CUDA 13;.*libnvrtc\.so\.12\.6\.85.*\), expected libnvrtc\.so of CUDA 12 or older"
    with pytest.raises(EngineError, match=words):
        nvrtc.find_nvrtc(12, [newer, broken])
    with pytest.raises(EngineError, match=r"NVRTC: none was found, expected libnvrtc\.so; install it: pip install"):
        nvrtc.find_nvrtc(None, [])
    assert nvrtc.major_of(tmp_path / "libnvrtc.so") == nvrtc.major_of(tmp_path / "libnvrtc.alt.so.13") == 0


@pytest.mark.skipif(has_driver, reason="this machine has a driver")
def test_without_a_gpu_the_capability_is_asked_for(headers: Path, flashhead) -> None:
    with pytest.raises(DeviceError, match=r"libcuda.so.1 cannot be loaded.*; pass --for BOARD$"):
        plugin_build.build(headers)
    code, out, err = flashhead("plugin", "build", "--tensorrt-include", headers)
    assert (code, out) == (1, "") and "libcuda.so.1 cannot be loaded" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("void fh::w4a16_prefill<fh::Fp16, 32, (bool)1, 64>(uint4 const*, int)", "fh::w4a16_prefill<fh::Fp16, 32, (bool)1, 64>"),
        ("void fh::rms_norm<fh::Bf16>(unsigned short const*, int)", "fh::rms_norm<fh::Bf16>"),
        ("fh::w4a16_repack_codes(unsigned int const*, int)", "fh::w4a16_repack_codes"),
        ("flashhead_step", "flashhead_step"),
    ],
)
def test_a_kernel_is_named_as_cpp_names_it(name: str, expression: str) -> None:
    assert plugin_build.expression_of(name) == expression


@can_build
def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void broken() { nothing(); }")
    with pytest.raises(EngineError, match=r'broken\.cu: NVRTC \d+\.\d+ does not compile it for sm_87 \(.*identifier "nothing" is undefined\)'):
        nvrtc.find_nvrtc().cubin(broken, [], "sm_87")
