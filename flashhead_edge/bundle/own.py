"""flashhead-edge's own wheel for a target: built from this checkout, its C libraries by a cross-compiler where there is one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from flashhead_edge.bundle.targets import Target
from flashhead_edge.bundle.wheels import need_pip
from flashhead_edge.errors import FlashHeadError, first_line

LIBRARIES = ("_native", "_cuda")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "flashhead_edge", "export", "jetson", "plugins_trt")


def checkout() -> Path | None:
    """The folder of the sources that this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if all((root / name).exists() for name in SOURCES) else None


def own_wheel(target: Target, source: Path, work: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Build the wheel.

    Args:
        source: a checkout, of which nothing is changed.
        work: an empty folder to build in.
        folder: where the wheel goes.
    Returns:
        The wheel, and which of its two C libraries it carries: without `_native` heads run on ONNX Runtime's own operators, without `_cuda`
        the cuda backend does not run.
    Raises:
        FlashHeadError: the build failed, or a library needs a newer glibc than the target's.
    """
    need_pip()
    copy, dist = work / "source", work / "dist"
    copy.mkdir(parents=True)
    for name in SOURCES:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info"))
        else:
            shutil.copy2(source / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **build_environment(target)})
    made = sorted(dist.glob("*.whl"))
    if result.returncode or len(made) != 1:
        why = next((line for line in reversed((result.stderr or result.stdout).splitlines()) if line.strip()), "it said nothing").strip()
        raise FlashHeadError(
            f"flashhead-edge's wheel for {target.name}: the build failed ({why}); install setuptools and wheel, or pass the wheel by --find-links"
        )
    libraries = _checked_libraries(made[0], target)
    return _named(made[0], target, bool(libraries), folder), libraries


def build_environment(target: Target) -> dict[str, str]:
    """What makes setuptools build for the target: a cross-compiler's names, or a compiler that does not exist where there is none."""
    values = {"_PYTHON_HOST_PLATFORM": f"linux-{target.machine}"}
    if platform.machine() == target.machine and sys.platform == "linux":
        return values
    prefix = f"{target.machine}-linux-gnu-"
    if not all(shutil.which(prefix + tool) for tool in ("gcc", "g++", "nm")):
        prefix = "no-compiler-for-" + prefix
    return {
        **values,
        "CC": f"{prefix}gcc",
        "CXX": f"{prefix}g++",
        "LDSHARED": f"{prefix}gcc -shared",
        "LDCXXSHARED": f"{prefix}g++ -shared",
        "NM": f"{prefix}nm",
        "CFLAGS": "-fPIC",
        "LDFLAGS": "",
    }


def _checked_libraries(wheel: Path, target: Target) -> tuple[str, ...]:
    with zipfile.ZipFile(wheel) as archive:
        found = {name.rsplit("/", 1)[-1].split(".")[0]: name for name in archive.namelist() if name.endswith(".so")}
        for member in found.values():
            needed = needed_glibc(archive.read(member))
            if needed > target.glibc:
                raise FlashHeadError(
                    f"{member}: it needs glibc {needed[0]}.{needed[1]}, expected {target.glibc_text} or older for {target.name}; "
                    "build it with an older cross-compiler, or pass a wheel by --find-links"
                )
    return tuple(name for name in LIBRARIES if name in found)


def needed_glibc(library: bytes) -> tuple[int, int]:
    """The newest glibc whose symbols an ELF library names: version names stand in its table of strings."""
    return max(((int(a), int(b)) for a, b in re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library)), default=(2, 0))


def _named(wheel: Path, target: Target, compiled: bool, folder: Path) -> Path:
    """The wheel under the tags that pip looks for: manylinux of the target's glibc, or any platform where nothing in it is compiled."""
    tags = ["--platform-tag", target.platforms[0]] if compiled else ["--python-tag", "py3", "--abi-tag", "none", "--platform-tag", "any"]
    try:
        result = subprocess.run([sys.executable, "-m", "wheel", "tags", *tags, str(wheel)], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise FlashHeadError(f"{wheel.name}: its tags cannot be set ({first_line(Exception(error.stderr))}); install wheel 0.43 or newer") from error
    named = wheel.with_name(result.stdout.split()[-1])
    return Path(shutil.move(named, folder / named.name))
