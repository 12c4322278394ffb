"""Where the packages lie. Everything else about the distribution stands in pyproject.toml.

Two rooms of the package live in top-level folders: export/ is flashhead_edge.export, jetson/ is flashhead_edge.jetson.
The CUDA sources and those of the TensorRT plugins, which are compiled on the user's machine, travel as data in flashhead_edge.kernels.
Two libraries are compiled when the package is. `_native`: the head's step as an operator of ONNX Runtime, in C. `_cuda`: the host's side of the CUDA
sources, their launchers, which needs a C++ compiler and neither CUDA nor its headers. Where there is no compiler the installation succeeds without
them: exported heads run on ONNX Runtime's own operators, and the cuda backend says what it lacks.
The mapping stands here and not in pyproject.toml because there it would need every package of the house by name;
found packages cannot be forgotten. In editable mode setuptools' finder serves the two folders under the same names.
"""

import os
import subprocess
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOMS = {"flashhead_edge.export": "export", "flashhead_edge.jetson": "jetson"}

packages = find_packages(include=["flashhead_edge", "flashhead_edge.*"])
for name, folder in ROOMS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

SOURCES = {
    "flashhead_edge.kernels.sources": "plugins_trt/kernels",
    "flashhead_edge.kernels.plugins": "plugins_trt/plugins",
    "flashhead_edge.kernels.nvrtc": "plugins_trt/nvrtc",
    "flashhead_edge.kernels.nvrtc.include": "plugins_trt/nvrtc/include",
}

# What a state gets may depend on nothing but the state: the compiler must not fuse multiplications and additions where the source does not.
FLAGS = ["/O2", "/fp:precise", "/std:c11"] if os.name == "nt" else ["-O3", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
NATIVE = Extension(
    "flashhead_edge.jetson._native",
    sorted(glob("jetson/native/*.c")),
    depends=sorted(glob("jetson/native/*.h")),  # which travel with the sources, too
    define_macros=[("Py_LIMITED_API", "0x030a0000")],  # Python 3.10: one wheel for all later ones
    py_limited_api=True,
    extra_compile_args=FLAGS,
    libraries=[] if os.name == "nt" else ["m"],
    optional=True,
)

# The launchers of the CUDA sources, read as C++ over headers of our own.
LAUNCHERS = sorted(f"plugins_trt/kernels/{name}.cu" for name in (
    "advance", "attention", "combine", "decode", "dense_rows", "elementwise", "embedding", "head_step", "settings", "w4a16", "w4a16_fused"
))  # fmt: skip
CUDA = Extension(
    "flashhead_edge.jetson._cuda",
    [*LAUNCHERS, "plugins_trt/nvrtc/library.cpp", "plugins_trt/nvrtc/runtime.cpp"],
    depends=sorted([*glob("plugins_trt/kernels/*.h"), *glob("plugins_trt/kernels/*.cuh"), *glob("plugins_trt/nvrtc/**/*.h", recursive=True)]),
    include_dirs=["plugins_trt/nvrtc/include", "plugins_trt/kernels", "plugins_trt/nvrtc"],
    py_limited_api=True,
    extra_compile_args=["-std=c++17", "-O2", "-fvisibility-inlines-hidden"],
    extra_link_args=["-pthread", "-ldl", "-Wl,-z,defs", "-Wl,--version-script=plugins_trt/nvrtc/exports.map"],
    optional=True,
)


class BuildPy(build_py):
    """As setuptools', and the commit of the tree in a file, where there is one: records of an installed package say it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            found = ""
        if found and os.path.exists(".git"):  # not of a repository around an unpacked archive
            with open(os.path.join(self.build_lib, "flashhead_edge", "commit.txt"), "w", encoding="ascii") as file:
                file.write(found + "\n")


class BuildExt(build_ext):
    """As setuptools', and for the launchers a table of their kernels, which the objects leave undefined (plugins_trt/nvrtc/kernels.h)."""

    def build_extension(self, ext: Extension) -> None:
        if ext is not CUDA:
            super().build_extension(ext)
            return
        build = {"output_dir": self.build_temp, "include_dirs": ext.include_dirs, "depends": ext.depends}
        device = ["-include", "cuda_runtime.h", "-x", "c++"]  # a CUDA source is C++ to this compiler
        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        launchers = [source for source in ext.sources if source.endswith(".cu")]
        others = [source for source in ext.sources if source not in launchers]
        objects = self.compiler.compile(launchers, extra_preargs=device, extra_postargs=ext.extra_compile_args, **build)
        table = os.path.join(self.build_temp, "flashhead_kernels.c")
        with open(table, "w", encoding="ascii") as file:
            file.write(kernel_table([(kernel, os.path.basename(source)) for source, path in zip(launchers, objects) for kernel in undefined_kernels(path)]))
        objects += self.compiler.compile([table], output_dir="/" if os.path.isabs(table) else None)
        objects += self.compiler.compile(others, extra_postargs=ext.extra_compile_args, **build)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=ext.extra_link_args, target_lang="c++")


def undefined_kernels(path: str) -> list[str]:
    """The kernels that an object of launchers leaves open. All are of namespace fh, or called flashhead_."""
    try:
        said = subprocess.run([os.environ.get("NM", "nm"), "-u", path], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"nm -u {path}: {error}; install binutils") from error
    return [name for name in (line.split()[-1] for line in said.splitlines() if line.strip()) if name.startswith(("_ZN2fh", "flashhead_"))]


def kernel_table(kernels: list[tuple[str, str]]) -> str:
    """A C source that gives every kernel an address, under the name that C++ asks for, and lists them."""
    lines = ["typedef struct { const void* host; const char* name; const void* code; } Kernel;"]
    lines += [f'const char kernel_{i} __asm__("{name}") = 0;' for i, (name, _) in enumerate(kernels)]
    lines += ["Kernel flashhead_kernels[] = {", *(f'  {{&kernel_{i}, "{name}", 0}},' for i, (name, _) in enumerate(kernels)), "  {0, 0, 0}};"]
    lines += ["const char* const flashhead_sources[] = {", *(f'  "{source}",' for _, source in kernels), "  0};"]
    return "\n".join(lines) + "\n"


setup(
    packages=[*packages, *SOURCES],
    package_dir=ROOMS | SOURCES,
    ext_modules=[NATIVE, *([CUDA] if sys.platform == "linux" else [])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    exclude_package_data={"flashhead_edge.jetson": ["native/*"]},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
