"""The OpenAPI document against the server, by schemathesis: what it allows is answered, what it forbids is refused, and all checks pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_the_document_says_what_is_taken(server, tmp_path):
    """All routes of the document, few requests each; `--max-examples` in docs/serve.md is the long run."""
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.address}/openapi.json", "--max-examples", "15", "--seed", "1"]
    hooks = {"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(Path(__file__).parent), "NO_COLOR": "1"}
    found = subprocess.run([*command, "--continue-on-failure"], env=os.environ | hooks, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-6000:]
    assert server.process.poll() is None
