"""What goes into a bundle: wheels of the target alone, all that they require there, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from small_wheels import elf, write_wheel

from flashhead_edge import __version__
from flashhead_edge.bundle import TARGETS, Target, bundle, target_named
from flashhead_edge.bundle.ahead import devices_of, make_ahead, nvrtc_for
from flashhead_edge.bundle.own import build_environment, checkout, needed_glibc, own_wheel
from flashhead_edge.bundle.wheels import check_wheel, download, missing, pip_options
from flashhead_edge.errors import CheckpointError, EngineError, FlashHeadError, SettingsError, UnsupportedModelError
from flashhead_edge.jetson import cuda_ahead, cuda_kernels
from flashhead_edge.jetson.board import MODULES, SHARED_BYTES
from flashhead_edge.jetson.cuda_program import dry_pass
from flashhead_edge.jetson.cuda_session import planned_model
from flashhead_edge.jetson.nvrtc import find_nvrtc
from flashhead_edge.program.ahead import ready_program

JETSONS = [t for t in TARGETS if t.gpu]


def test_archive_holds_what_its_list_says(model: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    result = bundle(model, tmp_path / "a.tar", target="jetpack7", find_links=[wheels, nvrtc(tmp_path)])
    assert hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest() == result.sha256
    with tarfile.open(tmp_path / "a.tar") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "out", filter="data")
    top = tmp_path / "out" / f"flashhead-{__version__}-jetpack7"
    assert names[:2] == [f"{top.name}/SHA256SUMS", f"{top.name}/install.sh"]  # first, so that a cut copy has them
    listed = dict(reversed(line.split("  ", 1)) for line in (top / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert listed.keys() == files
    assert all(hashlib.sha256((top / name).read_bytes()).hexdigest() == value for name, value in listed.items())
    assert {p.name for p in model.iterdir()} <= {p.name for p in (top / "model").iterdir()}
    manifest = json.loads((top / "bundle.json").read_text())
    assert manifest["target"]["name"] == "jetpack7" and manifest["model"] == "onnx"
    settings = dict(re.findall(r"^([A-Z_]+)='([^']*)'$", (top / "install.sh").read_text(), re.MULTILINE))
    assert settings["PYTHON"] == "3.12" and settings["PLATFORM"] == "linux-aarch64" and settings["GLIBC"] == "2.39"
    assert int(settings["NEEDED_KIB"]) << 10 >= result.installed_bytes
    bundle(model, tmp_path / "b.tar", target="jetpack7", find_links=[wheels, tmp_path / "nvrtc"])
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()


def nvrtc(folder: Path) -> Path:
    """A folder with wheels named as NVRTC's and NVML's."""
    write_wheel(folder / "nvrtc", "nvidia-ml-py", "13.1")
    write_wheel(folder / "nvrtc", "nvidia-cuda-nvrtc", "13.0.88", tag="py3-none-manylinux2014_aarch64")
    return folder / "nvrtc"


def test_checkpoint_for_a_jetson(runnable: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    """There the cuda backend runs it; its environment sees the system's TensorRT, a Debian's does not."""
    result = bundle(runnable, tmp_path / "a.tar", target="jetpack7", find_links=[wheels, nvrtc(tmp_path)])
    assert result.model == "checkpoint" and result.libraries is None  # the wheel was given: what it carries is not ours to say
    with tarfile.open(tmp_path / "a.tar") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
        script = archive.extractfile(f"flashhead-{__version__}-jetpack7/install.sh")
        assert script is not None and b"SYSTEM_PACKAGES='--system-site-packages'" in script.read()
    # JetPack 7 is Thor's and Orin's: a program for every GPU that one of them may show; no NVRTC of this machine is among the folders
    assert result.ahead is not None and len(result.ahead.devices) == 18 and {"11.0 x 20", "8.7 x 16", "8.7 x 4"} <= set(result.ahead.devices)
    assert sum(re.fullmatch(r"ahead/programs/\w{32}/program-\d+-\d+-\d+\.json", name) is not None for name in names) == 18
    assert result.ahead.kernels == 0 and any(re.match(r"the kernels are not compiled ahead.*nvidia-cuda-nvrtc.* for this machine: ", n) for n in result.notes)
    assert result.installed_bytes > result.model_bytes + result.ahead.bytes
    assert "model/flash_head_assets/index.safetensors" in names and "wheels/nvidia_cuda_nvrtc-13.0.88-py3-none-manylinux2014_aarch64.whl" in names


def test_gpus_of_a_target_are_those_of_its_modules() -> None:
    """Each module as it is sold; slow power modes switch off multiprocessors, two by two."""
    sizes = {t.name: {(d.capability, d.multiprocessors): d.shared_bytes for d in devices_of(t)} for t in JETSONS}
    for name, shared in (("jetpack6", {87: 163 << 10}), ("jetpack7", {87: 163 << 10, 110: 227 << 10})):
        modules = [m for m in MODULES if m.capability in shared]
        assert len(modules) >= 6 and all(sizes[name][m.capability, m.multiprocessors] == shared[m.capability] for m in modules)
    assert list(sizes["jetpack6"]) == [(87, n) for n in (16, 14, 12, 10, 8, 6, 4, 2)]
    assert {m.capability for m in MODULES} <= SHARED_BYTES.keys() and devices_of(target_named("linux-aarch64-cp311")) == []


def test_checkpoint_that_no_board_can_run_is_refused_here(runnable: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    copy = shutil.copytree(runnable, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))
    with pytest.raises(UnsupportedModelError, match="bloom"):
        bundle(copy, tmp_path / "out.tar", target="jetpack7", find_links=[wheels, nvrtc(tmp_path)])
    assert not (tmp_path / "out.tar").exists()


def test_checkpoint_needs_launchers(runnable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs it there: without a cross-compiler that is said before any wheel is fetched."""
    monkeypatch.setattr("flashhead_edge.bundle.own.shutil.which", lambda name: None)
    monkeypatch.setattr("flashhead_edge.bundle.own.platform.machine", lambda: "riscv64")
    monkeypatch.setattr("flashhead_edge.bundle.make.download", None)
    with pytest.raises(FlashHeadError, match=r"on jetpack6 the cuda backend alone runs a checkpoint, .*install g\+\+-aarch64-linux-gnu"):
        bundle(runnable, tmp_path / "out.tar", target="jetpack6")
    assert list(tmp_path.iterdir()) == []


