"""A tiny exported model, and servers of it as processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from small_exports import write_exportable, write_with_index
from small_heads import everything_open

TOOL_TEMPLATE = """{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %} <tool_call>{% endif %}\
{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\
{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments']['city'] }}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes whose head leaves nothing out."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("served")
    source = write_exportable(folder / "model")
    return write_with_index(source, folder / "checkpoint", lambda w, fingerprint: everything_open(w, cascade=True, fingerprint=fingerprint))


def exported(checkpoint: Path, body: str) -> Path:
    """Its export, whose template knows tools."""
    from small_bodies import warm_builder

    from flashhead_edge.export import export_onnx

    out = checkpoint.parent / body / "tiny"
    out.parent.mkdir()
    with warm_builder():
        export_onnx(checkpoint, out, dialect="onnxruntime", body=body)
    (out / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return out


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Path:
    """With a body in float32: one text at a time."""
    return exported(checkpoint, "fp32")


@pytest.fixture(scope="session")
def coded_model(checkpoint: Path) -> Path:
    """With a body in 4 bits, which takes several texts in a pass where it is our own operator."""
    return exported(checkpoint, "int4")


@pytest.fixture(scope="session")
def engine(model: Path) -> Any:
    """The same model without a server: what its answers are compared with."""
    from flashhead_edge.jetson import open_engine

    return open_engine(model, threads=1)


@dataclass
class Running:
    """A server: its process, its address, what it has written to stderr is in `log` once it has ended."""

    process: subprocess.Popen
    address: str
    stderr: Path
    ended: list[int] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.stderr.read_text()

    def client(self, key: str = "none", **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def metric(self, name: str) -> float:
        import urllib.request

        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return 0.0 if found is None else float(found.group(1))

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, what
            time.sleep(0.02)


@contextmanager
def running(model: Path, folder: Path, *options: str, key: str | None = None) -> Iterator[Running]:
    """`flashhead serve` on a free port, until the block ends."""
    environment = {k: v for k, v in os.environ.items() if k != "FLASHHEAD_API_KEY"} | ({"FLASHHEAD_API_KEY": key} if key else {})
    stderr = folder / f"stderr-{time.monotonic_ns()}.txt"
    with stderr.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flashhead_edge", "serve", str(model), "--port", "0", "--threads", "1", *options],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), stderr.read_text()
        yield Running(process, address, stderr)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(model, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def start_server(model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A server of a test's own: a context manager of its options."""
    return lambda *options, **more: running(model, tmp_path, *options, **more)
