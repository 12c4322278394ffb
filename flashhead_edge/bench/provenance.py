"""Where a record comes from: the commit and the command that made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def commit() -> str | None:
    """The commit of the working tree, `-dirty` where it was changed; None outside of one."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def command(module: str) -> str:
    """The command line of a bench, `module` being its name in this package."""
    return " ".join([f"python -m flashhead_edge.bench.{module}", *sys.argv[1:]])
