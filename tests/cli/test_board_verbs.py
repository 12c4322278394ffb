"""monitor and plan, from `main` on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import one_document


def test_plan_tells_parts_and_verdict(inside, checkpoint):
    found = inside("plan", checkpoint, "--context", 100, "--json")
    assert found.returncode == 0, found.stderr
    document = one_document(found.stdout)
    assert (document["context"], document["batch"], document["runtime"], document["fits"]) == (100, 1, "torch", True)
    assert sum(document["parts"].values()) == document["needed"]
    assert document["parts"]["head_index"] > 0
    shown = inside("plan", checkpoint, "--memory", "400MiB")
    assert "does not fit, at no context." in shown.stdout
    assert "head: index" not in shown.stdout or "MiB" in shown.stdout
    assert "7,620 MiB in all" in inside("plan", checkpoint, "--memory", "orin-nano-8gb").stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--memory", "potato"), "expected an amount such as 8GB or a board (orin-nano-4gb, "),
        (("--context", "9000"), "the context is 9,000, expected at most the model's 8,192 positions"),
        (("--context", "0"), "--context"),
    ],
)
def test_plan_refuses_in_one_line(inside, checkpoint, options, text):
    found = inside("plan", checkpoint, *options)
    assert (found.returncode, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1 and text in found.stderr


def test_plan_of_nothing(inside):
    found = inside("plan", "no-such-model")
    assert (found.returncode, found.stdout) == (2, "")
    assert "no-such-model: no such folder or .gguf file" in found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_monitor_looks_once(inside):
    document = one_document(inside("monitor", "--once", "--json").stdout)
    assert document["memory_available"] > 0
    assert 0 <= document["cpu_load"] <= 1
    shown = inside("monitor", "--once").stdout
    assert "memory" in shown and "MiB available" in shown and "GPU" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_monitor_is_a_line_a_look_until_ctrl_c(root: Path):
    command = [sys.executable, "-m", "flashhead_edge", "monitor", "--json", "--interval", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert err == ""
    assert lines[0]["time"] < lines[1]["time"] < lines[2]["time"]
