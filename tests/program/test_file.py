"""A program's folder: what is written is what is read, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plugin_interpreter import fingerprint
from safetensors import safe_open
from small_programs import CONTEXT, ORIN, ProgramInterpreter, built, program_of, small_model

from flashhead_edge.checkpoint import atomic
from flashhead_edge.errors import CheckpointError, FlashHeadError
from flashhead_edge.program.build import Built
from flashhead_edge.program.file import PROGRAM, WEIGHTS, read_program, write_program
from flashhead_edge.program.head import decoder_graph
from flashhead_edge.program.nodes import Stored


@pytest.fixture(scope="module")
def made() -> Built:
    return built(*small_model("qwen2"))  # with biases: constants


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, made: Built) -> Path:
    return write_program(tmp_path_factory.mktemp("programs") / "program", made, ORIN, {"checkpoint": "there"}).folder


@pytest.fixture
def program(kept: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "program"))


def test_what_is_read_is_what_was_written(made: Built, kept: Path) -> None:
    p, graph = read_program(kept), decoder_graph(made.decoder, made.head)
    assert p.nodes == graph.nodes and p.inputs == graph.inputs and p.outputs == graph.outputs
    assert p.nodes[-1].op == "FlashHead" and p.nodes[-1].attributes["plans"] == made.head.words
    assert p.widths == made.decoder.widths and p.attentions == tuple(made.decoder.attentions)
    assert (p.precision, p.context, p.batch, p.device, p.fingerprint) == ("float16", CONTEXT, 2, ORIN, made.head.index.fingerprint)
    assert p.settings["vocab_size"] == 131 and p.settings["layers"] == 3 and p.document["about"] == {"checkpoint": "there"}
    assert sorted(f.name for f in kept.iterdir()) == [PROGRAM, WEIGHTS] and p.weights == kept / WEIGHTS


def test_places_are_those_of_a_safetensors_file(made: Built, kept: Path) -> None:
    """Every tensor that a node or a constant names, 16-byte aligned, with the bytes that another reader finds under its name."""
    p, data = read_program(kept), (kept / WEIGHTS).read_bytes()
    named = {a.name for n in p.nodes for a in n.attributes.values() if isinstance(a, Stored) and a.name} | set(p.constants.values())
    assert named == p.places.keys() and p.document["weights_fingerprint"] == fingerprint(kept / WEIGHTS)
    with safe_open(kept / WEIGHTS, "np") as file:
        for name, (offset, size) in p.places.items():
            assert offset % 16 == 0 and data[offset : offset + size] == file.get_tensor(name).tobytes()
    assert list(p.constants) == [f"layers.{i}.qkv.biased.constant" for i in range(3)]
    for name, constant in made.decoder.constants.items():
        assert np.array_equal(ProgramInterpreter(p).constants[name], constant.array.astype(np.float32))


def test_writing_again_gives_the_same_bytes(made: Built, kept: Path, tmp_path: Path) -> None:
    again = write_program(tmp_path / "again", made, ORIN, {"checkpoint": "there"})
    assert all((again.folder / name).read_bytes() == (kept / name).read_bytes() for name in (PROGRAM, WEIGHTS))


def _edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / PROGRAM).read_text())
    change(document)
    (path / PROGRAM).write_text(json.dumps(document))


def _cut(path: Path) -> None:
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 1)


def _renamed(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data.replace(b'"layers.0.o.codes"', b'"layers.9.o.codes"', 1))


def _renamed_and_signed(path: Path) -> None:
    _renamed(path)
    _edited(path, lambda d: d.update(weights_fingerprint=fingerprint(path / WEIGHTS)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / PROGRAM).unlink(), "program.json: the file is missing, expected a program; write the program again"),
        (lambda p: (p / PROGRAM).write_text("{"), "program.json: the file cannot be read ("),
        (lambda p: (p / PROGRAM).write_text("[]"), "program.json: the program has format list, expected 3, which this flashhead-edge reads"),
        (lambda p: _edited(p, lambda d: d.update(format=2)), "the program has format 2, expected 3"),
        (lambda p: _edited(p, lambda d: d.pop("widths")), "program.json: the program does not have the expected form (KeyError('widths'))"),
        (lambda p: _edited(p, lambda d: d["nodes"][3].pop("op")), "does not have the expected form"),
        (lambda p: _edited(p, lambda d: d["attentions"][0].update(heads=3)), "does not have the expected form"),
        (lambda p: (p / WEIGHTS).unlink(), "weights.safetensors: the file is missing"),
        (_cut, "weights.safetensors: the file has "),
        (_renamed, "another program's; write the program again"),
        (_renamed_and_signed, "weights.safetensors: layers.0.o.codes is missing, expected by program.json"),
    ],
)
def test_damage_is_named(program: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(program)
    with pytest.raises(CheckpointError) as error:
        read_program(program)
    assert words in str(error.value)


def contents(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def write_with_failing_flush(nth: int, folder: Path, made: Built, patch: pytest.MonkeyPatch) -> bool:
    """Whether the writing failed, in one sentence."""
    fsync, left = os.fsync, [nth]

    def failing(fd: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    patch.setattr(os, "fsync", failing)
    try:
        write_program(folder, made, ORIN, {"checkpoint": "new"})
    except FlashHeadError as error:
        return "writing failed, the disk is full" in str(error)
    return False


@pytest.mark.parametrize("there", [True, False])
def test_full_disk_leaves_the_old_program_or_the_new_one(made: Built, program: Path, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the flushes fails, and nothing lies beside it."""
    target = program if there else tmp_path / "absent"
    old, new = contents(target), contents(write_program(tmp_path / "new", made, ORIN, {"checkpoint": "new"}).folder)
    for nth in count(1):
        with monkeypatch.context() as patch:
            failed = write_with_failing_flush(nth, target, made, patch)
        assert contents(target) in ((old, new) if failed else (new,))
        assert {p.name for p in tmp_path.iterdir()} <= {"program", "new", "absent"}
        if not failed:
            break
    assert nth > 5 and old != new


def test_too_small_a_disk_is_found_before_a_byte_is_written(made: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    with pytest.raises(FlashHeadError, match="MB are needed, 0 MB are free"):
        write_program(tmp_path / "program", made, ORIN, {})
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    model, weights = small_model("qwen3")
    weights.arrays["model.embed_tokens.weight"][5, 7] = 7e4
    with pytest.raises(FlashHeadError, match=r"model.embed_tokens.weight: values up to 7e\+04, expected at most 65504"):
        program_of(tmp_path / "program", model, weights)
    assert list(tmp_path.iterdir()) == []
