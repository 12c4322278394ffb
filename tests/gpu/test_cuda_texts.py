"""Several texts at once on the CUDA backend, on a GPU: each has the bits that it has alone, whoever joins and leaves, and a server gives them to its clients.

`FLASHHEAD_CHECKPOINT=OUT python -m pytest tests/gpu/test_cuda_texts.py`; the server's tests need the extra serve and a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_readers import Reader, alone, come_and_go, together

from flashhead_edge.bench.cuda import made_program
from flashhead_edge.decoding import Sampling
from flashhead_edge.export.tensorrt.made import Model
from flashhead_edge.generation import stream
from flashhead_edge.jetson import ExportedEngine, cuda_program, cuda_session
from flashhead_edge.jetson.cuda_backend import open_program
from flashhead_edge.program.head import Device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")]
ROWS, CONTEXT, VOCAB = 8, 4096, 5_003
MADE = Model(256, 512, 2, 16, 8, 64, False, 1e4)  # with so many key-value heads a text alone would have its attention cut otherwise than eight
SETTINGS = [
    Sampling(), Sampling(temperature=0.75, top_k=20, seed=7), Sampling(temperature=1.0, seed=3), Sampling(frequency_penalty=0.5),
    Sampling(temperature=0.5, top_p=0.9, seed=11), Sampling(), Sampling(temperature=1.5), Sampling(temperature=0.9, min_p=0.05, seed=2),
]  # fmt: skip # two of them are chosen by the loop


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def engine(request, tmp_path_factory):
    facts = cuda_session.device_facts()
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    folder = tmp_path_factory.mktemp("programs") / request.param
    program = made_program(folder, MADE, VOCAB, device, group=64, precision=request.param, context=CONTEXT, batch=ROWS)
    with open_program(program, dict(program.settings), "made") as backend:
        yield ExportedEngine(backend, None, frozenset())


def prompt(number: int, tokens: int) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCAB, tokens).tolist()


def test_the_cut_is_not_that_of_a_text_alone(engine):
    """What the tests here are about would else hold by chance."""
    m = engine.backend.model
    node = next(n for n in m.program.nodes if n.op == "DecodeAttention")
    run = cuda_program.Run(1, 1, 0, 0, 0)
    whole = cuda_program.attention_arguments(m, node, run)[1].splits
    m.cut = 1
    try:
        assert cuda_program.attention_arguments(m, node, run)[1].splits != whole
    finally:
        m.cut = 0


def test_texts_that_come_and_go_have_the_tokens_that_they_have_alone(engine):
    """Over several splits of the cache, more texts than rows, of all lengths and settings."""
    texts = [(prompt(n, 1 + 370 * (n % 7)), 20 + 7 * n, SETTINGS[n % len(SETTINGS)]) for n in range(2 * ROWS)]
    wanted = [alone(engine, *text) for text in texts]
    assert come_and_go(engine, texts, ROWS) == wanted
    assert len({tuple(w[:8]) for w in wanted}) > ROWS  # they say different things


def test_states_have_the_bits_that_they_have_alone(engine):
    """Tokens are given, so that nothing but the states is compared; texts join one by one."""
    tokens = {n: prompt(100 + n, 40) for n in range(ROWS)}
    wanted = {}
    for n in range(ROWS):
        body = engine.body()
        body.feed(prompt(n, 900 + n))
        wanted[n] = [body.feed([t])[0] for t in tokens[n]]
        del body
    bodies = {}
    found = {n: [] for n in range(ROWS)}
    for turn in range(40 + ROWS - 1):
        if turn < ROWS:
            bodies[turn] = engine.body()
            bodies[turn].feed(prompt(turn, 900 + turn))
        going = [n for n in bodies if len(found[n]) < 40]
        states = bodies[going[0]].feed_together([bodies[n] for n in going], [[tokens[n][len(found[n])]] for n in going])
        for n, state in zip(going, states):
            found[n].append(state[0])
    assert all(np.array_equal(found[n], wanted[n]) for n in range(ROWS))


def test_what_an_ended_text_leaves_is_not_read_again(engine):
    """Its row has changed places meanwhile."""
    readers = [Reader(engine, prompt(n, 300), 9, Sampling()) for n in range(ROWS)]
    while not all(r.done for r in readers):
        together(readers)
    for n in (5, 0, 7):
        longer = [*prompt(n, 300), *readers[n].found, 17, 19]
        run = stream(engine, longer, 12, cache=readers[n].cache)
        ours = [t.id for t in run]
        assert run.summary.prompt_read == 3 and len(ours) == 12  # two new ones, and the last, which nobody had fed
        body = engine.body()  # the same tokens read in the same parts
        body.feed(prompt(n, 300))
        for token in readers[n].found[:-1]:
            body.feed([token])
        hidden, by_hand = body.feed([readers[n].found[-1], 17, 19]), []
        for _ in range(12):
            by_hand.append(int(engine.step(hidden).token[0]))
            hidden = body.feed(by_hand[-1:])
        assert ours == by_hand
        del body


def test_all_logits_are_those_of_the_rows(engine):
    """Of one state and of several, which have the same bits together; the host multiplies with the rows of the file."""
    m = engine.backend.model
    states = np.concatenate([engine.body().feed(prompt(n, 9)) for n in range(11)])
    found = engine.exact_logits(states, np.arange(VOCAB))
    some = engine.exact_logits(states, np.arange(VOCAB)[1:])
    bound = m.head.hidden * 2.0**-24 * np.abs(found).max() * 64  # d additions in float32, of sums that may be larger than what is left of them
    assert found.shape == (11, VOCAB) and np.abs(found[:, 1:] - some).max() <= bound
    assert all(np.array_equal(found[n : n + 1], engine.exact_logits(states[n : n + 1], np.arange(VOCAB))) for n in range(11))
    assert engine.dense_tokens([states[:4], states[4:]]) == found.argmax(1).tolist()


def test_steps_take_no_more_memory_and_capture_nothing(engine):
    m = engine.backend.model
    free, captures = m.device.memory()[0], m.captures
    for _ in range(3):
        come_and_go(engine, [(prompt(n, 5), 30, SETTINGS[n % 3]) for n in range(12)], ROWS)
    assert m.captures == captures and m.device.memory()[0] >= free


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("uvicorn")
    if "FLASHHEAD_CHECKPOINT" not in os.environ:
        pytest.skip("FLASHHEAD_CHECKPOINT names no checkpoint")
    log = tmp_path_factory.mktemp("served") / "stderr.txt"
    command = [sys.executable, "-m", "flashhead_edge", "serve", os.environ["FLASHHEAD_CHECKPOINT"], "--backend", "cuda", "--port", "0"]
    with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdout is not None
        found = process.stdout.readline().strip()
        assert found.startswith("http://"), log.read_text()
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def ask(address: str, **more: object) -> str:
    body = json.dumps({"model": "m", "max_tokens": 60, **more}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def test_a_servers_texts_are_what_they_are_alone(address):
    """24 requests at once over 8 rows: greedy, drawn with a seed, with a penalty, a grammar and the dense head."""
    kinds = [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 6, "temperature": 0.7, "top_p": 0.9},
        {"seed": 7, "frequency_penalty": 0.4},
        {"seed": 9, "head": "dense"},
    ]
    asked = [{"prompt": f"{n}. The capital of France is", "seed": 1, **kinds[n % len(kinds)]} for n in range(24)]
    wanted = [ask(address, **one) for one in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: ask(address, **one), asked))
    assert found == wanted and len(set(found)) > 12
