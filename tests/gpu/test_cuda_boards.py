"""The CUDA backend's tests once for each of other devices: a process each, since code that a process has loaded stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_boards import BOARDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")]
HERE = Path(__file__).resolve().parent
SECONDS = 500  # most of them are the compilation of some 150 kernels
# What depends on the code or on the plans; how memory is kept and what is refused does not.
TESTS = (
    "test_states_are_the_truths or test_the_loop_and_the_device or test_rows_of_a_batch or test_fused_steps or test_draws_are or test_full_width or "
    "test_states_of_a_draft or test_speculation or test_a_text_goes_on"
)


@pytest.mark.parametrize("board", BOARDS)
def test_the_backend_is_right_with_the_code_and_the_plans_of(board, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "test_cuda_backend.py"), "-k", TESTS]
    environment = os.environ | {"FLASHHEAD_BOARD": board, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
