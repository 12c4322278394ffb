"""NVRTC, NVIDIA's compiler of device code in a library, by ctypes: found where CUDA or a wheel puts it. No package is needed."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flashhead_edge.errors import EngineError

INSTALL = "install it: pip install nvidia-cuda-nvrtc-cu12 (or nvidia-cuda-nvrtc for CUDA 13), or the CUDA toolkit"


def cuda_folders() -> list[Path]:
    """Folders that a CUDA toolkit may lie in, the user's choice first."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*named, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/usr")]


def wheel_folders() -> list[Path]:
    """Folders of NVIDIA's wheels that are installed in this environment."""
    return [found for entry in dict.fromkeys(sys.path) if entry for found in sorted(Path(entry).glob("nvidia/*"), reverse=True) if found.is_dir()]


def libraries() -> list[Path]:
    """Every NVRTC that there is, in the order in which they are preferred."""
    folders = [root / inner for root in cuda_folders() for inner in ("lib64", "lib")]
    folders += [found for root in cuda_folders() for found in sorted(root.glob("targets/*/lib"))]
    folders += [root / "lib" for root in wheel_folders()]
    folders += [*sorted(Path("/usr/lib").glob("*-linux-gnu")), Path("/usr/lib64"), Path("/usr/lib")]
    found = {path.resolve(): None for folder in folders for path in sorted(folder.glob("libnvrtc.so.*")) if major_of(path)}
    return list(found)


def major_of(path: Path) -> int:
    """The major version of CUDA in a library's name, 0 where it is none."""
    found = re.fullmatch(r"libnvrtc\.so\.(\d+)(\.\d+)*", path.name)
    return int(found[1]) if found else 0


def find_nvrtc(most: int | None = None, paths: Iterable[Path] | None = None) -> Nvrtc:
    """The newest NVRTC whose major version is at most `most`, the driver's: that does not load what a newer one makes.

    Raises:
        EngineError: there is none.
    """
    paths = libraries() if paths is None else list(paths)
    fitting = sorted((p for p in paths if most is None or major_of(p) <= most), key=major_of, reverse=True)
    why = [f"{p} is of CUDA {major_of(p)}" for p in paths if p not in fitting]
    for path in fitting:
        try:
            return Nvrtc(path)
        except OSError as error:
            why.append(str(error))
    limit = "" if most is None else f" of CUDA {most} or older, as the driver is"
    raise EngineError(f"NVRTC: none was found{f' ({chr(59).join(why)})' if why else ''}, expected libnvrtc.so{limit}; {INSTALL}")


class Nvrtc:
    """One library. Its calls may be made from several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value
        # NVRTC opens this one by name when it compiles; the wheel of CUDA 13.0 does not tell the loader that it lies beside it
        builtins = path.resolve().with_name(f"libnvrtc-builtins.so.{major.value}.{minor.value}")
        self.builtins = ctypes.CDLL(str(builtins)) if builtins.is_file() else None

    def architectures(self) -> list[int]:
        """What it compiles for, such as 87."""
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(found)
        return list(found)

    def cubin(self, source: Path, instances: Sequence[str], architecture: str) -> tuple[bytes, list[str]]:
        """Compile a source that includes nothing from outside of its folder.

        Args:
            instances: kernels as C++ writes them, such as ``fh::rms_norm<fh::Fp16>``.
            architecture: such as ``sm_90a``; ``compute_87`` gives PTX instead, which a driver compiles for any later GPU: tests run a board's code so.
        Returns:
            The cubin, and the kernels' names in it.
        Raises:
            EngineError: NVRTC refuses the source.
        """
        program = ctypes.c_void_p()
        self._call(source, "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        try:
            for instance in instances:
                self._call(source, "nvrtcAddNameExpression", program, instance.encode())
            options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17", f"-I{source.parent}".encode()]
            if self.library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
                size = ctypes.c_size_t()
                self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
                log = ctypes.create_string_buffer(max(1, size.value))
                self.library.nvrtcGetProgramLog(program, log)
                said = next((line for line in log.value.decode(errors="replace").splitlines() if "error" in line), "it gives no reason")
                raise EngineError(
                    f"{source.name}: NVRTC {self.version[0]}.{self.version[1]} does not compile it for {architecture} ({said.strip()}), expected it to; "
                    "report this"
                )
            names = []
            for instance in instances:
                name = ctypes.c_char_p()
                self._call(source, "nvrtcGetLoweredName", program, instance.encode(), ctypes.byref(name))
                names.append((name.value or b"").decode())
            size = ctypes.c_size_t()
            kind = "PTX" if architecture.startswith("compute_") else "CUBIN"
            self._call(source, f"nvrtcGet{kind}Size", program, ctypes.byref(size))
            code = ctypes.create_string_buffer(size.value)
            self._call(source, f"nvrtcGet{kind}", program, code)
            return code.raw, names
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _call(self, source: Path, function: str, *arguments: object) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            said = self.library.nvrtcGetErrorString(code).decode(errors="replace")
            raise EngineError(f"{source.name}: {function} gives {said}, expected success; report this with NVRTC's version {self.version[0]}.{self.version[1]}")
