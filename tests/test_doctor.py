"""The doctor: every fact has its shape, and what is there or broken is found, on made-up machines too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashhead_edge import __version__, doctor
from flashhead_edge.errors import DeviceError


def test_report_of_this_machine() -> None:
    report = doctor.examine()
    assert report["flashhead_edge"] == __version__
    facts = {f["name"]: f for f in report["facts"]}
    assert len(facts) == len(report["facts"])
    expected = {
        "Python",
        "torch",
        "transformers",
        "NVIDIA GPU",
        "torch CUDA",
        "CUDA driver",
        "CUDA NVRTC",
        "CUDA launchers",
        "TensorRT",
        "vllm",
        "ONNX Runtime",
        "Jetson",
    }
    assert expected <= facts.keys()
    assert facts["Python"]["found"]
    assert facts["Python"]["version"] == ".".join(map(str, sys.version_info[:3])) + ("+" if sys.version.split()[0].endswith("+") else "")
    for fact in report["facts"]:
        assert fact.keys() == {"name", "found", "version", "detail", "enables"}
        assert fact["enables"]
    assert len(doctor.lines(report)) == len(facts) + 1


def test_what_was_made_ahead_is_said_with_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashhead_edge.jetson import driver
    from flashhead_edge.program.ahead import name_for
    from flashhead_edge.program.head import Device

    assert doctor.made_ahead(tmp_path) == []
    for path in ("programs/key/" + name_for(Device(8, 163 << 10, 87)), "programs/key/" + name_for(Device(4, 163 << 10, 87)), "kernels/embedding.cubin"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    facts = driver.DeviceFacts("Orin", 87, 8, 163 << 10, 0, 0, None, "12.6")
    monkeypatch.setattr(driver, "device_facts", lambda: facts)
    (fact,) = doctor.made_ahead(tmp_path)
    assert fact.found and fact.detail == "programs for 2 GPUs, 1 kernels; this one, 8.7 with 8 multiprocessors, is one of them"
    monkeypatch.setattr(driver, "device_facts", lambda: replace(facts, multiprocessors=6))
    (fact,) = doctor.made_ahead(tmp_path)
    assert not fact.found and "this one, 8.7 with 6 multiprocessors, is none of them" in (fact.detail or "")

    def none() -> None:
        raise DeviceError("GPU: none")

    monkeypatch.setattr(driver, "device_facts", none)
    (fact,) = doctor.made_ahead(tmp_path)
    assert not fact.found and fact.detail == "programs for 2 GPUs, 1 kernels; GPU: none"


def jetson_root(tmp_path: Path, model: bytes, compatible: bytes, release: str) -> Path:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(model)
    (tmp_path / "proc/device-tree/compatible").write_bytes(compatible)
    (tmp_path / "etc/nv_tegra_release").write_text(release)
    return tmp_path


def test_jetson_is_found_by_its_device_tree(tmp_path: Path) -> None:
    root = jetson_root(
        tmp_path,
        b"NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        b"nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    )
    fact = doctor.jetson(root)
    assert (fact.found, fact.version) == (True, "L4T 36.4.3, JetPack 6.2")
    assert fact.detail is not None
    assert fact.detail.startswith("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super; /var/lib/nvpmodel/status cannot be read: no such file")


def test_another_board_is_no_jetson(tmp_path: Path) -> None:
    root = jetson_root(tmp_path, b"Raspberry Pi 5\0", b"raspberrypi,5-model-b\0brcm,bcm2712\0", "")
    assert not doctor.jetson(root).found


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
@pytest.mark.parametrize(
    ("script", "found", "version", "words"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, 580.65.06'", True, "580.65.06", "NVIDIA H100 80GB HBM3"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", False, None, "NVIDIA-SMI has failed"),
        ("exit 0", False, None, "nvidia-smi failed"),
    ],
    ids=["works", "fails", "says nothing"],
)
def test_gpu_is_asked_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, found: bool, version: str | None, words: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    fact = doctor.gpu()
    assert (fact.found, fact.version) == (found, version)
    assert words in (fact.detail or "")


def test_broken_torch_is_a_fact_and_no_crash(tmp_path: Path, root: Path) -> None:
    """A torch whose libraries cannot be loaded, in a process of its own."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')\n")
    info = tmp_path / "torch-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    code = "from flashhead_edge import doctor; print(doctor.torch()); print(doctor.torch_cuda())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})
    assert result.returncode == 0, result.stderr
    assert "found=False, version='9.9', detail='installed, but does not load: libtorch.so: cannot open shared object file'" in result.stdout
    assert "torch does not load" in result.stdout


def test_old_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "4.57.1")
    fact = doctor.package("transformers", "x", minimum=5)
    assert (fact.found, fact.detail) == (False, "too old: 5.0 or newer is needed")


TENSORRT = """
import ctypes
__version__ = {version!r}
class Logger: pass
class Creator: name, plugin_namespace = "FlashHead", "flashhead"
class Registry:
    plugin_creator_list = []
    def load_library(self, path):
        {load}
        self.plugin_creator_list.append(Creator)
        return object()
registry = Registry()
def get_plugin_registry(): return registry
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("module", "library", "version", "words"),
    [
        (None, True, None, "no TensorRT to load them"),
        (TENSORRT.format(version="8.6.0", load=""), True, "0.1.0 tensorrt 8.6.1", "libflashhead_plugins_trt8.so loads in TensorRT 8.6.0"),
        (TENSORRT.format(version="8.6.0", load=""), False, None, "no plugin library was found"),
        (TENSORRT.format(version="10.3.0", load=""), True, "0.1.0 tensorrt 8.6.1", "was made for TensorRT 8, found TensorRT 10.3.0"),
        (TENSORRT.format(version="8.6.0", load="ctypes.string_at(0)"), True, "0.1.0 tensorrt 8.6.1", "loading them ends the process in TensorRT 8.6.0"),
        ("raise ImportError('libnvinfer.so.8: cannot open shared object file')", True, None, "no TensorRT to load them"),
    ],
    ids=["absent", "loads", "no library", "another major", "crash", "broken"],
)
def test_tensorrt_says_whether_it_loads_our_plugins(module: str | None, library: bool, version: str | None, words: str, tmp_path: Path, root: Path) -> None:
    """A made module and a made library, in a process of its own."""
    if module is not None:
        (tmp_path / "tensorrt.py").write_text(module)
    if library:
        folder = tmp_path / "flashhead-edge" / "plugins"
        folder.mkdir(parents=True)
        (tmp_path / "made.c").write_text(
            'const char* flashhead_plugin_version(void) { return "0.1.0 tensorrt 8.6.1"; }\nconst char* flashhead_last_error(void) { return ""; }\n'
        )
        for major in (8, 10):
            subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "made.c", "-o", folder / f"libflashhead_plugins_trt{major}.so"], check=True)
    code = "from dataclasses import asdict; import json; from flashhead_edge import doctor; print(json.dumps([asdict(f) for f in doctor.tensorrt()]))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    facts = {f["name"]: f for f in json.loads(result.stdout)}
    runtime, plugins = facts["TensorRT"], facts["TensorRT plugins"]
    assert runtime["found"] == (module is not None and "ImportError" not in module)
    if module is not None and not runtime["found"]:
        assert runtime["detail"] == "installed, but does not load: libnvinfer.so.8: cannot open shared object file"
    assert (plugins["found"], plugins["version"]) == (words.endswith("loads in TensorRT 8.6.0"), version)
    assert words in plugins["detail"]
