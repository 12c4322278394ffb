"""What `flashhead bundle` makes ahead, on a GPU; and what a run there reports of its power.

`FLASHHEAD_CHECKPOINT=OUT python -m pytest tests/gpu/test_first_start.py` needs numpy, NVRTC, the library of launchers; for the joules nvidia-ml-py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead_edge.generation import stream
from flashhead_edge.jetson import cuda_ahead, cuda_folder, cuda_kernels, open_engine
from flashhead_edge.jetson.cuda_folder import program_settings
from flashhead_edge.jetson.driver import device_facts
from flashhead_edge.jetson.nvrtc import find_nvrtc
from flashhead_edge.program import ahead
from flashhead_edge.program.head import Device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU"),
    pytest.mark.skipif("FLASHHEAD_CHECKPOINT" not in os.environ, reason="FLASHHEAD_CHECKPOINT names no checkpoint"),
]
PROMPT = "The three largest cities of Europe are"


def answer(checkpoint: Path) -> list[int]:
    engine = open_engine(checkpoint, "cuda")
    found = [token.id for token in stream(engine, engine.tokenizer(PROMPT)["input_ids"], 48)]
    engine.backend.close()
    return found


def test_what_was_made_ahead_runs_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a board after the installation: a cache that is empty and stays so, no compiler, another copy of the checkpoint."""
    checkpoint = Path(os.environ["FLASHHEAD_CHECKPOINT"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "pc"))
    monkeypatch.setattr(ahead, "ahead_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(cuda_kernels, "ahead_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(cuda_kernels, "_held", {})
    wanted = answer(checkpoint)

    facts, share = device_facts(), tmp_path / "share"
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    programs = ahead.write_ahead(share, checkpoint, [device], **program_settings(cuda_folder.read_json(checkpoint / "config.json")))
    assert cuda_ahead.compile_ahead(programs, find_nvrtc(int(facts.cuda_version.split(".")[0])), share / "kernels") > 10

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "board"))
    monkeypatch.setattr(ahead, "ahead_folder", lambda: share)
    monkeypatch.setattr(cuda_kernels, "ahead_folder", lambda: share)
    monkeypatch.setattr(cuda_kernels, "_held", {})
    monkeypatch.setattr(cuda_kernels, "find_nvrtc", None)
    monkeypatch.setattr(cuda_folder, "cached_program", None)
    assert answer(copy) == wanted
    assert not (tmp_path / "board").exists()


def test_run_reports_its_joules() -> None:
    """Between an idle GPU's power and its limit; the counter of energy is what it is counted by, so that a second is enough."""
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000 * pynvml.nvmlDeviceGetCount()
    command = [sys.executable, "-m", "flashhead_edge", "generate", os.environ["FLASHHEAD_CHECKPOINT"], "--backend", "cuda", "--json"]
    command += ["--prompt", PROMPT, "--raw", "--max-new-tokens", "2000", "--temperature", "0.7"]
    document = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    report = document["report"]
    print(json.dumps({"tokens": document["tokens"], "seconds": document["seconds"], **report}))  # noqa: T201
    assert "joules_per_token" not in report["unknown"] and report["power_scope"].endswith("by NVML")
    assert 20 < report["joules"] / document["seconds"] < 1.1 * limit  # an idle H100 draws about 70 W, a small card less
    assert report["joules_per_token"] == pytest.approx(report["joules"] / document["tokens"])