def test_nvrtc_of_this_machine_is_taken_where_its_version_is_the_target_s(tmp_path: Path, offline: None) -> None:
    """Another version's code might not load on the board: a wheel is looked for, and where there is none that is said."""
    here = find_nvrtc()
    same = replace(target_named("jetpack7"), nvrtc=f"nvidia-cuda-nvrtc=={here.version[0]}.{here.version[1]}")
    assert nvrtc_for(same, tmp_path).path == here.path and list(tmp_path.iterdir()) == []
    older = replace(same, nvrtc="nvidia-cuda-nvrtc<12,>=11")
    with pytest.raises(EngineError, match=r"^nvidia-cuda-nvrtc<12,>=11 for this machine: pip download failed \(.*\), expected a wheel; check the network$"):
        nvrtc_for(older, tmp_path)
    write_wheel(tmp_path / "links", "nvidia-cuda-nvrtc", "11.8")
    with pytest.raises(EngineError, match=r"^nvidia_cuda_nvrtc-11\.8-py3-none-any\.whl: its libnvrtc\.so cannot be loaded"):
        nvrtc_for(older, tmp_path, [tmp_path / "links"])


@pytest.mark.slow
@pytest.mark.parametrize("target", JETSONS, ids=lambda t: t.name)
def test_first_start_on_the_board_makes_nothing(target: Target, runnable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the model finds its program, and every kernel that it launches, with NVRTC of the target's version and none at hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = make_ahead(target, runnable, tmp_path / "share", tmp_path / "work")
    if any("pip download failed" in note for note in made.notes):
        pytest.skip(f"no package index here: {made.notes}")
    assert made.kernels > 10 and made.nvrtc == re.search(r">=([\d.]+)", target.nvrtc)[1]  # type: ignore[index]
    copy, settings = shutil.copytree(runnable, tmp_path / "copy"), made.settings
    monkeypatch.setattr(cuda_kernels, "ahead_folder", lambda: tmp_path / "share")
    monkeypatch.setattr(cuda_kernels, "find_nvrtc", None)
    for device in devices_of(target):
        monkeypatch.setattr(cuda_kernels, "_held", {})
        program = ready_program(copy, **settings, device=device, base=tmp_path / "share")
        assert program is not None
        model = planned_model(program, cuda_ahead.facts_of(device))
        ready = cuda_kernels.ready(partial(dry_pass, model), model.facts)
        assert ready.kernels > 10 and ready.compiled == 0


def test_conditions_are_those_of_the_target(tmp_path: Path, offline: None) -> None:
    """pip alone would leave out what only an older Python than its own needs, and take what only its own does."""
    write_wheel(tmp_path / "links", "app", "1", requires=["old; python_version < '3.11'", "arm; platform_machine == 'aarch64'", "extra-one; extra == 'more'"])
    write_wheel(tmp_path / "links", "old", "1", requires=["older>=2; python_version < '3.11'"])
    for name, version in (("older", "2"), ("arm", "1"), ("extra-one", "1")):
        write_wheel(tmp_path / "links", name, version)

    def names(target: str, requirement: str) -> set[str]:
        folder = tmp_path / f"{target}-{requirement}"
        folder.mkdir()
        return {p.name.split("-")[0] for p in download(target_named(target), [requirement], folder, [tmp_path / "links"])}

    assert names("jetpack6", "app") == {"app", "old", "older", "arm"}
    assert names("jetpack7", "app[more]") == {"app", "arm", "extra_one"}


def test_what_no_wheel_meets_is_named(tmp_path: Path, offline: None) -> None:
    links = tmp_path / "links"
    write_wheel(links, "app", "1", requires=["fast>=3"])
    write_wheel(links, "fast", "3.1", tag="cp310-cp310-manylinux_2_17_x86_64")  # of another machine
    write_wheel(links, "fast", "2", tag="cp310-cp310-manylinux_2_17_aarch64")  # too old
    folder = tmp_path / "wheels"
    folder.mkdir()
    with pytest.raises(FlashHeadError, match=r"^jetpack6: pip download failed \(.*fast>=3.*\), expected wheels for Python 3\.10, aarch64, glibc 2\.35; "):
        download(target_named("jetpack6"), ["app"], folder, [links])
    assert missing(target_named("jetpack6"), ["app"], [links / "app-1-py3-none-any.whl", links / "fast-2-cp310-cp310-manylinux_2_17_aarch64.whl"]) == [
        "fast>=3"
    ]


@pytest.mark.parametrize(
    ("tag", "machine", "said"),
    [
        ("cp310-cp310-manylinux_2_17_x86_64", 0x3E, "it is of another machine or another Python"),
        ("cp312-cp312-manylinux_2_17_aarch64", 0xB7, "it is of another machine or another Python"),
        ("cp310-cp310-manylinux_2_39_aarch64", 0xB7, "it is of another machine or another Python"),  # of a newer glibc
        ("cp310-cp310-manylinux_2_17_aarch64", 0x3E, "part/lib.so.1 in it is of x86_64"),
        ("py3-none-any", 0x3E, "part/lib.so.1 in it is of x86_64"),
        ("py3-none-manylinux2014_aarch64", 0xF3, "part/lib.so.1 in it is of machine 243"),
    ],
)
def test_wheel_of_another_machine_is_refused(tag: str, machine: int, said: str, tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "part", "1", tag=tag, members={"part/lib.so.1": elf(machine)})
    with pytest.raises(FlashHeadError, match=re.escape(said) + r", expected a wheel for Python 3\.10, aarch64, glibc 2\.35 \(jetpack6\); "):
        check_wheel(path, target_named("jetpack6"))


@pytest.mark.parametrize(
    "tag", ["py3-none-any", "cp38-abi3-manylinux2014_aarch64", "cp310-cp310-manylinux_2_35_aarch64", "py2.py3-none-manylinux_2_28_aarch64"]
)
def test_wheel_of_the_target_is_taken(tag: str, tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "part", "1", tag=tag, members={"part/lib.so": elf(0xB7), "part/text.so": b"no library"})
    check_wheel(path, target_named("jetpack6"))


def test_damaged_wheel_is_named(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "part", "1")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FlashHeadError, match=r"part-1-py3-none-any\.whl: it cannot be read"):
        check_wheel(path, target_named("jetpack6"))


