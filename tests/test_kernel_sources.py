"""The CUDA sources without a GPU: the structures of both languages are one, NVRTC compiles, the cache is whole or absent."""

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from flashhead_edge.cases import CASES, made_index
from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.jetson import cuda_kernels
from flashhead_edge.jetson.nvrtc import find_nvrtc
from flashhead_edge.kernels import build, packing
from flashhead_edge.kernels.head import MOST_ROWS
from flashhead_edge.kernels.ops import check_step, head_logits, head_step
from flashhead_edge.reference import BELOW

INSTANCES = {  # of the templates, one of each kind
    "w4a16.cu": ("fh::w4a16_decode<fh::Fp16, 128, false, 1>", "fh::w4a16_prefill<fh::Bf16, 32, true, 64>"),
    "w4a16_fused.cu": ("fh::w4a16_fused<fh::Fp16, 128, false, true, true, false, 1>", "fh::w4a16_fused<fh::Bf16, 32, true, true, true, true, 2>"),
    "attention.cu": ("fh::attention_decode<fh::Fp16, 64, false>", "fh::attention_rope_decode<fh::Bf16, 128, true>", "fh::attention_rope_write<fh::Bf16>"),
    "elementwise.cu": ("fh::rms_norm<fh::Fp16>", "fh::gated_product<fh::Bf16, true>"),
    "embedding.cu": ("fh::embedding<fh::Fp16>",),
    "dense_rows.cu": ("fh::dense_rows<fh::Fp16, 1>", "fh::dense_rows<fh::Bf16, 8>"),
    "combine.cu": ("fh::combine<fh::Fp16, true>", "fh::combine<fh::Bf16, false>"),
}
STRUCTURES = {
    "FlashHeadTable": packing.Table,
    "FlashHeadStage": packing.Stage,
    "FlashHeadLayout": packing.Layout,
    "FlashHeadArguments": packing.Arguments,
    "FlashHeadWiden": packing.Widen,
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_structures_are_those_of_the_header(tmp_path):
    lines = []
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [f'printf("{name}.{f} %zu\\n", offsetof(struct {name}, {f}));' for f, _ in structure._fields_]
    source = tmp_path / "offsets.c"
    source.write_text(f'#include <stddef.h>\n#include <stdio.h>\n#include "head_step.h"\nint main(void) {{ {" ".join(lines)} return 0; }}\n')
    subprocess.run(["cc", f"-I{build.sources_folder()}", str(source), "-o", str(tmp_path / "offsets")], check=True, timeout=60)
    found = dict(line.split() for line in subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=True).stdout.splitlines())
    for name, structure in STRUCTURES.items():
        assert int(found[name]) == ctypes.sizeof(structure)
        for field, _ in structure._fields_:
            assert int(found[f"{name}.{field}"]) == getattr(structure, field).offset, (name, field)


def test_constants_are_those_of_the_header():
    text = (build.sources_folder() / "head_step.h").read_text()
    defined = dict(re.findall(r"#define FLASHHEAD_(\w+)\s+(\d+)", text))
    for name in ("MAX_STAGES", "THREADS", "BATCH_CHUNKS", "HISTOGRAM", "PASSES"):
        assert int(defined[name]) == getattr(packing, name)
    assert int(defined["MAX_ROWS"]) == MOST_ROWS
    assert 1 << int(defined["MAX_NUMBER"]) == packing.MAX_SLOTS
    assert int(re.search(r"#define FLASHHEAD_ALWAYS (0x[0-9a-f]+)", text)[1], 16) == packing.ALWAYS > packing.MAX_CLUSTERS
    assert float(re.search(r"#define FLASHHEAD_BELOW ([\d.]+)f", text)[1]) == BELOW


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_110"])
@pytest.mark.parametrize("source", sorted(p.name for p in build.sources_folder().glob("*.cu")))
def test_nvcc_compiles_every_source(source, architecture, tmp_path):
    if architecture.replace("sm", "compute") not in subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split():
        pytest.skip(f"this nvcc does not know {architecture}")
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", str(build.sources_folder() / source), "-o", str(tmp_path / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


COMPILE = """
import ctypes, sys
library, source, folder, *instances = sys.argv[1:]
nvrtc, program, size = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_size_t()
with open(f"{folder}/{source}", "rb") as file:
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), file.read(), source.encode(), 0, None, None) == 0
for instance in instances:
    assert nvrtc.nvrtcAddNameExpression(program, instance.encode()) == 0
options = [f"-I{folder}".encode(), b"--gpu-architecture=sm_87", b"-std=c++17"]
result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
log = ctypes.create_string_buffer(size.value)
nvrtc.nvrtcGetProgramLog(program, log)
if result:
    sys.exit(log.value.decode())
assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
print(size.value)
"""


@pytest.fixture(scope="session")
def nvrtc_12_6(tmp_path_factory):
    """The library of JetPack 6, from the package index; used in processes of its own, since two NVRTCs in one disturb each other."""
    folder = tmp_path_factory.mktemp("nvrtc")
    download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps", "--dest", str(folder)]
    if platform.machine() != "x86_64" or subprocess.run([*download, "nvidia-cuda-nvrtc-cu12==12.6.*"], capture_output=True, check=False).returncode:
        pytest.skip("NVRTC 12.6 could not be downloaded")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    return next(folder.rglob("libnvrtc.so.12"))


