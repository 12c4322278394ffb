"""A checkpoint of a tiny random model with a byte-level tokenizer, and ways to run the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_tools import write_flashhead, write_model

from flashhead_edge.cli import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flashhead(model_folder, tmp_path_factory.mktemp("checkpoint") / "tiny-flashhead")


@pytest.fixture
def flashhead(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `flashhead ARGUMENT...` in a process of its own, as a person would: some seconds, mostly imports."""

    def run(*arguments: Any, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flashhead_edge", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(command, input=stdin, capture_output=True, text=True, encoding="utf-8", env=env, cwd=tmp_path, timeout=timeout)

    return run


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Run `flashhead ARGUMENT...` in this process: the same code from `main` on, without the imports."""

    def run(*arguments: Any, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)

    return run
