"""The archive: one folder, its list of checksums and its installer first, so that a copy that was cut off is known as one."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from flashhead_edge.bundle.targets import Target
from flashhead_edge.checkpoint.atomic import check_space, named_errors
from flashhead_edge.errors import CheckpointError
from flashhead_edge.progress import Progress, silent

CHUNK = 1 << 22  # bytes read together
SPARE_KIB = 32 << 10  # left free for the file system's books


@dataclass(frozen=True)
class Member:
    """A file of the archive: its path inside, and where its bytes are."""

    name: str
    source: Path | bytes
    executable: bool = False

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def folder_members(folder: Path, inside: str) -> list[Member]:
    """The files of a folder, links followed, sorted by path.

    Raises:
        CheckpointError: a path has a sign that the list of checksums cannot hold.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if "\n" in name or "\\" in name:
            raise CheckpointError(f"{folder}: the name {name!r} has a line break or a backslash, expected names that a list of checksums can hold; rename it")
        found.append(Member(f"{inside}/{name}", path))
    return found


def installer(target: Target, version: str, needed: int) -> bytes:
    """install.sh for a bundle.

    Args:
        needed: bytes on the target's disk.
    """
    text = files("flashhead_edge.bundle").joinpath("install.sh").read_text(encoding="utf-8")
    for name, value in {
        "TARGET": target.name,
        "VERSION": version,
        "PYTHON": target.python_text,
        "PLATFORM": f"linux-{target.machine}",
        "GLIBC": target.glibc_text,
        "NEEDED_KIB": str(-(-needed // 1024) + SPARE_KIB),
        "SYSTEM_PACKAGES": "--system-site-packages" if target.gpu else "",  # TensorRT is a package of JetPack's system
    }.items():
        text = text.replace(f"@{name}@", value)
    return text.encode()


def unpacked(wheels: Iterable[Path]) -> int:
    """Bytes that the wheels take when they are installed, with the bytecode that pip makes of their Python (about its own size)."""
    total = 0
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            total += sum(i.file_size * (2 if i.filename.endswith(".py") else 1) for i in archive.infolist())
    return total


def digest(source: Path | bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    value = hashlib.sha256()
    if isinstance(source, bytes):
        value.update(source)
    else:
        with source.open("rb") as file:
            while part := file.read(CHUNK):
                value.update(part)
    return value.hexdigest()


def write_archive(out: Path, top: str, members: list[Member], progress: Progress = silent) -> str:
    """Write `out` as a tar file with one folder `top`, whole or not at all.

    Owners and times are left out: the same files give the same archive.

    Returns:
        The SHA-256 of the archive.
    Raises:
        FlashHeadError: the disk is full or refuses.
    """
    sums = []
    for n, member in enumerate(members):
        progress(f"checksums: {member.name}", n / len(members))
        sums.append(f"{digest(member.source)}  {member.name}\n")
    first = [Member("SHA256SUMS", "".join(sums).encode()), *members]
    partial = out.with_name(f".{out.name}.flashhead-new")
    with named_errors(out):
        check_space(out.parent, sum(m.size + 1024 for m in first), out)
        try:
            with partial.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                    for n, member in enumerate(first):
                        progress(f"writing: {member.name}", n / len(first))
                        _add(archive, f"{top}/{member.name}", member)
                file.flush()
                os.fsync(file.fileno())
            progress("checksums: the archive", None)
            found = digest(partial)
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    return found


def _add(archive: tarfile.TarFile, name: str, member: Member) -> None:
    info = tarfile.TarInfo(name)
    info.size = member.size
    info.mode = 0o755 if member.executable else 0o644
    if isinstance(member.source, bytes):
        archive.addfile(info, BytesIO(member.source))
    else:
        with member.source.open("rb") as file:
            archive.addfile(info, file)
