"""Wheels for another machine: downloaded by pip, followed to the last requirement, each checked to be of that machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import BytesParser
from importlib.util import find_spec
from pathlib import Path

from flashhead_edge.bundle.targets import Target
from flashhead_edge.errors import FlashHeadError
from flashhead_edge.progress import Progress, silent

MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}  # e_machine of an ELF file


def pip_options(target: Target) -> list[str]:
    """What tells pip to choose wheels for `target`, whichever Python runs it."""
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.python_text]
    for abi in (f"cp{target.python[0]}{target.python[1]}", "abi3", "none"):
        options += ["--abi", abi]
    for platform in target.platforms:
        options += ["--platform", platform]
    return options


def download(target: Target, requirements: Sequence[str], folder: Path, find_links: Sequence[Path] = (), progress: Progress = silent) -> list[Path]:
    """Fill `folder` with wheels of `requirements` and of all that they require on `target`.

    pip evaluates the conditions of requirements (`python_version < "3.11"`) for the Python that it runs in, not for the target's, so what
    every wheel requires is read again here, with the target's conditions, until nothing is missing.

    Args:
        find_links: folders with wheels that are taken beside the index's.
    Returns:
        The wheels, sorted by name.
    Raises:
        FlashHeadError: pip found no wheel for a requirement, or one is of another machine.
    """
    asked, absent = list(requirements), list(requirements)
    while absent:
        _pip_download(target, asked, folder, find_links, progress)
        wheels = sorted(folder.glob("*.whl"))
        for path in wheels:
            check_wheel(path, target)
        absent = [one for one in missing(target, requirements, wheels) if one not in asked]
        asked += absent
    open_ends = missing(target, requirements, wheels)
    if open_ends:
        raise FlashHeadError(f"{target.name}: wheels of {', '.join(open_ends)} are missing after pip's download; name wheels that fit with --find-links")
    return wheels


def need_pip() -> None:
    """Say that pip is missing before it is called: environments may be made without it."""
    if find_spec("pip") is None:
        raise FlashHeadError(f"pip: {sys.executable} does not have it, expected it to fetch and build wheels; type: {sys.executable} -m ensurepip")


def _pip_download(target: Target, asked: Sequence[str], folder: Path, find_links: Sequence[Path], progress: Progress) -> None:
    need_pip()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += [*pip_options(target), "--dest", str(folder), "--find-links", str(folder)]
    command += [word for path in find_links for word in ("--find-links", str(path))]
    process = subprocess.Popen([*command, "--", *asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    said = []
    with process:
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("Collecting "):
                progress(f"wheels: {line.split()[1]}", None)
    if process.returncode:
        raise FlashHeadError(
            f"{target.name}: pip download failed ({said_last(said)}), expected wheels for Python {target.python_text}, {target.machine}, "
            f"glibc {target.glibc_text}; check the network, or name a folder that has them with --find-links"
        )


def said_last(lines: Sequence[str]) -> str:
    """Of what pip said, the line that says what it could not find, or the last one."""
    found = next((line for line in reversed(lines) if line.startswith("ERROR:") and "requirement" in line), None)
    return (found or next((line for line in reversed(lines) if line), "it said nothing")).removeprefix("ERROR: ").strip()


def missing(target: Target, requirements: Iterable[str], wheels: Iterable[Path]) -> list[str]:
    """Requirements, and requirements of requirements, that no wheel meets on `target`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    have = {}
    for path in wheels:
        name, version, _, _ = parse_wheel_filename(path.name)
        have[name] = (version, path)
    environment = _environment(target)
    open_ones, seen, found = [Requirement(r) for r in requirements], set[str](), list[str]()
    while open_ones:
        one = open_ones.pop(0)
        name = canonicalize_name(one.name)
        plain = f"{one.name}{one.specifier}"
        if name not in have or not one.specifier.contains(have[name][0], prereleases=True):
            if plain not in found:
                found.append(plain)
            continue
        key = f"{name}[{','.join(sorted(one.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        for text in required_by(have[name][1]):
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({**environment, "extra": extra}) for extra in ("", *one.extras)):
                open_ones.append(inner)
    return found


def required_by(path: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        return [str(v) for v in BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])]


def _environment(target: Target) -> dict[str, str]:
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{target.python_text}.0",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{target.python_text}.0",
        "python_version": target.python_text,
        "sys_platform": "linux",
    }


def check_wheel(path: Path, target: Target) -> None:
    """Refuse a wheel whose name, or whose libraries, are of another machine.

    Raises:
        FlashHeadError: it is no wheel, or not one for `target`.
    """
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    wanted = f"a wheel for Python {target.python_text}, {target.machine}, glibc {target.glibc_text} ({target.name})"
    try:
        tags = parse_wheel_filename(path.name)[3]
        with zipfile.ZipFile(path) as archive:
            others = [(n, m) for n in archive.namelist() if (m := _machine(archive, n)) not in (None, target.machine)]
    except (InvalidWheelFilename, zipfile.BadZipFile) as error:
        raise FlashHeadError(f"{path.name}: it cannot be read ({error}), expected {wanted}; remove it and run again") from error
    known = {
        *cpython_tags(target.python, platforms=target.platforms),
        *compatible_tags(target.python, f"cp{target.python[0]}{target.python[1]}", platforms=target.platforms),
    }
    if not tags & known:
        raise FlashHeadError(f"{path.name}: it is of another machine or another Python, expected {wanted}; remove it and run again")
    if others:
        raise FlashHeadError(f"{path.name}: {others[0][0]} in it is of {others[0][1]}, expected {wanted}; build it for that machine")


def _machine(archive: zipfile.ZipFile, name: str) -> str | None:
    """The architecture that a member is compiled for; None where it is no ELF file."""
    if not name.endswith(".so") and ".so." not in name.rsplit("/", 1)[-1]:
        return None
    with archive.open(name) as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF":
        return None
    code = int.from_bytes(head[18:20], "little")
    return MACHINES.get(code, f"machine {code}")
