"""The machines that a bundle can be made for: which wheels their Python takes."""

from __future__ import annotations

from dataclasses import dataclass

from flashhead_edge.errors import SettingsError


@dataclass(frozen=True)
class Target:
    """A kind of machine. Its wheels are those of one CPython on one architecture, for a glibc of this age or older."""

    name: str
    about: str
    python: tuple[int, int]
    machine: str  # as Python's sysconfig.get_platform() ends
    glibc: tuple[int, int]
    capabilities: tuple[int, ...] = ()  # of its boards' GPUs, 87 for 8.7; none: no checkpoint runs there, without torch
    nvrtc: str = ""  # the wheel of NVIDIA's compiler of kernels: L4T alone has none
    more: tuple[str, ...] = ()  # what else is installed

    @property
    def gpu(self) -> bool:
        """A Jetson: a checkpoint runs there too, by the cuda backend."""
        return bool(self.capabilities)

    @property
    def requirements(self) -> tuple[str, ...]:
        """What is installed beside flashhead-edge's own requirements."""
        return (*((self.nvrtc,) if self.nvrtc else ()), *self.more)

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platform tags of the wheels that it takes, the newest first (PEP 600, and the older names of the same)."""
        least = 17 if self.machine == "aarch64" else 5
        named = [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc[1], least - 1, -1)]
        old = ("manylinux2014",) if self.machine == "aarch64" else ("manylinux2014", "manylinux2010", "manylinux1")
        return (*named, *(f"{name}_{self.machine}" for name in old))

    @property
    def python_text(self) -> str:
        return f"{self.python[0]}.{self.python[1]}"

    @property
    def glibc_text(self) -> str:
        return f"{self.glibc[0]}.{self.glibc[1]}"


TARGETS = (
    # NVRTC: the newest whose code every release's driver loads. JetPack 7 is Thor's, whose load only NVML tells, and from 7.2 on Orin's too.
    Target("jetpack6", "JetPack 6 (Ubuntu 22.04)", (3, 10), "aarch64", (2, 35), (87,), "nvidia-cuda-nvrtc-cu12>=12.6,<12.7"),
    Target("jetpack7", "JetPack 7 (Ubuntu 24.04)", (3, 12), "aarch64", (2, 39), (110, 87), "nvidia-cuda-nvrtc>=13.0,<13.1", ("nvidia-ml-py>=13",)),
    Target("linux-aarch64-cp311", "Debian 12 on arm64, by ONNX Runtime on the CPU", (3, 11), "aarch64", (2, 36)),
    Target("linux-x86_64-cp311", "Debian 12 on x86-64, by ONNX Runtime on the CPU: to try a bundle on a PC", (3, 11), "x86_64", (2, 36)),
)


def target_named(name: str) -> Target:
    """The target of a name.

    Raises:
        SettingsError: there is none.
    """
    found = next((target for target in TARGETS if target.name == name), None)
    if found is None:
        raise SettingsError(f"target {name}: it is not known, expected one of {', '.join(t.name for t in TARGETS)}; name one of them")
    return found
