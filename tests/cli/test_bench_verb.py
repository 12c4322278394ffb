"""flashhead bench head: what it says without a GPU and to wrong calls, and its table and page of a document."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import one_document
from rich.console import Console

from flashhead_edge.bench import head as bench
from flashhead_edge.cli.bench import head as head_command
from flashhead_edge.errors import FlashHeadError
from flashhead_edge.records.form import check_record
from flashhead_edge.report.heads import show_heads, write_heads
from flashhead_edge.report.serving import show_serving, write_serving
from flashhead_edge.report.steps import show_steps, write_steps

NO_GPU = "flashhead: bench head: no NVIDIA GPU was found, expected one that torch can use; run it on a machine with a GPU"


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("arguments", [(), ("--json",), ("--shape", "Llama-3.2-1B"), ("somewhere", "--text", "x", "--store")], ids=" ".join)
def test_without_a_gpu_it_is_one_sentence(inside: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    result = inside("bench", "head", *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == NO_GPU


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--store",), "--text and --store are about a checkpoint"),
        (("--text", "x"), "--text and --store are about a checkpoint"),
        (("out",), "give --text FILE, and no --shape"),
        (("out", "--text", "x", "--shape", "Qwen3-0.6B"), "give --text FILE, and no --shape"),
        (("out", "--text", "x", "--store", "--head", "flash"), "--store keeps what auto goes by: add --head auto"),
        (("--head", "sparse"), "'sparse' is not one of"),
        (("--batch", "65"), "65 is not in the range 1<=x<=64"),
        (("--plot", "nowhere/x.html"), "nowhere does not exist"),
        (("--shape", "GPT-2"), "shape GPT-2 is not known, expected one of Llama-3.2-1B"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_calls_are_refused_before_a_gpu_is_looked_for(inside: Callable[..., Any], arguments: tuple[str, ...], words: str) -> None:
    result = inside("bench", "head", *arguments)
    assert result.returncode == 2
    assert words in result.stderr


MEASURED = [{"batch": 8, "dense": 220.0, "flash": 296.0}]


def document() -> dict[str, Any]:
    """What a run over two batches returns, with invented figures."""
    records = []
    for head, us in (
        ("dense bf16", 220.0),
        ("dense int4, groups of 32", 58.0),
        ("published", 40.0),
        ("fitted", 37.0),
        ("auto", 37.0),
        ("draw from the candidates", 4.0),
    ):
        for batch in (1, 8):
            time = us * (batch if us < 41 else 1)
            settings = {"takes": "dense" if batch > 4 else "flash"} if head == "auto" else {}
            records.append(
                {
                    **{"model": "Llama-3.2-1B", "shape": [128_256, 2_048], "batch": batch, "head": head, "settings": settings, "microseconds": time},
                    **{"microseconds_p99": time + 1, "bytes_per_step": 4e6, "floor_microseconds": 1.5, "speedup_over_dense": 220 / time},
                    **{"speedup_over_published": None if head.startswith("dense") else 40 * batch / time, "command": "flashhead bench head"},
                }
            )
    counts = {"mean": [1284.2, 41_111.9, 24_195.1, 5_384.6, 508.4, 65.6], "measured mean": [1284.0, 41_112.0, 24_195.0, 5_385.0, 508.0, 66.0]}
    return {
        "device": "NVIDIA H100 80GB HBM3", "bandwidth": 3.01e12, "records": records,
        "counts": [{"model": "Llama-3.2-1B", "source": "an evaluation", "clusters": 4_008, "counts": counts}],
        "crossovers": [{"model": "Llama-3.2-1B", "kinds": {name: {"crossover": n, "measured": MEASURED} for name, n in (("tokens", 5), ("logits", 4))}}],
    }  # fmt: skip


def test_the_table_names_heads_counts_and_the_crossover() -> None:
    stream = io.StringIO()
    show_heads(document() | {"stored": "/cache/x.json"}, Console(file=stream, width=160))
    text = stream.getvalue()
    for words in (
        "NVIDIA H100 80GB HBM3, copy bandwidth 3.01 TB/s",
        "from an evaluation",
        "24,195",
        "auto (dense)",
        "the dense head is faster from a batch of 5 on for tokens, from a batch of 4 on for logits; auto takes it there",
        "kept in /cache/x.json",
    ):
        assert words in text
    (line,) = [row for row in text.splitlines() if row.strip().startswith("fitted") and " 1 " in row]
    assert "5.95" in line and "1.08" in line  # times as fast as dense and as published
    never = document()
    never["crossovers"][0]["kinds"]["tokens"]["crossover"] = None
    stream = io.StringIO()
    show_heads(never, Console(file=stream, width=160))
    assert "the dense head is faster at no batch up to 8 for tokens, from a batch of 4 on for logits" in stream.getvalue()


def test_the_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    write_heads(document(), tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text(encoding="utf-8")
    assert page.count("<svg class") == 1 and "fitted, batch 8: 296.00 us" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    with pytest.raises(FlashHeadError, match="cannot be written"):
        write_heads(document(), tmp_path / "nowhere/plot.html")


def test_json_is_the_document_alone(inside: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "bench_shapes", lambda *arguments, **options: document())
    result = inside("bench", "head", "--json", "--plot", tmp_path / "plot.html")
    assert result.returncode == 0
    found = one_document(result.stdout)
    records = found.pop("benchmark")["records"]
    assert found == document()
    assert {(r["head"], r["batch"]) for r in records} == {
        (h, b) for h in ("dense int4, groups of 32", "published", "FlashHead", "FlashHead or dense") for b in (1, 8)
    }
    assert (tmp_path / "plot.html").exists()
    assert "auto (flash)" in result.stderr


@pytest.mark.gpu
def test_a_run_measures_every_head(inside: Callable[..., Any], tmp_path: Path) -> None:
    result = inside("bench", "head", "--shape", "Qwen3-0.6B", "--batch", "1", "--json", "--plot", tmp_path / "plot.html")
    assert result.returncode == 0, result.stderr
    found = one_document(result.stdout)
    for i, one in enumerate(found["benchmark"]["records"]):
        check_record(one, f"record {i + 1}")
    heads = [r["head"] for r in found["records"]]
    assert heads[0] == "dense bf16" and {"published", "fitted", "fitted, at the cap", "auto", "dense int8, one scale a row", "dense int4, groups of 32"} < set(
        heads
    )
    assert all(r["microseconds"] > r["floor_microseconds"] / 2 for r in found["records"])


def test_serving_without_vllm_is_one_sentence(inside) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    result = inside("bench", "vllm")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("flashhead: bench vllm: vLLM is not installed")


def test_serving_is_shown() -> None:
    gpu, host = {"total": 1220.4, "head": 33.7, "sampler": 21.0}, {"head": 60.0}
    record = {
        "model": "Llama-3.2-1B",
        "batch": 1,
        "head": "flash",
        "settings": {"runner": "v2", "body": "bf16"},
        "gpu_microseconds": gpu,
        "host_microseconds": host,
    }
    console = Console(width=200, file=io.StringIO())
    records = [record | {"tokens_per_second": 544.2, "tokens_per_second_spread": [527, 579]}]
    show_serving({"records": records}, console)
    assert all(word in console.file.getvalue() for word in ("Llama-3.2-1B", "1,220.4", "33.7", "544 (527 to 579)"))


def serving_document() -> dict[str, Any]:
    """Figures of a run on an H100, and invented ones at another batch."""
    common = {"model": "Llama-3.2-1B", "settings": {"runner": "v2", "body": "bf16"}, "device": "NVIDIA H100 80GB HBM3", "backend_version": "0.26.0"}
    records = []
    for head, total, own, sampler, rate in (("dense", 1350.5, 186.5, 20.7, 510.0), ("flash", 1177.1, 27.9, 3.9, 678.0)):
        for batch in (1, 16):
            gpu = {"total": total, "head": own, "sampler": sampler}
            records.append({**common, "batch": batch, "head": head, "gpu_microseconds": gpu, "host_microseconds": {"head": 90.0}})
            records[-1] |= {"tokens_per_second": rate * batch, "tokens_per_second_spread": [rate, 2 * rate * batch], "command": "flashhead bench vllm"}
    return {"records": records}


def test_servings_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    write_serving(serving_document(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg class") == 2 and "flash, batch 1: 1,177.1 us a step, 678 tokens a second" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    with pytest.raises(FlashHeadError, match="cannot be written"):
        write_serving(serving_document(), tmp_path / "nowhere/page.html")


def test_a_page_of_serving_that_cannot_be_written_is_refused_first(inside: Callable[..., Any]) -> None:
    result = inside("bench", "vllm", "--plot", "nowhere/x.html")
    assert result.returncode == 2 and "nowhere does not exist" in result.stderr


def test_every_head_that_can_be_timed_can_be_named() -> None:
    """The command line names them without loading torch."""
    (option,) = [p for p in head_command.params if p.name == "heads"]
    assert tuple(option.type.choices) == bench.HEADS


def steps_document(backend: str, dense: str) -> dict[str, Any]:
    """As `bench_tensorrt` and `bench_decode` return it, with invented times."""
    records = []
    for batch in (1, 4):
        common = {"model": "Llama-3.2-1B", "batch": batch, "device": "H100", "backend": backend, "backend_version": "8.6.0", "command": "x", "context": 512}
        for head, time in (("FlashHead", 500.0), (dense, 690.0)):
            records.append(common | {"head": head, "microseconds": time * batch, "spread": [time, 2 * time * batch]})
        records[-2] |= {"tokens_per_second": 1900.0 * batch, "graph_nodes": 150, "speedup_over_dense": 1.38, "share_of_head_gone": 0.88}
    return {"records": records}


def engines_document() -> dict[str, Any]:
    own = steps_document("tensorrt", "dense")
    for r in own["records"]:
        r["engine_bytes"] = 600_000
    return own


def decoding_document() -> dict[str, Any]:
    own = steps_document("cuda", "dense fp16")
    for r in own["records"]:
        r["joules_per_token"] = 0.0444
        if r["head"] == "FlashHead":
            r |= {"prompt": 512, "first_token_seconds": 0.004, "device_bytes": 1_097_000_000}
    return own


@pytest.mark.parametrize(
    ("own", "there", "absent"),
    [(engines_document(), ("0.60", "engine, MB"), ("first token", "mJ a token")), (decoding_document(), ("44.4", "4.0", "1,097"), ("engine, MB",))],
    ids=["tensorrt", "decode"],
)
def test_steps_have_a_table_and_a_page(own: dict[str, Any], there: tuple[str, ...], absent: tuple[str, ...], tmp_path: Path) -> None:
    console = Console(width=240, record=True, file=io.StringIO())
    show_steps(own, console)
    text = console.export_text()
    write_steps(own, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for words in ("500.0", "1,000.0", "88 %", "1.38", "7,600", *there):
        assert words in page and (words in text or "MB" in words or words in ("0.60", "1,097"))  # a terminal has no room for sizes
    assert not any(words in text or words in page for words in absent)  # a column that no record fills is left out
    assert page.count("<figure>") == 1 and "FlashHead, batch 4: 2,000.0 us a step" in page


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_decoding_without_a_gpu_is_one_sentence(inside) -> None:
    result = inside("bench", "decode", "--shape", "Llama-3.2-1B")
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.splitlines()[-1].startswith("flashhead: GPU: ")
    result = inside("bench", "decode", "--shape", "Llama-9")
    assert result.returncode == 2 and "bench decode: Llama-9 is not known" in result.stderr
    assert inside("bench", "decode", "somewhere", "--shape", "Llama-3.2-1B").returncode == 2


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_engines_without_a_gpu_are_one_sentence(inside) -> None:
    result = inside("bench", "tensorrt", "--shape", "Llama-3.2-1B")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("flashhead: GPU: ")
    result = inside("bench", "tensorrt", "--shape", "Llama-9")
    assert result.returncode == 2 and "bench tensorrt: Llama-9 is not known" in result.stderr
