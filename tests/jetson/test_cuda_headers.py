"""Our own headers of CUDA (plugins_trt/nvrtc/include) against NVIDIA's: sizes, places, numbers, and the types of every function that runtime.cpp calls."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.plugin_build import cuda_headers, sources

INCLUDE = sources().nvrtc / "include"


def theirs() -> list[str]:
    try:
        return [word for folder in cuda_headers() for word in ("-isystem", str(folder))]
    except EngineError as error:
        pytest.skip(str(error))


def printed(work: Path, name: str, code: str, flags: list[str]) -> str:
    """What a program prints."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (work / f"{name}.cpp").write_text(code)
    subprocess.run(["g++", "-std=c++17", "-w", *flags, str(work / f"{name}.cpp"), "-o", str(work / name)], check=True, capture_output=True, text=True)
    return subprocess.run([str(work / name)], check=True, capture_output=True, text=True).stdout


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_structures_and_numbers_are_nvidias(tmp_path: Path) -> None:
    driver, runtime = (without_comments(INCLUDE / name) for name in ("cuda.h", "cuda_runtime_api.h"))
    numbers = sorted(set(re.findall(r"\b(CU_[A-Z0-9_]+|CUDA_(?:SUCCESS|ERROR_[A-Z_]+)|cuda[A-Z][A-Za-z]+)\s*=", driver + runtime)))
    assert len(numbers) > 40
    fields = {
        "CUDA_MEMCPY2D": re.findall(r"\b((?:src|dst)[A-Za-z0-9]+|WidthInBytes|Height)\b", driver[driver.index("CUDA_MEMCPY2D_st") :].split("}")[0]),
        "CUlaunchAttribute": ["id", "value"],
        "CUlaunchConfig": re.findall(r"\b((?:grid|block)Dim[XYZ]|sharedMemBytes|hStream|attrs|numAttrs)\b", driver[driver.index("CUlaunchConfig_st") :]),
    }
    assert len(fields["CUDA_MEMCPY2D"]) == 16 and len(fields["CUlaunchConfig"]) >= 10
    lines = [f'printf("{name} %d\\n", int({name}));' for name in numbers]
    lines += [f'printf("{s}.{f} %zu\\n", offsetof({s}, {f}));' for s, names in fields.items() for f in names]
    kinds = [*fields, "CUlaunchAttributeValue", "CUdeviceptr", "CUstream", "CUresult", "uint4", "float2", "dim3"]
    lines += [f'printf("{s} %zu %zu\\n", sizeof({s}), alignof({s}));' for s in kinds]
    for member in ("cooperative", "clusterDim", "programmaticStreamSerializationAllowed"):
        lines.append(f'printf("{member} %zu %zu\\n", offsetof(CUlaunchAttributeValue, {member}), sizeof(CUlaunchAttributeValue::{member}));')
    code = "#include <cuda.h>\n#include <cuda_runtime_api.h>\n#include <cstddef>\n#include <cstdio>\nint main() {\n" + "\n".join(lines) + "\n}\n"
    assert printed(tmp_path, "ours", code, ["-I", str(INCLUDE)]) == printed(tmp_path, "theirs", code, theirs())


def test_functions_take_what_nvidias_take(tmp_path: Path) -> None:
    """Each is redeclared behind NVIDIA's header, as ours has it: a compiler refuses another type of a C function."""
    text = without_comments(INCLUDE / "cuda.h")
    declared = re.findall(r"^CUresult (\w+)\((.*)\);$", text, re.MULTILINE)
    assert len(declared) >= 25
    used = set(re.findall(r"X\((cu\w+)\)", (sources().nvrtc / "runtime.cpp").read_text()))
    assert used == {name for name, _ in declared}
    lines = [f'extern "C" CUresult {name}({arguments});' for name, arguments in declared]
    runtime = re.findall(r"^(cudaError_t|const char\*) (cuda\w+)\((.*)\);$", without_comments(INCLUDE / "cuda_runtime_api.h"), re.MULTILINE)
    assert len(runtime) >= 18
    for kind, name, arguments in runtime:
        lines.append(f"static {kind} (*const p_{name})({arguments}) = &{name};")
    code = "#include <cuda.h>\n#include <cuda_runtime_api.h>\n" + "\n".join(lines) + "\n"
    (tmp_path / "functions.cpp").write_text(code)
    done = subprocess.run(["g++", "-std=c++17", "-w", "-fsyntax-only", *theirs(), str(tmp_path / "functions.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_launchers_compile_over_either(tmp_path: Path) -> None:
    """And ask for the same kernels."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    asked = []
    for headers in (["-I", str(INCLUDE)], theirs()):
        found = []
        for name in ("elementwise", "w4a16", "head_step"):
            out = tmp_path / f"{name}.o"
            flags = ["-std=c++17", "-fPIC", "-include", "cuda_runtime.h", "-x", "c++", "-c", str(sources().kernels / f"{name}.cu"), "-o", str(out)]
            subprocess.run(["g++", f"-I{sources().kernels}", *headers, *flags], check=True, capture_output=True, text=True)
            said = subprocess.run(["nm", "-u", str(out)], check=True, capture_output=True, text=True).stdout.split()
            found += sorted(s for s in said if s.startswith(("_ZN2fh", "flashhead_")))
        asked.append(found)
    assert asked[0] == asked[1] and len(asked[0]) > 50