def every_kernel(source):
    """The kernels of a source that the torch-free backend can launch, as C++ writes them: all instances of its templates."""
    try:
        return [cuda_kernels.expression(name) for name, of in cuda_kernels.kernel_sources().items() if of == source]
    except EngineError as error:  # an installation without a C++ compiler
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in build.sources_folder().glob("*.cu")))
def test_the_nvrtc_of_jetpack_6_compiles_every_kernel_for_an_orin(source, nvrtc_12_6):
    command = [sys.executable, "-c", COMPILE, str(nvrtc_12_6), source, str(build.sources_folder()), *every_kernel(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in build.sources_folder().glob("*.cu")))
def test_the_nvrtc_of_jetpack_7_compiles_every_kernel_for_a_thor(source):
    compiler = find_nvrtc()
    if compiler.version < (13, 0):
        pytest.skip(f"the NVRTC that is installed is {compiler.version}")
    code, _ = compiler.cubin(build.sources_folder() / source, every_kernel(source), "sm_110")
    assert code[1:4] == b"ELF" and len(code) > 1000


@pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_110"])
def test_nvrtc_compiles_once_into_the_cache(architecture, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = build.compiled("head_step.cu", architecture)
    (kept,) = build.cache_folder().glob("*.bin")
    assert kept.read_bytes()[32:] == code
    assert not [p for p in build.cache_folder().iterdir() if p.suffix not in (".bin", ".lock")]
    kept.write_bytes(hashlib.sha256(b"kept").digest() + b"kept")
    assert build.compiled("head_step.cu", architecture) == b"kept"
    if architecture == "sm_87":
        kept.write_bytes(b"damaged")
        assert build.compiled("head_step.cu", architecture) == code == kept.read_bytes()[32:]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_87", "sm_90a"])
@pytest.mark.parametrize("source", sorted(p.name for p in build.sources_folder().glob("*.cu")))
def test_the_nvrtc_installed_compiles_every_source(source, architecture, tmp_path, monkeypatch):
    """Version 13 of the `cuda` extra: what JetPack 7 has."""
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wide = ("fh::w4a16_prefill_wide<fh::Fp16, 128, false, 128, 64>",) if source == "w4a16.cu" and architecture == "sm_90a" else ()
    for instance in (*INSTANCES.get(source, ("",)), *wide):
        code = build.instantiated(source, instance, architecture)[0] if instance else build.compiled(source, architecture)
        assert code[1:4] == b"ELF"


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"file/flashhead-edge/kernels cannot be written \(Not a directory\); set XDG_CACHE_HOME"):
        build.compiled("decode.cu", "sm_90")


def test_a_compiler_newer_than_the_driver_is_a_sentence():
    build.check_versions(13, 13)
    build.check_versions(13, 12)
    with pytest.raises(DeviceError, match=r"NVRTC is of CUDA 13 and the driver of CUDA 12, .* pip install 'nvidia-cuda-nvrtc-cu12' 'cuda-bindings==12"):
        build.check_versions(12, 13)


def test_a_source_that_does_not_compile_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    (tmp_path / "broken.cu").write_text("not C++")
    monkeypatch.setattr(build, "sources_folder", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DeviceError, match="broken.cu does not compile for sm_90"):
        build.compiled("broken.cu", "sm_90")
    assert not list(build.cache_folder().glob("*.bin"))


def test_the_fake_says_the_shapes():
    packed = packing.pack(made_index(CASES[0]))
    made = packing.plan(packed, 132, 227 << 10, 4)
    hidden = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(5003, 256, dtype=torch.bfloat16, device="meta")
    image = torch.empty(packed.image.size, dtype=torch.uint8, device="meta")
    workspace = torch.empty(4 * made.row_bytes, dtype=torch.uint8, device="meta")
    token, counts, capped, ids, logits = head_step(hidden, weight, None, image, workspace, packing.words_of(made), "sm_90")
    assert (token.shape, counts.shape, capped.dtype) == ((4,), (4, 6), torch.bool)
    assert ids.shape == logits.shape == (4, packed.layout.candidates)
    *_, wide = head_logits(hidden, weight, None, image, workspace, packing.words_of(made), "sm_90")
    assert (wide.shape, wide.dtype) == ((4, 5003), torch.float32)


def test_arguments_that_the_kernel_cannot_read_are_refused():
    packed = packing.pack(made_index(CASES[0]))
    made = packing.plan(packed, 132, 227 << 10, 1)
    hidden, weight = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(5003, 256, dtype=torch.bfloat16)
    image, workspace = torch.from_numpy(packed.image.copy()), torch.zeros(made.row_bytes, dtype=torch.uint8)
    layout = packing.layout_of(packing.words_of(made))
    check_step(hidden, weight, None, image, workspace, layout)
    for change, message in (
        ({"hidden": hidden.float()}, r"hidden is torch.float32 \[1, 256\], expected float16 or bfloat16 \[N, 256\]"),
        ({"weight": weight[:5000]}, r"weight is torch.bfloat16 \[5000, 256\], expected float16 or bfloat16 \[5003 or more, 256\]"),
        ({"bias": torch.zeros(5003)}, r"bias is torch.float32 \[5003\], expected torch.bfloat16 \[5003 or more\]"),
        ({"workspace": workspace[:-256]}, "workspace is .* bytes, expected .* bytes for 1 rows"),
    ):
        arguments = {"hidden": hidden, "weight": weight, "bias": None, "image": image, "workspace": workspace, **change}
        with pytest.raises(SettingsError, match=message):
            check_step(*arguments.values(), layout)
