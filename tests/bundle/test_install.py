"""install.sh, run: what it makes, what it refuses, and that whatever fails leaves what was there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_wheels import write_wheel

from flashhead_edge.bundle import bundle, target_named
from flashhead_edge.errors import FlashHeadError
from flashhead_edge.jetson.cuda_folder import program_settings
from flashhead_edge.program.ahead import ready_program
from flashhead_edge.program.head import Device

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64" or sys.version_info[:2] != (3, 11), reason="the bundles are for Python 3.11 on x86-64 Linux"
)
TARGET = "linux-x86_64-cp311"
Script = Callable[..., subprocess.CompletedProcess[str]]


def run(script: Path, *arguments: object, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """install.sh as a person would run it, after the shell commands `before`, in namespaces of their own where there are such."""
    command = ["sh", str(script), *map(str, arguments)]
    if before:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", before + '; exec "$@"', "sh", *command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path, **environment}, check=False)


@pytest.fixture(scope="module")
def archives(model: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of three states of one model: the first, a second one, and one that does not run."""
    folder, found = tmp_path_factory.mktemp("archives"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        for name in ("first", "second", "refused"):
            copy = shutil.copytree(model, folder / name)
            (copy / name).write_text(name)
            found[name] = folder / f"{name}.tar"
            bundle(copy, found[name], target=TARGET, find_links=[wheels])
    return found


@pytest.fixture
def unpacked(archives: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def unpack(name: str = "first") -> Path:
        """The installer of a bundle that was unpacked."""
        out = tmp_path / f"unpacked-{name}"
        with tarfile.open(archives[name]) as archive:
            archive.extractall(out, filter="data")
        (script,) = out.glob("*/install.sh")
        return script

    return unpack


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "prefix"


def state(prefix: Path) -> dict[str, bytes | str]:
    """All that lies under a folder, and where its links lead; the lock's file apart."""
    return {
        str(p.relative_to(prefix)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(prefix.rglob("*"))
        if (p.is_symlink() or p.is_file()) and p.name != ".lock"
    }


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("install.sh: ")
    return line


def installed(prefix: Path) -> str:
    """Which model is the current one."""
    return next(name for name in ("first", "second", "refused") if (prefix / "current/model" / name).exists())


def test_installed_upgraded_back_and_gone(unpacked: Callable[[str], Path], prefix: Path) -> None:
    first, second = unpacked("first"), unpacked("second")
    result = run(first, "--prefix", prefix)
    assert result.returncode == 0, result.stderr
    assert installed(prefix) == "first" and not (prefix / "previous").exists()
    called = subprocess.run([prefix / "bin/flashhead", "inspect", prefix / "current/model"], capture_output=True, text=True, check=True)
    assert called.stdout == "{}\n"
    assert (prefix / "current/model/read me first.txt").read_text() == "hello\n"
    unit = (prefix / "flashhead.service").read_text()
    assert f"ExecStart={prefix}/current/bin/flashhead serve {prefix}/current/model" in unit and "@" not in unit

    before = state(prefix)
    again = run(first, "--prefix", prefix)  # the same once more changes nothing
    assert again.returncode == 0 and "is there already" in again.stdout and state(prefix) == before

    assert run(second, "--prefix", prefix).returncode == 0
    assert installed(prefix) == "second"
    assert run(second, "back", "--prefix", prefix).returncode == 0
    assert installed(prefix) == "first"
    assert run(second, "back", "--prefix", prefix).returncode == 0
    assert installed(prefix) == "second"
    assert len(list((prefix / "versions").iterdir())) == 2

    assert run(second, "uninstall", "--prefix", prefix).returncode == 0
    assert not prefix.exists()
    assert "no bundle is installed there" in one_sentence(run(second, "uninstall", "--prefix", prefix))


def test_what_a_person_put_beside_it_is_kept(unpacked: Callable[[], Path], prefix: Path) -> None:
    script = unpacked()
    assert run(script, "--prefix", prefix).returncode == 0
    (prefix / "notes.txt").write_text("mine")
    result = run(script, "uninstall", "--prefix", prefix)
    assert result.returncode == 0 and "is kept" in result.stderr
    assert state(prefix) == {"notes.txt": b"mine"}
    assert "it holds something else" in one_sentence(run(script, "--prefix", prefix))
    assert state(prefix) == {"notes.txt": b"mine"}


def test_back_without_an_upgrade(unpacked: Callable[[], Path], prefix: Path) -> None:
    script = unpacked()
    assert run(script, "--prefix", prefix).returncode == 0
    assert "expected one upgrade at least" in one_sentence(run(script, "back", "--prefix", prefix))
    assert installed(prefix) == "first"


DAMAGES = {
    "a byte of a wheel": (lambda top: flip(next(top.glob("wheels/flashhead*"))), "its content is not the bundle's (SHA-256)"),
    "a byte of the model": (lambda top: flip(top / "model/config.json"), "model/config.json: its content is not the bundle's"),
    "a byte of the installer": (lambda top: flip(top / "install.sh", 7), "install.sh: its content is not the bundle's"),
    "a file is gone": (lambda top: (top / "model/tokenizer.json").unlink(), "model/tokenizer.json: the file is missing"),
    "a file too many": (lambda top: (top / "wheels/other-1-py3-none-any.whl").write_bytes(b""), "SHA256SUMS does not name it"),
    "no list": (lambda top: (top / "SHA256SUMS").unlink(), "SHA256SUMS: the file is missing or empty"),
    "a digit of the list": (lambda top: flip(top / "SHA256SUMS"), "SHA256SUMS: a line is damaged"),
    "half a list": (lambda top: cut(top / "SHA256SUMS", 0.5), "SHA256SUMS"),
    "an empty list": (lambda top: cut(top / "SHA256SUMS", 0), "SHA256SUMS: the file is missing or empty"),
}


def flip(path: Path, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundle_is_refused_and_changes_nothing(damage: str, unpacked: Callable[[], Path], prefix: Path) -> None:
    script = unpacked()
    harm, said = DAMAGES[damage]
    harm(script.parent)
    assert said in one_sentence(run(script, "--prefix", prefix))
    assert not prefix.exists()
    assert said in one_sentence(run(script, "check"))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_archive_that_was_copied_in_part(share: float, archives: dict[str, Path], tmp_path: Path, prefix: Path) -> None:
    """tar stops at the end of what there is; who goes on all the same is told what is missing."""
    half = tmp_path / "half.tar"
    half.write_bytes(archives["first"].read_bytes()[: int(archives["first"].stat().st_size * share)])
    out = tmp_path / "half"
    out.mkdir()
    assert subprocess.run(["tar", "xf", half, "-C", out], capture_output=True, check=False).returncode != 0
    scripts = list(out.glob("*/install.sh"))
    assert scripts or share < 0.1
    for script in scripts:
        result = run(script, "--prefix", prefix)
        assert result.returncode != 0 or not result.stdout  # an installer that was cut off does nothing
        assert not prefix.exists()


def test_installer_that_was_cut_off_does_nothing(unpacked: Callable[[], Path], prefix: Path) -> None:
    """Wherever it ends: all is in functions, and the call is the last line."""
    script = unpacked()
    whole = script.read_bytes()
    for size in range(200, len(whole) - 10, 577):
        script.write_bytes(whole[:size])
        run(script, "--prefix", prefix)
        assert not prefix.exists()


def test_model_that_does_not_run_is_not_switched_to(unpacked: Callable[[str], Path], prefix: Path) -> None:
    assert run(unpacked("first"), "--prefix", prefix).returncode == 0
    before = state(prefix)
    result = run(unpacked("refused"), "--prefix", prefix)
    assert re.search(r"the check of what was installed failed; what was begun is removed, \S+ stays as it was", one_sentence(result))
    assert "the model is refused" in result.stderr
    assert state(prefix) == before
    fresh = prefix.with_name("fresh")
    assert "nothing is installed" in one_sentence(run(unpacked("refused"), "--prefix", fresh))
    assert not fresh.exists()


def test_bundle_for_another_machine(model: Path, wheels: Path, unpacked: Callable[[], Path], prefix: Path, tmp_path: Path, offline: None) -> None:
    bundle(model, tmp_path / "arm.tar", target="linux-aarch64-cp311", find_links=[wheels])
    with tarfile.open(tmp_path / "arm.tar") as archive:
        archive.extractall(tmp_path / "arm", filter="data")
    (script,) = (tmp_path / "arm").glob("*/install.sh")
    assert "this machine: Python says linux-x86_64, expected linux-aarch64 for linux-aarch64-cp311" in one_sentence(run(script, "--prefix", prefix))
    empty = tmp_path / "tools"
    empty.mkdir()
    for tool in ("sh", "id", "dirname", "sed"):
        (empty / tool).symlink_to(shutil.which(tool) or tool)
    assert "Python 3.11: it was not found" in one_sentence(run(unpacked(), "--prefix", prefix, PATH=str(empty)))
    assert not prefix.exists()


@pytest.mark.parametrize(("word", "said"), [("instal", "instal: not known"), ("--prefix", "--prefix: a folder is missing")])
def test_words_that_it_does_not_know(word: str, said: str, unpacked: Callable[[], Path]) -> None:
    assert said in one_sentence(run(unpacked(), word))


def test_prefix_that_a_unit_file_cannot_hold(unpacked: Callable[[], Path], tmp_path: Path) -> None:
    assert "expected a plain path" in one_sentence(run(unpacked(), "--prefix", tmp_path / "my programs"))


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_installers_at_once(unpacked: Callable[[], Path], prefix: Path) -> None:
    script = unpacked()
    assert run(script, "--prefix", prefix).returncode == 0
    with subprocess.Popen(["flock", prefix / ".lock", "sh", "-c", "echo held; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert "another install.sh is at work there" in one_sentence(run(script, "--prefix", prefix))
        holder.communicate("\n")


@pytest.fixture
def for_a_gpu(runnable: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installer of a checkpoint's bundle, as a Jetson's is, for this machine; kernels are left for later, as where NVRTC is not to be had."""
    target = replace(target_named(TARGET), capabilities=(87,), nvrtc="nvidia-cuda-nvrtc>=11,<12")
    monkeypatch.setattr("flashhead_edge.bundle.make.target_named", lambda name: target)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    write_wheel(tmp_path / "links", "nvidia-cuda-nvrtc", "11.8")
    bundle(runnable, tmp_path / "gpu.tar", target=TARGET, find_links=[wheels, tmp_path / "links"])
    with tarfile.open(tmp_path / "gpu.tar") as archive:
        archive.extractall(tmp_path / "gpu", filter="data")
    (script,) = (tmp_path / "gpu").glob("*/install.sh")
    return script


def test_what_was_made_ahead_lies_where_the_backend_looks(for_a_gpu: Path, prefix: Path) -> None:
    """In the environment, so that a service finds it as its installer does; the model that was copied has the program's key."""
    result = run(for_a_gpu, "--prefix", prefix)
    assert result.returncode == 0, result.stderr
    model, share = prefix / "current/model", prefix / "current/share/flashhead-edge"
    settings = program_settings(json.loads((model / "config.json").read_text()))
    for multiprocessors in (4, 8, 14, 16):
        assert ready_program(model, **settings, device=Device(multiprocessors, 163 << 10, 87), base=share) is not None
    python = [str(prefix / "current/bin/python"), "-c", "import sys; print(sys.prefix)"]
    there = subprocess.run(python, capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(there) / "share/flashhead-edge").samefile(share)
    weights = next(for_a_gpu.parent.glob("ahead/programs/*/weights.safetensors"))
    flip(weights, weights.stat().st_size - 1)
    assert "weights.safetensors: its content is not the bundle's" in one_sentence(run(for_a_gpu, "check"))


# ---- interrupted


def begun(script: Path, prefix: Path, log: Path) -> subprocess.Popen[bytes]:
    """install.sh in a process group of its own, in the middle of its work: the environment is there, the installation is not complete."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["sh", script, "--prefix", prefix], stdout=said, stderr=said, env={**os.environ, "PATH": path}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell keeps ignoring what it was started with
        )  # fmt: skip
    end = time.monotonic() + 60
    while not any(not (p.parent.parent / ".complete").exists() for p in prefix.glob("versions/*/bin/python")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_installation_is_undone(sign: signal.Signals, unpacked: Callable[[str], Path], prefix: Path, tmp_path: Path) -> None:
    assert run(unpacked("first"), "--prefix", prefix).returncode == 0
    before = state(prefix)
    process = begun(unpacked("second"), prefix, tmp_path / "log")
    os.killpg(process.pid, sign)
    assert process.wait(60) == 1
    assert "stays as it was" in (tmp_path / "log").read_text()
    assert state(prefix) == before


def test_killed_installation_is_cleared_by_the_next(unpacked: Callable[[str], Path], prefix: Path, tmp_path: Path) -> None:
    """As after the power went: the old version runs on, what was half there goes."""
    assert run(unpacked("first"), "--prefix", prefix).returncode == 0
    process = begun(unpacked("second"), prefix, tmp_path / "log")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert installed(prefix) == "first" and len(list((prefix / "versions").iterdir())) == 2
    assert run(next(tmp_path.glob("unpacked-first/*/install.sh")), "--prefix", prefix).returncode == 0
    assert installed(prefix) == "first" and len(list((prefix / "versions").iterdir())) == 1


# ---- the real thing


@pytest.mark.slow
def test_real_bundle_answers(model: Path, prefix: Path, tmp_path: Path) -> None:
    """Real wheels, flashhead-edge's own built here: what is installed says what this environment says, with nothing from it."""
    try:
        bundle(model, tmp_path / "real.tar", target=TARGET)
    except FlashHeadError as error:
        if "pip download failed" in str(error):
            pytest.skip(f"no package index here: {error}")
        raise
    with tarfile.open(tmp_path / "real.tar") as archive:
        archive.extractall(tmp_path / "real", filter="data")
    (script,) = (tmp_path / "real").glob("*/install.sh")
    result = run(script, "--prefix", prefix)
    assert result.returncode == 0, result.stderr
    arguments = ["generate", str(prefix / "current/model"), "--prompt", "ab", "--raw", "--max-new-tokens", "8"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    answers = [
        subprocess.run([command, *arguments], capture_output=True, check=True, env=clean, cwd=tmp_path).stdout
        for command in (prefix / "bin/flashhead", Path(sys.executable).parent / "flashhead")
    ]
    assert answers[0] == answers[1] and answers[0].strip()
    size = sum(p.lstat().st_blocks * 512 for p in prefix.rglob("*"))
    needed = re.search(r"^NEEDED_KIB='(\d+)'$", script.read_text(), re.MULTILINE)
    assert needed and size <= int(needed[1]) << 10  # else the check of the disk would promise too much


FIRST_START = """
import json, sys
from functools import partial
from pathlib import Path
from flashhead_edge.jetson import cuda_ahead, cuda_kernels
from flashhead_edge.jetson.cuda_folder import program_settings
from flashhead_edge.jetson.cuda_program import dry_pass
from flashhead_edge.jetson.cuda_session import planned_model
from flashhead_edge.program.ahead import ready_program
from flashhead_edge.program.head import Device

device = Device(8, 163 << 10, 87)
program = ready_program(Path(sys.argv[1]), **program_settings(json.loads(Path(sys.argv[1], "config.json").read_text())), device=device)
model = planned_model(program, cuda_ahead.facts_of(device))
ready = cuda_kernels.ready(partial(dry_pass, model), model.facts)
print(json.dumps([ready.kernels, ready.compiled, ready.nvrtc]))
"""


@pytest.mark.slow
def test_real_checkpoint_s_first_start_makes_nothing(runnable: Path, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's bundle for this machine, real wheels and kernels for an Orin: what is installed has all code that an Orin Nano launches, without NVRTC's help.

    The driver is asked for nothing here: a pass over the launchers that only notes their kernels.
    """
    target = replace(target_named(TARGET), capabilities=(87,), nvrtc=target_named("jetpack6").nvrtc)
    monkeypatch.setattr("flashhead_edge.bundle.make.target_named", lambda name: target)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        result = bundle(runnable, tmp_path / "real.tar", target=TARGET)
    except FlashHeadError as error:
        if "pip download failed" in str(error):
            pytest.skip(f"no package index here: {error}")
        raise
    assert result.ahead is not None and result.ahead.nvrtc == "12.6", result.notes
    with tarfile.open(tmp_path / "real.tar") as archive:
        archive.extractall(tmp_path / "real", filter="data")
    (script,) = (tmp_path / "real").glob("*/install.sh")
    installed = run(script, "--prefix", prefix)
    assert installed.returncode == 0, installed.stderr  # `flashhead inspect` has read the checkpoint, without torch
    nowhere = {"PATH": os.environ["PATH"], "HOME": "/proc", "XDG_CACHE_HOME": "/proc"}
    command = [prefix / "current/bin/python", "-c", FIRST_START, prefix / "current/model"]
    kernels, compiled, nvrtc = json.loads(subprocess.run(command, capture_output=True, check=True, env=nowhere, cwd=tmp_path).stdout)
    assert kernels > 10 and (compiled, nvrtc) == (0, "")


# ---- a full disk


def can_mount() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


def on_disk(script: Path, new: Path | None, prefix: Path, first: str, then: str) -> subprocess.CompletedProcess[str]:
    """Install on a file system with options `first`, and, with `new`, that bundle after it was remounted with `then`; its final state goes to prefix."""
    prefix.mkdir()
    disk = prefix.with_name("disk")
    disk.mkdir(exist_ok=True)
    before = f"mount -t tmpfs -o {first} none {disk}"
    if new is not None:
        before += f" && sh {script} --prefix {disk}/p >/dev/null && mount -o remount,{then} {disk}"
    ending = f'; sh "$0" --prefix {disk}/p; code=$?; [ ! -e {disk}/p ] || cp -a {disk}/p/. {prefix}; exit $code'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", before + ending, str(new or script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}, check=False)


@pytest.mark.skipif(not can_mount(), reason="a file system of a chosen size cannot be mounted here")
class TestFullDisk:
    def test_too_small_is_said_before_anything_is_written(self, unpacked: Callable[[], Path], prefix: Path) -> None:
        result = on_disk(unpacked(), None, prefix, "size=4m", "")
        assert re.search(r"\d+ MiB are needed, [34] MiB are free: the check of the disk failed; .* nothing is installed", one_sentence(result))
        assert state(prefix) == {}

    @pytest.mark.parametrize("inodes", [2, 5, 9, 14, 20])
    def test_full_while_a_first_version_is_installed(self, inodes: int, unpacked: Callable[[], Path], prefix: Path) -> None:
        """df says that there is room, but no file can be made any more."""
        result = on_disk(unpacked(), None, prefix, f"size=200m,nr_inodes={inodes}", "")
        assert "the disk is full" in one_sentence(result)
        assert state(prefix) == {}

    @pytest.mark.slow
    def test_full_at_any_step_of_an_upgrade_leaves_the_old_version(self, unpacked: Callable[[str], Path], prefix: Path) -> None:
        """One file more each time, until it succeeds: the installation is the old one or the new one."""
        first, second = unpacked("first"), unpacked("second")
        run(first, "--prefix", prefix.with_name("counted"))
        used = len(list(prefix.with_name("counted").rglob("*"))) + 2
        outcomes = []
        for more in range(0, used, 5):
            shutil.rmtree(prefix, ignore_errors=True)
            result = on_disk(first, second, prefix, "size=200m,nr_inodes=4000", f"nr_inodes={used + more}")
            outcomes.append(result.returncode)
            assert installed(prefix) == ("first" if result.returncode else "second"), result.stderr
            assert len(list((prefix / "versions").iterdir())) == (1 if result.returncode else 2)
            if result.returncode == 0:
                break
        assert outcomes[0] == 1 and outcomes[-1] == 0 and len(outcomes) > 3
