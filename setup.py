"""Where the packages lie. Everything else about the distribution stands in pyproject.toml.

Two rooms of the package live in top-level folders: export/ is flashhead_edge.export, jetson/ is flashhead_edge.jetson.
The CUDA sources and those of the TensorRT plugins, which are compiled on the user's machine, travel as data in flashhead_edge.kernels.
One library is compiled when the package is: the head's step as an operator of ONNX Runtime, in C. Where there is no compiler
the installation succeeds without it, and exported heads run on ONNX Runtime's own operators.
The mapping stands here and not in pyproject.toml because there it would need every package of the house by name;
found packages cannot be forgotten. In editable mode setuptools' finder serves the two folders under the same names.
"""

import os
from glob import glob

from setuptools import Extension, find_packages, setup

ROOMS = {"flashhead_edge.export": "export", "flashhead_edge.jetson": "jetson"}

packages = find_packages(include=["flashhead_edge", "flashhead_edge.*"])
for name, folder in ROOMS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

SOURCES = {
    "flashhead_edge.kernels.sources": "plugins_trt/kernels",
    "flashhead_edge.kernels.plugins": "plugins_trt/plugins",
    "flashhead_edge.kernels.nvrtc": "plugins_trt/nvrtc",
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

setup(
    packages=[*packages, *SOURCES],
    package_dir=ROOMS | SOURCES,
    ext_modules=[NATIVE],
    exclude_package_data={"flashhead_edge.jetson": ["native/*"]},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