def test_bad_input_writes_nothing(model: Path, checkpoint: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    out = tmp_path / "out.tar"
    with pytest.raises(SettingsError, match=r"^target jetpack5: it is not known, expected one of jetpack6, jetpack7, linux-aarch64-cp311, linux-x86_64-cp311;"):
        bundle(model, out, target="jetpack5")
    with pytest.raises(SettingsError, match="the folder does not exist"):
        bundle(model, tmp_path / "no/out.tar", target="jetpack6")
    with pytest.raises(CheckpointError, match="it is no folder"):
        bundle(tmp_path / "absent", out, target="jetpack6")
    with pytest.raises(
        CheckpointError, match=r"it is a checkpoint model, expected one that linux-x86_64-cp311 runs, by ONNX Runtime; run flashhead export onnx"
    ):
        bundle(checkpoint, out, target="linux-x86_64-cp311", find_links=[wheels])
    with pytest.raises(SettingsError, match=r"it is no folder, expected one with wheels; correct --find-links"):
        bundle(model, out, target="jetpack6", find_links=[tmp_path / "absent"])
    with pytest.raises(FlashHeadError, match=r"pip download failed"):  # NVRTC is nowhere
        bundle(model, out, target="jetpack6", find_links=[wheels])
    assert list(tmp_path.iterdir()) == []


def test_environment_without_pip(model: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashhead_edge.bundle.wheels.find_spec", lambda name: None)
    with pytest.raises(FlashHeadError, match=r"^pip: \S+ does not have it, expected it to fetch and build wheels; type: \S+ -m ensurepip$"):
        bundle(model, tmp_path / "out.tar", target="jetpack6", find_links=[wheels])
    assert list(tmp_path.iterdir()) == []


def test_archive_that_exists_is_kept(model: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    out = tmp_path / "out.tar"
    out.write_text("mine")
    with pytest.raises(SettingsError, match="it exists"):
        bundle(model, out, target="linux-x86_64-cp311", find_links=[wheels])
    broken = tmp_path / "broken"
    shutil.copytree(wheels, broken)
    (broken / "helper_package-1.2-py3-none-any.whl").unlink()
    with pytest.raises(FlashHeadError, match="helper-package>=1"):
        bundle(model, out, target="linux-x86_64-cp311", find_links=[broken], overwrite=True)
    assert out.read_text() == "mine"
    bundle(model, out, target="linux-x86_64-cp311", find_links=[wheels], overwrite=True)
    assert tarfile.is_tarfile(out) and {p.name for p in tmp_path.iterdir()} == {"out.tar", "broken"}


def test_name_that_no_list_of_checksums_can_hold(model: Path, wheels: Path, tmp_path: Path, offline: None) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "two\nlines").write_text("")
    with pytest.raises(CheckpointError, match="a line break or a backslash"):
        bundle(copy, tmp_path / "out.tar", target="linux-x86_64-cp311", find_links=[wheels])


def test_glibc_is_read_from_the_names_of_versions() -> None:
    assert needed_glibc(b"\0GLIBC_2.17\0GLIBC_2.4\0CXXABI_1.3\0GLIBC_2.2.5\0") == (2, 17)
    assert needed_glibc(b"\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_PRIVATE\0") == (2, 34)
    assert needed_glibc(b"") == (2, 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a cross-compiler")
def test_own_wheel_is_cross_compiled(tmp_path: Path) -> None:
    """Both libraries, of the target's architecture, under a tag that JetPack 6's pip takes."""
    source = checkout()
    assert source is not None
    before = {p for p in source.glob("*") if p.name != ".pytest_cache"}
    target = target_named("jetpack6")
    path, libraries = own_wheel(target, source, tmp_path / "work", tmp_path)
    assert libraries == ("_native", "_cuda")
    assert path.name == f"flashhead_edge-{__version__}-cp310-abi3-manylinux_2_35_aarch64.whl"
    check_wheel(path, target)
    with zipfile.ZipFile(path) as archive:
        members = [n for n in archive.namelist() if n.endswith(".so")]
        assert all(archive.read(n)[18:20] == b"\xb7\x00" for n in members) and len(members) == 2
        launchers = archive.read(next(n for n in members if "_cuda" in n))
    # what is made ahead here is looked for there by the same names
    assert all(f"\0{name}\0".encode() in launchers for name in cuda_kernels.kernel_sources())
    assert {p for p in source.glob("*") if p.name != ".pytest_cache"} == before


def test_own_wheel_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for any platform, so that pip takes it there; never this machine's libraries under another's name."""
    monkeypatch.setattr("flashhead_edge.bundle.own.shutil.which", lambda name: None)
    monkeypatch.setattr("flashhead_edge.bundle.own.platform.machine", lambda: "riscv64")
    source, target = checkout(), target_named("jetpack6")
    assert source is not None and build_environment(target)["CC"] == "no-compiler-for-aarch64-linux-gnu-gcc"
    path, libraries = own_wheel(target, source, tmp_path / "work", tmp_path)
    assert libraries == () and path.name == f"flashhead_edge-{__version__}-py3-none-any.whl"
    check_wheel(path, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", JETSONS, ids=lambda t: t.name)
def test_every_wheel_of_a_jetpack_is_resolved_from_the_bundle_alone(target: Target, model: Path, tmp_path: Path) -> None:
    """With pip's platform options and no index, as pip on the board resolves, and with the conditions of its Python."""
    try:
        bundle(model, tmp_path / "out.tar", target=target.name)
    except FlashHeadError as error:
        if "pip download failed" in str(error):
            pytest.skip(f"no package index here: {error}")
        raise
    with tarfile.open(tmp_path / "out.tar") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    (wheels,) = tmp_path.glob("out/*/wheels")
    found = sorted(wheels.glob("*.whl"))
    assert missing(target, [f"flashhead-edge[onnx,serve]=={__version__}", *target.requirements], found) == []
    for path in found:
        check_wheel(path, target)
        with zipfile.ZipFile(path) as archive:  # its tag is a promise: the symbols that it names are what the board's loader looks at
            members = [name for name in archive.namelist() if name.endswith(".so") or ".so." in name]
            assert max([needed_glibc(archive.read(name)) for name in members], default=(2, 0)) <= target.glibc
    command = [sys.executable, "-m", "pip", "download", "--no-index", "--no-deps", "--require-hashes", "--find-links", wheels]
    command += [*pip_options(target), "--dest", tmp_path / "taken", "--requirement", wheels.parent / "requirements.txt"]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(found) - 1 == len((wheels.parent / "requirements.txt").read_text().splitlines())  # all but pip
    if target.python == (3, 10):
        assert any(p.name.startswith("exceptiongroup-") for p in found)  # which only Python 3.10 needs: pip here would not know
