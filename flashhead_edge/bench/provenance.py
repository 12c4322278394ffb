"""Where a record comes from: the commit and the command that made it, on which processor, of which calibration."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.jsonfiles import read_json

BUILT = Path(__file__).parent.parent / "commit.txt"  # what setup.py writes into a wheel


def commit() -> str | None:
    """The commit of the working tree, `-dirty` where it was changed; of an installed package the one that it was built of; None where neither is known."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False).stdout.strip()

    try:
        found = git("describe", "--always", "--dirty") if git("ls-files", here.name) else ""  # an environment may lie in somebody else's repository
    except FileNotFoundError:
        found = ""
    if not found and BUILT.is_file():
        found = BUILT.read_text(encoding="ascii").strip()
    return found or None


def command(module: str) -> str:
    """The command line of a bench, `module` being its name in this package."""
    return " ".join([f"python -m flashhead_edge.bench.{module}", *sys.argv[1:]])


def processor() -> str:
    """The processor and how many cores of it this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{model[1].strip() if model else platform.processor() or platform.machine()}, {cores} cores"


def calibration(folder: Path) -> dict[str, Any]:
    """What a checkpoint's head was held to and what held-out text showed, `target_agreement` and `agreement`: empty for a folder without one.

    Raises:
        CheckpointError: config.json is damaged.
    """
    ours = read_json(folder / "config.json").get("flash_head") if (folder / "config.json").is_file() else None
    summary = ours.get("summary") or {} if isinstance(ours, dict) else {}
    return {"target_agreement": summary.get("target_agreement"), "agreement": summary.get("top1_agreement")} if summary else {}
