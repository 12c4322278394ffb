"""flashhead bench onnx: made models whose steps are drawn, dense heads beside them, whole runs over tiny models, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_onnx_document import document
from cli_tools import one_document
from small_exports import write_exportable, write_with_index
from small_heads import everything_open

from flashhead_edge import cases
from flashhead_edge.cases import BYTE_COLUMNS, Case, made_index, made_rows
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.jetson.onnxruntime_sessions import native_library

pytest.importorskip("onnxruntime")

from flashhead_edge.bench import onnx as bench
from flashhead_edge.bench import onnx_made as made
from flashhead_edge.bench.energy import Energy
from flashhead_edge.cli.bench import onnx as command

TINY = ("LlamaConfig", {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96})
SHAPE = (5_003, 64)


def tiny_case() -> Case:
    s = BYTE_COLUMNS
    return Case("tiny", *SHAPE, s.cluster_size, s.rows, s.centroids, s.mean, s.caps, coordinates=s.coordinates)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A shape that is measured in seconds, and a cache folder of its own."""
    monkeypatch.setitem(cases.SHAPES, "Tiny", SHAPE)
    monkeypatch.setitem(made.CONFIGS, "Tiny", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "TOKENS", 6)
    return "Tiny"


def test_a_made_head_of_columns_has_a_byte_each() -> None:
    index = made_index(tiny_case())
    assert index.cluster_size == BYTE_COLUMNS.cluster_size
    assert index.rotation is not None
    for code in (index.rotation, index.centroids, index.stages[0].rows):
        assert set(code.widths.tolist()) == {8}
        assert code.columns == code.data.shape[1] <= SHAPE[1] + 1


def test_drawn_shares_follow_the_distribution() -> None:
    shares = made.drawn_shares(BYTE_COLUMNS, 200, 1)
    for name, want in BYTE_COLUMNS.percentiles.items():
        below, cut = (shares <= np.array(want) + 1e-12).mean(0), np.array(want) < BYTE_COLUMNS.caps
        assert np.abs(below - int(name[1:]) / 100)[cut].max(initial=0) <= 1 / 200 + 1e-9, name  # one draw from each 200th of the distribution
    assert (shares <= BYTE_COLUMNS.caps).all()


def test_each_state_opens_as_many_clusters_as_were_drawn() -> None:
    case = tiny_case()
    weight = torch.from_numpy(made_rows(case))
    index, states, step = made.drawn_head(case, BYTE_COLUMNS, weight)
    wanted = made.drawn_shares(BYTE_COLUMNS, len(states), 2) * SHAPE[0] / np.array([case.cluster_size, 1])
    opened = step.counts[:, 0].numpy()
    want = np.clip(wanted[:, 0], 1, index.probe.cap)
    # whole clusters, and the margin is set once more over all states: where 1.2 were drawn that may be 4
    assert np.abs(opened - want).max() <= 3 and np.abs(opened - want).mean() < 1
    exact = float(step.counts[:, -1].double().mean())
    assert exact == pytest.approx(wanted[:, 1].mean(), rel=0.1)  # on the average alone


@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_heads_are_the_models_own_product(tmp_path: Path, with_bias: bool) -> None:
    import onnxruntime

    random = np.random.default_rng(0)
    rows, states = torch.from_numpy(random.standard_normal((300, 64), dtype=np.float32)), random.standard_normal((4, 64), dtype=np.float32)
    bias = random.standard_normal(320).astype(np.float32) if with_bias else None
    want = states @ rows.numpy().T + (0 if bias is None else bias[:300])
    found = made.write_dense_heads(rows, bias, tmp_path)
    # int4 symmetric rounds a weight to within an eighth of its block's largest, int8 to a 128th, of states as well
    within = {"dense fp32": 1e-5, "dense int8, blocks of 32": 0.03, "dense int8, blocks of 128": 0.03, "dense int4, blocks of 32": 0.3}
    assert set(found) == set(within)
    for name, path in found.items():
        logits = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["logits"], {"hidden_states": states})[0]
        assert np.abs(logits - want).max() <= within[name] * np.abs(want).max(), name


def test_a_made_head_is_timed_beside_dense_ones(tiny_shape: str) -> None:
    said: list[str] = []
    document = bench.bench_onnx(None, None, None, [tiny_shape], [1], ["head"], "flashhead bench onnx", lambda text, share: said.append(text), rounds=2)
    records = {r["head"]: r for r in document["records"]}
    others = {"FlashHead, standard operators"} if native_library() is not None else set()
    assert set(records) == {"FlashHead", "dense fp32", "dense int8, blocks of 32", "dense int8, blocks of 128", "dense int4, blocks of 32"} | others
    ours = records["FlashHead"]
    for name, ratio in ours["times_as_fast"].items():
        each = np.array(records[name]["microseconds_rounds"]) / np.array(ours["microseconds_rounds"])
        assert [ratio["low"], ratio["high"]] == pytest.approx([each.min(), each.max()])
    assert records["dense fp32"]["speedup_over_dense"] == 1
    assert len(ours["wanted"]) == 3 and ours["wanted"]["dense fp32"] == 25
    assert ours["bytes_per_step"] < ours["dense_bytes_per_step"] and records["dense fp32"]["bytes_per_step"] == 4 * SHAPE[0] * SHAPE[1]
    assert any("making a model" in text for text in said)
    said.clear()
    bench.bench_onnx(None, None, None, [tiny_shape], [1], ["head"], "", lambda text, share: said.append(text), rounds=2)
    assert not any("making a model" in text for text in said)  # it was kept


