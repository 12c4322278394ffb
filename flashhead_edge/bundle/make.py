"""What `flashhead bundle` does: from a model and a target's name to an archive."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from flashhead_edge import __version__
from flashhead_edge.bundle.ahead import Ahead, make_ahead
from flashhead_edge.bundle.archive import Member, digest, folder_members, installer, unpacked, write_archive
from flashhead_edge.bundle.own import checkout, own_wheel
from flashhead_edge.bundle.targets import Target, target_named
from flashhead_edge.bundle.wheels import download
from flashhead_edge.errors import CheckpointError, FlashHeadError, SettingsError
from flashhead_edge.progress import Progress, silent

EXTRAS = "onnx,serve"


@dataclass(frozen=True)
class Bundled:
    """An archive that was written."""

    archive: str
    sha256: str
    bytes: int
    installed_bytes: int  # on the target's disk
    target: str
    model: str  # what it is: "onnx", "tensorrt" or "checkpoint"
    model_bytes: int
    wheels: tuple[str, ...]
    libraries: tuple[str, ...] | None  # C libraries in flashhead-edge's wheel; None where the wheel was given or downloaded
    ahead: Ahead | None  # what the cuda backend's first start need not make; None for an export
    notes: tuple[str, ...]


def bundle(
    model: str | Path, out: str | Path, *, target: str, find_links: Sequence[str | Path] = (), overwrite: bool = False, progress: Progress = silent
) -> Bundled:
    """Write everything that a machine of `target` needs to run `model` without a network.

    Args:
        model: a folder of `flashhead export`, or a checkpoint.
        out: the archive, a tar file, not compressed: weights do not shrink.
        target: a name of `TARGETS`.
        find_links: folders with wheels that are taken beside the package index's, flashhead-edge's own too.
        overwrite: replace `out` if it exists.
    Raises:
        SettingsError: the target is not known, or `out` exists.
        CheckpointError: `model` is no folder that the target can run.
        FlashHeadError: a wheel could not be found or built, or the disk refuses.
    """
    to, folder, path = target_named(target), Path(model), Path(out).absolute()
    if path.exists() and (not overwrite or path.is_dir()):
        raise SettingsError(f"{out}: it exists, expected a new name; remove it, or pass --overwrite for a file")
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent}: the folder does not exist, expected one to write {path.name} in; make it first")
    for one in find_links:
        if not Path(one).is_dir():
            raise SettingsError(f"{one}: it is no folder, expected one with wheels; correct --find-links")
    kind = kind_of(folder, to)
    inside = folder_members(folder, "model")
    notes = []
    with tempfile.TemporaryDirectory(prefix="flashhead-bundle-") as temporary:
        wheels_folder = Path(temporary) / "wheels"
        wheels_folder.mkdir()
        given = any(p for one in find_links for p in Path(one).glob(f"flashhead_edge-{__version__}-*.whl"))
        source, libraries = checkout(), None
        if source is not None and not given:
            progress("building flashhead-edge's wheel", None)
            _, libraries = own_wheel(to, source, Path(temporary) / "build", wheels_folder)
            if "_native" not in libraries:
                notes.append("flashhead-edge's wheel carries no C library: exported heads run on ONNX Runtime's own operators, slower")
            if kind == "checkpoint" and "_cuda" not in libraries:
                raise FlashHeadError(
                    f"{model}: on {to.name} the cuda backend alone runs a checkpoint, and flashhead-edge's wheel came out without its launchers, expected "
                    f"them in it; install g++-{to.machine}-linux-gnu (Debian), or pass a wheel with them by --find-links"
                )
            if to.gpu and "_cuda" not in libraries:
                notes.append("flashhead-edge's wheel carries no launchers: the cuda backend does not run from this bundle")
        wheels = download(to, requirements(to), wheels_folder, [Path(p).absolute() for p in find_links], progress)
        if kind == "tensorrt":
            notes.append("engines are built on the board: flashhead export engines")
        made, ahead = None, list[Member]()
        if kind == "checkpoint":
            base = Path(temporary) / "ahead"
            made = make_ahead(to, folder, base, Path(temporary), [Path(p).absolute() for p in find_links], progress)
            ahead = folder_members(base, "ahead")
            notes += made.notes
        needed = unpacked(wheels) + sum(m.size for m in (*inside, *ahead))
        manifest = {"flashhead_edge": __version__, "target": asdict(to), "model": kind, "wheels": [p.name for p in wheels], "libraries": libraries}
        manifest["ahead"] = None if made is None else asdict(made)
        members = [
            Member("install.sh", installer(to, __version__, needed), executable=True),
            Member("bundle.json", (json.dumps(manifest, indent=2) + "\n").encode()),
            Member("requirements.txt", pinned(wheels)),
            Member("flashhead.service", files("flashhead_edge.bundle").joinpath("flashhead.service").read_bytes()),
            *(Member(f"wheels/{p.name}", p) for p in wheels),
            *inside,
            *ahead,
        ]
        total = write_archive(path, f"flashhead-{__version__}-{to.name}", members, progress)
    return Bundled(
        archive=str(out),
        sha256=total,
        bytes=path.stat().st_size,
        installed_bytes=needed,
        target=to.name,
        model=kind,
        model_bytes=sum(m.size for m in inside),
        wheels=tuple(p.name for p in wheels),
        libraries=libraries,
        ahead=made,
        notes=tuple(notes),
    )


def requirements(target: Target) -> list[str]:
    """What is installed: the runtime without torch, and pip, which installs it."""
    return [f"flashhead-edge[{EXTRAS}]=={__version__}", "pip>=23", *target.requirements]


def pinned(wheels: Sequence[Path]) -> bytes:
    """A requirements file that names each wheel by version and SHA-256; pip is what reads it, and is not in it."""
    lines = []
    for path in wheels:
        name, version = path.name.split("-")[:2]
        if name != "pip":
            lines.append(f"{name}=={version} --hash=sha256:{digest(path)}\n")
    return "".join(lines).encode()


def kind_of(folder: Path, target: Target) -> str:
    """What lies in a model's folder.

    Raises:
        CheckpointError: nothing that `target` can run.
    """
    from flashhead_edge.inspection import describe
    from flashhead_edge.jetson.folder import is_exported
    from flashhead_edge.jetson.inspection import describe_model
    from flashhead_edge.jetson.tensorrt_folder import is_tensorrt

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: it is no folder, expected one of flashhead export or a checkpoint; write one first")
    if is_exported(folder) or is_tensorrt(folder):
        describe_model(folder)
        kind = "tensorrt" if is_tensorrt(folder) else "onnx"
    else:
        describe(folder)
        kind = "checkpoint"
    if kind != "onnx" and not target.gpu:
        raise CheckpointError(f"{folder}: it is a {kind} model, expected one that {target.name} runs, by ONNX Runtime; run flashhead export onnx first")
    return kind
