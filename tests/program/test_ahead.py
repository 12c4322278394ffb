"""Programs for devices that are not at hand: each is what that device's own machine would make, and a copy of the checkpoint finds it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_exports import write_tied

from flashhead_edge.errors import CheckpointError, DeviceError, SettingsError
from flashhead_edge.program.ahead import ahead_folder, name_for, ready_program, write_ahead
from flashhead_edge.program.head import Device
from flashhead_edge.program.kept import cached_program

SETTINGS: dict[str, Any] = {"precision": "float16", "context": 64, "group": 64, "batch": 2}
DEVICES = [Device(16, 163 << 10, 87), Device(4, 163 << 10, 87), Device(20, 227 << 10, 110)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tied(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(scope="module")
def base(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    programs = write_ahead(folder, written, DEVICES, **SETTINGS)
    assert [p.device for p in programs] == DEVICES
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """The checkpoint on another machine: the same bytes, other times."""
    copy = Path(shutil.copytree(written, tmp_path / "copy", copy_function=shutil.copyfile))
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    return copy


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_program_is_the_one_that_the_device_s_machine_would_make(
    device: Device, written: Path, base: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there, here = cached_program(written, **SETTINGS, device=device), ready_program(copied, **SETTINGS, device=device, base=base)
    assert here is not None and here.weights.read_bytes() == there.weights.read_bytes()
    assert (here.nodes, here.places, here.settings, here.device, here.fingerprint) == (there.nodes, there.places, there.settings, device, there.fingerprint)


def test_one_file_of_weights_serves_all_devices(base: Path) -> None:
    files = sorted(p.name for p in base.rglob("*") if p.is_file())
    assert files == sorted([*(name_for(d) for d in DEVICES), "weights.safetensors"])
    plans = {name: json.loads((next(base.glob("programs/*")) / name).read_text())["nodes"][-1]["attributes"]["plans"][:200] for name in files[:-1]}
    assert len({str(words) for words in plans.values()}) == len(DEVICES)  # or a device would run another's launches


def test_nothing_is_taken_for_another_device_setting_or_checkpoint(base: Path, copied: Path) -> None:
    def found(**change: Any) -> bool:
        return ready_program(copied, **(SETTINGS | {"device": DEVICES[0], "base": base} | change)) is not None

    assert found()
    assert not found(device=Device(14, 163 << 10, 87)) and not found(device=Device(16, 99 << 10, 87)) and not found(device=Device(16, 163 << 10, 86))
    assert not found(context=65) and not found(precision="bfloat16") and not found(batch=1) and not found(base=copied)
    config = copied / "config.json"
    config.write_text(config.read_text() + " ")
    assert not found()


def test_damaged_program_is_said(base: Path, copied: Path, tmp_path: Path) -> None:
    """It is part of an installation, whose files an installer has checked: none is made again in silence."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    (weights,) = other.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        ready_program(copied, **SETTINGS, device=DEVICES[0], base=other)


def test_device_that_the_head_does_not_fit_is_left_out(written: Path, tmp_path: Path) -> None:
    small = Device(8, 2 << 10, 87)
    programs = write_ahead(tmp_path, written, [DEVICES[0], small], **SETTINGS)
    assert [p.device for p in programs] == DEVICES[:1] and not list(tmp_path.rglob(name_for(small)))
    with pytest.raises(DeviceError):
        write_ahead(tmp_path / "none", written, [small], **SETTINGS)
    with pytest.raises(SettingsError, match="no device is named"):
        write_ahead(tmp_path / "none", written, [], **SETTINGS)
    assert not (tmp_path / "none").exists()


def test_it_lies_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs it, with whatever HOME and cache: a service has others than its installer."""
    monkeypatch.setattr("sys.prefix", "/opt/flashhead/versions/1")
    assert ahead_folder() == Path("/opt/flashhead/versions/1/share/flashhead-edge")
