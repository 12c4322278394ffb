"""Wheels of a few hundred bytes: what an installer does not need to be real is not."""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    tag: str = "py3-none-any",
    code: str = "",
    requires: Sequence[str] = (),
    members: Mapping[str, bytes] | None = None,
) -> Path:
    """A wheel with one package of that name, whose module is `code`; a function `main` in it becomes a command of the wheel's name without "-edge"."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    content = {
        f"{module}/__init__.py": code.encode(),
        **(members or {}),
        f"{info}/METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {version}",
                *(f"Requires-Dist: {r}" for r in requires),
                "Provides-Extra: onnx",
                "Provides-Extra: serve",
                "",
            ]
        ).encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: {str(tag.endswith('any')).lower()}\nTag: {tag}\n".encode(),
        f"{info}/entry_points.txt": f"[console_scripts]\n{name.removesuffix('-edge')} = {module}:main\n".encode(),
    }
    record = [f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(c).digest()).decode().rstrip('=')},{len(c)}" for n, c in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{module}-{version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return path


def copy_pip(folder: Path) -> Path:
    """The wheel of pip that Python's ensurepip carries."""
    (found,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    return Path(shutil.copy(found, folder))


def elf(machine: int) -> bytes:
    """The head of an ELF library for a machine: 0x3E is x86-64, 0xB7 aarch64."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little") + bytes(44)
