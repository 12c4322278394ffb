"""vLLM's OpenAI server over a FlashHead checkpoint, asked by the real openai client."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from vllm_engine.made import free_port

pytest.importorskip("vllm", reason="needs vLLM: see docs/vllm.md")
openai = pytest.importorskip("openai")

ROOT = Path(__file__).parents[2]


def text_of(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Base URL of a server, and of the worker's counters."""
    port, metrics = free_port(), free_port()
    settings = json.dumps({"flashhead": {"crossover": "never", "metrics_port": metrics}})
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "m"]
    command += ["--enforce-eager", "--max-model-len", "512", "--additional-config", settings]
    command += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G"] if torch.cuda.is_available() else ["--dtype", "float32"]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path_factory.mktemp("prometheus"))
    with log.open("w") as out, subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            for _ in range(180):
                if process.poll() is not None:
                    raise AssertionError(log.read_text()[-3000:])
                try:
                    text_of(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    time.sleep(1)
            assert "FlashHead is active on" in log.read_text()
            yield f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{metrics}/metrics"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server[0], api_key="none")


def settle(client):
    """On a GPU counters are copied at the beginning of a step, a second after the last copy at the earliest: one more step, of the dense head's."""
    if torch.cuda.is_available():
        time.sleep(1.5)
        client.completions.create(model="m", prompt="One", max_tokens=2, temperature=0, logprobs=1)
        time.sleep(5.5)


def counts(client, server):
    """FlashHead's counters, by name."""
    settle(client)
    lines = [line for line in text_of(server[1]).splitlines() if line.startswith("flashhead_")]
    return {line.split("_total{")[0].removeprefix("flashhead_"): float(line.rsplit(" ", 1)[1]) for line in lines}


def test_a_chat_is_answered_and_counted(client, server):
    before = counts(client, server)
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0)
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 12
    after = counts(client, server)
    assert after["states_flash"] - before["states_flash"] >= answer.usage.completion_tokens
    assert after["clusters_opened"] > 0 and after["exact_rows"] > 0


def test_a_stream_says_the_same(client):
    options = {"model": "m", "prompt": "The capital of France is", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    assert "".join(part.choices[0].text for part in client.completions.create(stream=True, **options)) == whole


def test_a_schema_and_log_probabilities_go_to_the_dense_head(client, server):
    before = counts(client, server)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Is water wet?"}],
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)
    shown = client.completions.create(model="m", prompt="One two three", max_tokens=4, temperature=0, logprobs=2)
    assert len(shown.choices[0].logprobs.token_logprobs) == 4
    after = counts(client, server)
    assert after["states_dense_asked"] - before["states_dense_asked"] >= answer.usage.completion_tokens + 4
    assert after["states_flash"] == before["states_flash"]


def test_several_drawn_answers(client):
    answer = client.completions.create(model="m", prompt="Once upon a time", max_tokens=8, temperature=1.0, n=3, seed=1, top_p=0.9)
    assert len({choice.text for choice in answer.choices}) > 1


def test_vllms_own_metrics_have_the_counters(client, server):
    client.completions.create(model="m", prompt="One two", max_tokens=4, temperature=0)
    wanted = counts(client, server)["states_flash"]
    for _ in range(30):
        lines = [line for line in text_of(server[0].removesuffix("/v1") + "/metrics").splitlines() if line.startswith("flashhead_states_flash_total{")]
        if lines and float(lines[0].rsplit(" ", 1)[1]) >= wanted:
            break
        time.sleep(1)
    else:
        raise AssertionError(f"expected {wanted} in {lines}")


def test_a_wrong_request_is_openais_error(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt="x", temperature=-1)
