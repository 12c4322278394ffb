"""Programs of whole checkpoints: made once, kept as long as the checkpoint stays what it is, and for its own head alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_exports import write_tied
from small_programs import CONTEXT, ORIN

from flashhead_edge.checkpoint import read_head
from flashhead_edge.errors import CheckpointError, FlashHeadError
from flashhead_edge.program import weights as weights_file
from flashhead_edge.program.file import Program
from flashhead_edge.program.kept import cached_program, head_fingerprint, program_key, programs_folder

SETTINGS: dict[str, Any] = {"precision": "float16", "context": CONTEXT, "group": 64, "batch": 2, "device": ORIN}
INDEX = "flash_head_assets/index.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tied(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def times_of(program: Program) -> int:
    return program.weights.stat().st_mtime_ns


def test_program_is_made_once(checkpoint: Path) -> None:
    first = cached_program(checkpoint, **SETTINGS)
    assert first.folder.parent == programs_folder() and first.document["about"]["checkpoint"] == str(checkpoint)
    assert first.fingerprint == read_head(checkpoint).fingerprint and len(first.attentions) == 3 and first.nodes[-1].op == "FlashHead"
    made = times_of(first)
    again = cached_program(checkpoint, **SETTINGS)
    assert again.folder == first.folder and times_of(again) == made and again.nodes == first.nodes and again.places == first.places


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"}, {"context": 32}, {"group": 32}, {"batch": 1}, {"device": replace(ORIN, multiprocessors=14)},
        {"device": replace(ORIN, capability=90)},
    ],
)  # fmt: skip
def test_another_setting_is_another_program(checkpoint: Path, change: dict[str, Any]) -> None:
    first, other = cached_program(checkpoint, **SETTINGS), cached_program(checkpoint, **SETTINGS | change)
    assert other.folder != first.folder and first.weights.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "model-2.safetensors"])
def test_another_file_has_another_key(checkpoint: Path, name: str) -> None:
    """Other first bytes of the same size and time, another time, a file more."""
    path = checkpoint / name
    if path.exists():
        about, data = path.stat(), path.read_bytes()
        keys = [program_key(checkpoint, {})]
        path.write_bytes(data[:100][::-1] + data[100:])
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    else:
        keys = [program_key(checkpoint, {})]
        path.write_bytes(b"one more")
    keys.append(program_key(checkpoint, {}))
    os.utime(path, ns=(1, 1))
    keys.append(program_key(checkpoint, {}))
    assert len(set(keys)) == 3


def test_damaged_program_is_written_again(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = cached_program(checkpoint, **SETTINGS)
    os.truncate(first.weights, 1000)
    again = cached_program(checkpoint, **SETTINGS)
    assert again.folder == first.folder and again.places == first.places
    assert "weights.safetensors: the file has 1,000 bytes" in caplog.text or "the header is" in caplog.text
    assert "it is written again" in caplog.text


def test_full_disk_keeps_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_file.os, "fsync", full)
    with pytest.raises(FlashHeadError, match="the disk is full"):
        cached_program(checkpoint, **SETTINGS)
    assert not programs_folder().exists()


def test_index_of_another_head_is_refused(checkpoint: Path) -> None:
    """One bit of one row."""
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(b"}}") + 5000] ^= 1  # within the embedding, which save_pretrained writes first
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the index was made for the head sha256:\w{12}\.\.\., found sha256:\w{12}\.\.\.; run flashhead convert"):
        cached_program(checkpoint, **SETTINGS)
    assert not programs_folder().exists()


def test_fingerprint_is_that_of_the_head_s_reader(tmp_path: Path) -> None:
    """Tied or not, with a bias, in every type that a head may have, within a model of images too."""
    from safetensors.torch import save_file

    head, embedding, bias = torch.randn(131, 64), torch.randn(131, 64), torch.randn(131)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 131, "hidden_size": 64, "tie_word_embeddings": True}
    for n, (names, dtype) in enumerate(
        [
            (("model.embed_tokens.weight",), torch.bfloat16), (("model.embed_tokens.weight", "lm_head.weight"), torch.float16),
            (("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"), torch.float32),
            (("model.language_model.embed_tokens.weight",), torch.bfloat16),
        ]
    ):  # fmt: skip
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {name: {"lm_head.weight": head, "lm_head.bias": bias}.get(name, embedding).to(dtype) for name in names}
        save_file(tensors, folder / "model.safetensors")
        assert head_fingerprint(folder) == read_head(folder).fingerprint
    save_file({"lm_head.weight": torch.zeros(131, 64, dtype=torch.int8)}, tmp_path / "0" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has dtype I8, expected one of F32, F16, BF16"):
        head_fingerprint(tmp_path / "0")


def test_nothing_of_it_needs_torch(checkpoint: Path) -> None:
    """A process of its own, in which neither torch nor transformers can be imported, makes the program that this one made."""
    here = cached_program(checkpoint, **SETTINGS)
    data = here.weights.read_bytes()
    shutil.rmtree(here.folder)
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = sys.modules['safetensors'] = None\n"
        "from flashhead_edge.program.head import Device\nfrom flashhead_edge.program.kept import cached_program\n"
        f"cached_program({str(checkpoint)!r}, precision='float16', context={CONTEXT}, group=64, batch=2, device=Device(16, 99 << 10, 87))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert here.weights.read_bytes() == data
