"""The wheel: built, installed into a fresh environment, imported from there; and the editable installation."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

IMPORT = (
    "import flashhead_edge, flashhead_edge.export, flashhead_edge.jetson, flashhead_edge.errors\n"
    "print(flashhead_edge.__version__, flashhead_edge.__file__, flashhead_edge.export.__file__, flashhead_edge.jetson.__file__, sep='\\n')"
)


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, timeout=240, env=os.environ | environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the distribution is made from, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, cwd=root, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (root / name).is_file() and not name.startswith(("tests/", "docs/")):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (found,) = out.glob("*.whl")
    return found


def libraries(wheel: Path) -> list[str]:
    return [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith((".so", ".pyd"))]


@pytest.mark.skipif(os.name == "nt" or shutil.which("cc") is None, reason="no C compiler is called cc here")
def test_wheel_carries_the_operators_of_onnx_runtime_for_every_python(wheel: Path, tmp_path: Path) -> None:
    assert "flashhead_edge/jetson/_native.abi3.so" in libraries(wheel)
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    python = environment(tmp_path / "venv", wheel)
    said = run(python, "-c", "import flashhead_edge.jetson._native as native; print(native.__doc__, native.vector_unit)", cwd=tmp_path)
    assert "Operators for ONNX Runtime" in said and said.split()[-1] in ("plain", "avx2", "avx512vnni")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
def test_wheel_carries_the_launchers_of_the_cuda_kernels(wheel: Path, tmp_path: Path) -> None:
    """Made by a C++ compiler without CUDA; it loads where there is no GPU, and nothing of it but its own interface is seen from outside."""
    assert libraries(wheel) == ["flashhead_edge/jetson/_cuda.abi3.so", "flashhead_edge/jetson/_native.abi3.so"]
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("flashhead_edge/jetson/_cuda.abi3.so", tmp_path)
    code = "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.fh_kernel.restype = ctypes.c_char_p; print(l.fh_kernel(0, ctypes.byref(ctypes.c_char_p())))"
    assert "flashhead_advance" in run(sys.executable, "-c", code, library, cwd=tmp_path)
    seen = [line.split() for line in run("nm", "-D", "--defined-only", library, cwd=tmp_path).splitlines()]
    assert {name for *_, name in seen if not name.startswith("fh_")} == set()


@pytest.mark.skipif(os.name == "nt", reason="the name of the compiler cannot be set there")
def test_without_a_compiler_the_wheel_is_built_without_the_operators(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.so"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy, cwd=copy, CC="no-such-compiler")
    (built,) = tmp_path.glob("*.whl")
    assert libraries(built) == []
    assert run(environment(tmp_path / "venv", built), "-c", IMPORT, cwd=tmp_path)


@pytest.mark.skipif(os.name == "nt" or shutil.which("git") is None, reason="needs git, and a compiler whose name can be set")
def test_an_installed_package_knows_the_commit_that_it_was_built_of(source: Path, tmp_path: Path) -> None:
    """Its records say it, also where the environment lies in another repository."""
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.so"))
    for command in (("init", "-q"), ("add", "-A"), ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x")):
        run("git", *command, cwd=copy)
    wanted = run("git", "rev-parse", "--short", "HEAD", cwd=copy).strip()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy, cwd=copy, CC="no-such-compiler")
    other = tmp_path / "other"
    other.mkdir()
    run("git", "init", "-q", cwd=other)
    (built,) = tmp_path.glob("*.whl")
    found = run(environment(other / "venv", built), "-c", "from flashhead_edge.bench.provenance import commit; print(commit())", cwd=other).strip()
    assert found.startswith(wanted) or found.removesuffix("-dirty") == wanted


def environment(folder: Path, *arguments: object) -> Path:
    """A fresh virtual environment with one thing installed into it, without its dependencies; its python.

    pip comes from outside (`--python`), so that making the environment takes a second.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", *arguments, cwd=folder.parent)
    return python


def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel)
    version, *files = run(python, "-c", IMPORT, cwd=tmp_path).split("\n")[:4]
    assert version == wheel.name.split("-")[1]
    assert all(Path(f).is_relative_to(tmp_path / "venv") for f in files)
    assert [Path(f).parent.name for f in files] == ["flashhead_edge", "export", "jetson"]


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, source: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {f"flashhead_edge/{p.relative_to(source / 'flashhead_edge').as_posix()}" for p in (source / "flashhead_edge").rglob("*.py")}
    for room in ("export", "jetson"):
        want |= {f"flashhead_edge/{p.relative_to(source).as_posix()}" for p in (source / room).rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == want
    assert "flashhead_edge/py.typed" in names
    assert "flashhead_edge/commit.txt" not in names  # of a tree without git
    rooms = {"sources": "kernels", "plugins": "plugins", "nvrtc": "nvrtc"}
    folders = {name: source / "plugins_trt" / room for name, room in rooms.items()}
    sources = {f"flashhead_edge/kernels/{name}/{p.relative_to(f).as_posix()}" for name, f in folders.items() for p in f.rglob("*") if p.is_file()}
    sources.add("flashhead_edge/bench/dense_rows.cu")  # a rival of `bench decode`
    assert {n for n in names if n.endswith((".cu", ".cuh", ".h", ".cpp", ".map"))} == sources
    assert {n.split("/")[0].split("-")[0].removesuffix(".dist") for n in names} == {"flashhead_edge"}


def test_wheel_names_its_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert metadata["Name"] == "flashhead-edge"
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        assert "torch" not in [r.split(">")[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
        assert "flashhead = flashhead_edge.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_editable_installation_imports_both_outer_rooms(source: Path, tmp_path: Path) -> None:
    """`pip install -e .`: setuptools' finder serves export/ and jetson/ under the package's name, from any folder.

    The editable wheel is made by the build backend itself, as pip would ask it to, and installed like any other.
    """
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    python = environment(tmp_path / "venv", *tmp_path.glob("*.whl"))
    files = run(python, "-c", IMPORT, cwd=tmp_path).split("\n")[1:4]
    assert [Path(f) for f in files] == [source / "flashhead_edge/__init__.py", source / "export/__init__.py", source / "jetson/__init__.py"]
