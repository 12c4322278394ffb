"""Where the packages lie. Everything else about the distribution stands in pyproject.toml.

Two rooms of the package live in top-level folders: export/ is flashhead_edge.export, jetson/ is flashhead_edge.jetson.
The CUDA sources, which are compiled on the user's machine, travel as the data of flashhead_edge.kernels.sources.
The mapping stands here and not in pyproject.toml because there it would need every package of the house by name;
found packages cannot be forgotten. In editable mode setuptools' finder serves the two folders under the same names.
"""

from setuptools import find_packages, setup

ROOMS = {"flashhead_edge.export": "export", "flashhead_edge.jetson": "jetson"}

packages = find_packages(include=["flashhead_edge", "flashhead_edge.*"])
for name, folder in ROOMS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

SOURCES = {"flashhead_edge.kernels.sources": "plugins_trt/kernels"}

setup(packages=[*packages, *SOURCES], package_dir=ROOMS | SOURCES)
