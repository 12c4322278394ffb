"""The examples' containers and the shell scripts that people run, read by their linters; a linter that finds nothing in a bad file would not help."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = sorted(ROOT.glob("examples/*Dockerfile"))
SCRIPTS = [ROOT / "flashhead_edge/bundle/install.sh", ROOT / "scripts/bundle_arm64.sh"]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def findings(name: str, *arguments: object) -> str:
    result = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (result.stdout.strip() == ""), result.stderr
    return result.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile_is_clean(path: Path) -> None:
    assert findings("hadolint", "--no-color", path) == ""


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert {p.name.split(".")[0] for p in DOCKERFILES} >= {"vllm", "jetson", "workstation"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_clean(path: Path) -> None:
    assert findings("shellcheck", "--format=gcc", path) == ""


def test_linters_see_what_they_must(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install curl\n")
    assert "DL3008" in findings("hadolint", "--no-color", tmp_path / "Dockerfile")
    (tmp_path / "a.sh").write_text("#!/bin/sh\nrm -rf $1/*\n[[ -n $2 ]]\n")
    assert "SC3010" in findings("shellcheck", "--format=gcc", tmp_path / "a.sh")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_extras_that_a_dockerfile_names_exist(path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for named in re.findall(r'"\.\[([\w,]+)\]"', path.read_text(encoding="utf-8")):
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in named.split(","))