def test_a_head_that_is_not_the_references_is_not_timed(tiny_shape: str) -> None:
    model = made.made_model(tiny_shape, None)
    text = model.reference.read_text()
    model.reference.write_text(text.replace('"tokens": [', '"tokens": [7, 7, 7, ', 1))
    with pytest.raises(EngineError, match="of 67 tokens are not the reference's"):
        bench.bench_onnx(None, None, None, [tiny_shape], [1], ["head"], "", rounds=2)


@pytest.mark.slow
def test_a_whole_run_over_a_tiny_model(tiny_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part, with a real checkpoint: a head that leaves nothing out, so that its tokens are the dense head's."""
    pytest.importorskip("onnxruntime_genai")
    monkeypatch.setattr(bench, "ENGINE_TOKENS", 8)
    asked: list[int] = []

    def energy(run: Any, gpu: bool) -> Energy:
        assert not gpu
        asked.append(run(3))
        return Energy((0.25,), "the board")

    monkeypatch.setattr(bench, "step_energy", energy)
    model = write_exportable(tmp_path / "model", hidden_size=64, num_attention_heads=4)  # k_quant takes no rows of one block
    checkpoint = write_with_index(model, tmp_path / "checkpoint", lambda w, fingerprint: everything_open(w, cascade=True, fingerprint=fingerprint))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 6)
    from small_bodies import warm_builder

    with warm_builder():  # for our two exports; the two by GenAI alone run as the product runs them
        document = bench.bench_onnx(checkpoint, str(text), None, [tiny_shape], [1], [], "flashhead bench onnx", rounds=2)
    records = {(r["part"], r["model"], r["head"]): r for r in document["records"]}
    assert records["head", "checkpoint", "FlashHead"]["top1_agreement"] == 1
    assert records["head", "checkpoint", "FlashHead"]["real_weights"]
    assert all(r["joules_per_token"] == 0.25 and r["power_scope"] == "the board" for r in records.values())
    assert set(asked) == {3, 6, 8}  # steps of a head are as many as were asked for, those of a text as many as it has
    body, dense, ours = (records["models", "Tiny", name] for name in ("no head", "dense int4, blocks of 32", "FlashHead"))
    assert body["microseconds"] < min(dense["microseconds"], ours["microseconds"])
    engines = {head: r for (part, _, head), r in records.items() if part == "engines"}
    assert set(engines) == {"FlashHead", "GenAI, int8 head", "GenAI, int4 head", "GenAI, FlashHead's model.onnx"}
    assert engines["GenAI, FlashHead's model.onnx"]["settings"]["equal_tokens"] == 8  # the same body and the same head
    for r in engines.values():
        assert r["peak_bytes"] > 0 and r["first_token_seconds"] > r["prompt_seconds"] > 0
    assert engines["FlashHead"]["wanted"] == {"GenAI, int8 head": 1.25}
    assert [s for s in document["skipped"] if s.startswith("llama.cpp")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": ["GPT-2"]}, "GPT-2 is not known, expected one of Llama-3.2-1B"),
        ({"parts": ["body"]}, "body is not known, expected one of head, models, engines"),
        ({"parts": ["engines"]}, "engines are compared on a real model, and no checkpoint was given"),
        ({"out": Path("x")}, "a checkpoint and a text belong together"),
        ({"text": "x"}, "a checkpoint and a text belong together"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused_before_anything_is_made(arguments: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {"out": None, "text": None, "gguf": None, "shapes": [], "threads": [], "parts": []} | arguments
    with pytest.raises(SettingsError, match=words):
        bench.bench_onnx(command="", **call)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    np.save(tmp_path / "states.npy", np.zeros((1, 8), np.float32))
    task = {"kind": "heads", "name": "x", "head": str(tmp_path / "head.onnx"), "dense": {}, "states": str(tmp_path / "states.npy"), "threads": 1}
    with pytest.raises(EngineError, match=r"the process of heads ended with code 1, expected a reply(?s:.*)head\.onnx"), bench.started(task) as ask:
        ask({"do": "steps"})


def test_the_command_line_names_every_part() -> None:
    """The command line names them without loading torch."""
    (option,) = [p for p in command.params if p.name == "parts"]
    assert tuple(option.type.choices) == bench.PARTS  # type: ignore[attr-defined]


def test_json_is_the_document_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flashhead_edge.cli import main

    monkeypatch.setattr(bench, "bench_onnx", lambda *arguments, **options: document())
    with pytest.raises(SystemExit) as stop:
        main(["bench", "onnx", "--json", "--plot", str(tmp_path / "plot.html")])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    found = one_document(out)
    assert len(found.pop("benchmark")["records"]) == 5
    assert found == document()
    assert (tmp_path / "plot.html").exists() and "FlashHead is x times as fast" in err
