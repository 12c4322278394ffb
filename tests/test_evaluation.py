"""The measures against numbers worked out by hand or written again, plainly, in the test."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import write_flashhead, write_model
from hypothesis import given
from hypothesis import strategies as st
from small_heads import everything_open, few_probes
from torch import Tensor

from flashhead_edge import costs, intervals
from flashhead_edge.capture import capture_ids
from flashhead_edge.checkpoint import load_model, read_head
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation import HeadContender, as_json, evaluate, evaluate_checkpoint, measure_all, summarise, wilson
from flashhead_edge.evaluation import measures as m
from flashhead_edge.evaluation.run import cut_prompts, dense_text, summary
from flashhead_edge.reference import torch_head
from flashhead_edge.rivals import DenseHead

V, D, N = 131, 32, 61
ROUNDING = D * 2**-24 * 100  # float32 sums of D products; logits here stay below 100, so do the errors of probabilities


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(V + 5, D, generator=torch.Generator().manual_seed(0)) * 0.5  # five rows of padding


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    t = np.random.default_rng(2).integers(0, V, N)
    t[-1] = -1
    return t


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (10, 10, 0.722467, 1.0), (995, 1000, 0.988349, 0.997862), (7960, 8000, 0.993199, 0.996326)],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    """As scipy.stats.binomtest(k, n).proportion_ci(method="wilson") gives them, to six digits."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-7)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_properties(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)
    # the ends are the shares at which the count would be z standard deviations off
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes - n * end) == pytest.approx(intervals.Z95 * math.sqrt(n * end * (1 - end)), rel=1e-6, abs=1e-6)
    assert wilson(10 * successes, 10 * n)[0] >= low - 1e-15


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses(successes: int, n: int) -> None:
    with pytest.raises(SettingsError, match=f"{successes} of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_everything_open_is_the_dense_head(weight: Tensor, hidden: Tensor, targets: np.ndarray, cascade: bool, scale: float, softcap: float | None) -> None:
    head = torch_head(everything_open(weight, cascade, V, fingerprint="x"), weight)
    e = evaluate(head, hidden=hidden, targets=targets, dense=DenseHead(weight, None, V), scale=scale, softcap=softcap)
    assert (e.positions, e.top1_agreement, e.coverage, e.target_coverage) == (N, 1.0, 1.0, 1.0)
    assert e.top1_agreement_interval == wilson(N, N)
    assert e.worst_tokens == ()
    for measured in (e.total_variation, e.total_variation_p99, e.total_variation_candidates, e.total_variation_candidates_p99):
        assert measured is not None
        assert 0 <= measured < ROUNDING
    assert e.perplexity == pytest.approx(e.perplexity_dense, rel=ROUNDING)
    assert e.perplexity_covered == pytest.approx(e.perplexity_covered_dense, rel=ROUNDING)
    assert e.exact_rows == m.Spread(V, V, V, V)
    assert [s.mean for s in e.rows_scored] == ([V, V] if cascade else [])


def softmax64(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_few_probes_against_brute_force(weight: Tensor, hidden: Tensor, targets: np.ndarray, scale: float, softcap: float | None) -> None:
    """State by state, token by token, in float64 from the definition of the published head; no code of the product but its logits of the tail."""
    probes, size = 3, 8
    head = torch_head(few_probes(weight, probes, V, size, fingerprint="x"), weight)
    e = evaluate(head, hidden=hidden, targets=targets, dense=DenseHead(weight, None, V), scale=scale, softcap=softcap)
    w, h = weight.double().numpy()[:V], hidden.double().numpy()
    clusters = [range(k * size, min(V, (k + 1) * size)) for k in range(-(-V // size))]
    unit = np.stack([w[list(c)].astype(np.float32).mean(0) for c in clusters])
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)

    def final(x: np.ndarray) -> np.ndarray:
        return x * scale if softcap is None else softcap * np.tanh(x * scale / softcap)

    hits, covered, rows, tv_c, tv, missed = 0, 0, [], [], [], {}
    losses: dict[str, list[float]] = {"all": [], "all dense": [], "covered": [], "covered dense": []}
    wide = head.logits(hidden).double().numpy()
    for i in range(N):
        opened = np.argsort(-(unit @ h[i]), kind="stable")[:probes]
        ids = sorted(t for k in opened for t in clusters[k])
        logits = w @ h[i]
        winner, token = int(np.argmax(logits)), max(ids, key=lambda t: (logits[t], -t))
        hits += winner == token
        covered += winner in ids
        if winner != token:
            missed[winner] = missed.get(winner, 0) + 1
        rows.append(len(ids))
        p, q = softmax64(final(logits)), np.zeros(V)
        q[ids] = softmax64(final(logits[ids]))
        tv_c.append(0.5 * np.abs(p - q).sum())
        q = softmax64(final(wide[i]))
        tv.append(0.5 * np.abs(p - q).sum())
        if targets[i] >= 0:
            for name, prob in (("", q), (" dense", p)):
                losses["all" + name].append(-math.log(prob[targets[i]]))
                if targets[i] in ids:
                    losses["covered" + name].append(-math.log(prob[targets[i]]))
    assert 0 < hits < N  # else the case would show nothing
    assert 0 < len(losses["covered"]) < N - 1
    assert e.top1_agreement == hits / N
    assert e.top1_agreement_interval == wilson(hits, N)
    assert e.coverage == covered / N
    assert e.target_coverage == len(losses["covered"]) / (N - 1)
    assert e.clusters_opened == m.Spread(probes, probes, probes, probes)
    assert e.exact_rows is not None
    assert dataclasses.astuple(e.exact_rows) == pytest.approx([np.mean(rows), *np.quantile(rows, [0.5, 0.9, 0.99])])
    assert e.capped_steps is None  # a count is no margin that a cap could cut
    fixed = len(clusters) * (2 * D + 1)  # centroids in float16 and their errors
    each = fixed + np.array(rows) * (2 * D + 4)  # exact rows and their ids
    assert e.bytes_per_step == pytest.approx(each.mean())
    assert e.bytes_per_step_p99 == pytest.approx(np.quantile(each, 0.99))
    assert e.dense_bytes_per_step == 2 * V * D
    assert e.bytes_share == pytest.approx(each.mean() / (2 * V * D))
    assert e.bytes_percentiles == tuple(int(x) for x in np.quantile(each, np.linspace(0, 1, 101)))
    for measured, values in ((e.total_variation_candidates, tv_c), (e.total_variation, tv)):
        assert measured == pytest.approx(np.mean(values), abs=ROUNDING)
    for measured, values in ((e.total_variation_candidates_p99, tv_c), (e.total_variation_p99, tv)):
        assert measured == pytest.approx(np.quantile(values, 0.99), abs=ROUNDING)
    for measured, name in (
        (e.perplexity, "all"),
        (e.perplexity_dense, "all dense"),
        (e.perplexity_covered, "covered"),
        (e.perplexity_covered_dense, "covered dense"),
    ):
        assert measured == pytest.approx(math.exp(np.mean(losses[name])), rel=1e-5)
    assert {w["id"]: w["missed"] for w in e.worst_tokens} == dict(sorted(missed.items(), key=lambda x: (-x[1], x[0]))[: m.WORST_TOKENS])


def test_blocks_change_nothing(weight: Tensor, hidden: Tensor, targets: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch_head(few_probes(weight, 3, V, fingerprint="x"), weight)
    whole = evaluate(head, hidden=hidden, targets=targets, dense=DenseHead(weight, None, V))
    monkeypatch.setattr(m, "BLOCK_BYTES", 4 * V * 7)
    monkeypatch.setattr(m, "CHUNK_BYTES", 4 * V * 2)
    parts = evaluate(head, hidden=hidden, targets=targets, dense=DenseHead(weight, None, V))
    for key, value in as_json(whole).items():
        # matrix products of other heights round differently
        assert as_json(parts)[key] == (pytest.approx(value, rel=ROUNDING) if isinstance(value, float) else value), key


def test_capped_steps_are_counted(weight: Tensor, hidden: Tensor) -> None:
    """Margins finite and wide, caps small: every step is cut. Margins of nothing: none is."""
    index = few_probes(weight, 3, V, fingerprint="x")
    for margin, capped in ((1e6, N), (0.0, 0)):
        head = torch_head(dataclasses.replace(index, probe=dataclasses.replace(index.probe, margin=margin)), weight)
        e = evaluate(head, hidden=hidden, dense=DenseHead(weight, None, V))
        assert (e.capped_steps, e.capped_share) == (capped, capped / N)
        assert e.clusters_opened is not None
        assert e.clusters_opened.mean == (3 if capped else 1)
        assert e.perplexity is None
        assert e.perplexity_dense is None
        assert e.target_coverage is None


def test_bytes_are_those_of_costs(weight: Tensor, hidden: Tensor) -> None:
    index = everything_open(weight, True, V, fingerprint="x")
    e = evaluate(torch_head(index, weight), hidden=hidden, dense=DenseHead(weight, None, V))
    codes = [index.stages[0].rows, index.stages[1].rows]
    by_hand = costs.fixed_bytes(index) + sum(V * (c.data.shape[1] + 2 * c.scale.shape[1] + 1) for c in codes if c.scale is not None) + V * (2 * D + 4)
    assert e.bytes_per_step == by_hand == e.bytes_per_step_p99


def test_smaller_id_wins_ties_and_padding_is_left_out(hidden: Tensor) -> None:
    rows = torch.ones(10, D)
    rows[8:] = 5.0  # padding rows that would win
    tokens = DenseHead(rows, None, 8).tokens(torch.ones(3, D))
    assert tokens.tolist() == [0, 0, 0]
    assert DenseHead(rows, torch.tensor([0, 0, 1.0, 0, 1, 0, 0, 0, 9, 9]), 8).tokens(torch.ones(1, D)).tolist() == [2]
    assert DenseHead(rows, torch.arange(10.0), 8).logits(torch.ones(1, D)).tolist() == [[D + i for i in range(8)]]


def test_worst_tokens_by_hand() -> None:
    winners = np.array([7, 7, 7, 4, 4, 9, 9, 9, 1])
    agrees = np.array([0, 0, 1, 0, 0, 0, 1, 1, 1], bool)
    worst = m.worst_tokens(winners, agrees, str, most=2)
    assert worst == ({"id": 4, "text": "4", "missed": 2, "of": 2}, {"id": 7, "text": "7", "missed": 2, "of": 3})


def test_histogram() -> None:
    assert m.histogram(np.array([5, 5, 5])) == {"edges": [5.0, 6.0], "steps": [3]}
    h = m.histogram(np.array([1, 1, 2, 3, 10, 100, 1000]))
    assert (sum(h["steps"]), h["edges"][0], h["edges"][-1]) == (7, 1.0, 1001.0)
    assert h["steps"][:2] == [2, 1]  # whole numbers are not split
    assert all(a < b for a, b in zip(h["edges"], h["edges"][1:]))


def test_identical_length_by_hand() -> None:
    dense = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    ours = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4]])
    assert m.identical_length(ours, dense).tolist() == [4, 0, 2]


def test_no_states() -> None:
    with pytest.raises(SettingsError, match="0 hidden states and 0 targets"):
        measure_all([], torch.zeros(0, D), np.zeros(0), DenseHead(torch.zeros(V, D), None, V), vocab_size=V)


def test_cut_prompts() -> None:
    assert cut_prompts(torch.arange(0), 4) is None
    assert cut_prompts(torch.arange(5), 0) is None
    one = cut_prompts(torch.arange(5), 4)
    assert one is not None
    assert one.tolist() == [[0, 1, 2, 3, 4]]
    many = cut_prompts(torch.arange(1000), 4)
    assert many is not None
    assert many.shape == (4, 64)
    assert many[:, 0].tolist() == [0, 250, 500, 750]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    return write_flashhead(write_model(folder / "model"), folder / "out")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 12, encoding="utf-8")
    (folder / "zwei.txt").write_text("Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. " * 4, encoding="utf-8")
    return [folder / "one.txt", folder / "zwei.txt"]


@pytest.fixture(scope="module")
def document(checkpoint: Path, texts: list[Path]) -> dict[str, Any]:
    said: list[tuple[str, float | None]] = []
    result = evaluate_checkpoint(checkpoint, texts, 600, lambda message, share=None: said.append((message, share)), prompts=2, command="flashhead evaluate")
    shares = [share for message, share in said if share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any(message.startswith("zwei.txt: ") for message, _ in said)
    return result


RECORD = [
    "model", "shape", "real_weights", "batch", "context", "head", "settings",
    "backend", "backend_version", "device", "threads", "microseconds", "tokens_per_second", "bytes_per_step",
    "bytes_per_step_p99", "dense_bytes_per_step", "top1_agreement", "top1_agreement_interval", "speedup_over_dense", "spread", "commit",
    "command",
]  # fmt: skip
ASKED = ["positions", "top1_agreement", "top1_agreement_interval", "coverage", "bytes_per_step", "bytes_per_step_p99", "dense_bytes_per_step"]


def test_document(document: dict[str, Any], texts: list[Path]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    for key in RECORD + ASKED:
        assert key in document, key
    assert (document["shape"], document["head"], document["command"]) == ([256, 32], "fitted", "flashhead evaluate")
    assert document["precision"] == "fp32"
    assert [t["text"] for t in document["texts"]] == ["one.txt", "zwei.txt"]
    assert [t["positions"] for t in document["texts"]] == [600, 4 * len("Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. ".encode())]
    assert document["positions"] == sum(t["positions"] for t in document["texts"])
    assert (document["top1_agreement"], document["coverage"]) == (1.0, 1.0)  # everything is open
    names = [r["name"] for r in document["rivals"]]
    # d is 32 here: groups of 32 and of 128 are both the whole row
    assert names == ["dense int8, one scale a row", "dense int4, one scale a row", "published, 32 probes", "published, default 2 probes"]
    for block in [document, *document["texts"]]:
        for record in [block, *block["rivals"]]:
            for key in ASKED:
                assert key in record, key
            assert 0 <= record["top1_agreement_interval"][0] <= record["top1_agreement"] <= record["top1_agreement_interval"][1] <= 1
            assert 0 <= record["coverage"] <= 1
            assert record["free_running"]["tokens"] == 128
    assert document["summary"]["lowest_agreement"] == 1.0
    assert document["texts"][0]["free_running"]["mean"] == 128.0
    pooled = np.average([t["bytes_per_step"] for t in document["texts"]], weights=[t["positions"] for t in document["texts"]])
    assert document["bytes_per_step"] == pytest.approx(pooled)


def test_free_running_is_that_of_a_loop(checkpoint: Path, texts: list[Path]) -> None:
    """The short way (the dense text's states) gives what a second, free loop gives."""
    model, stored = load_model(checkpoint), read_head(checkpoint)
    weight = model.get_output_embeddings().weight.detach()
    ids = torch.tensor(list(texts[0].read_bytes()))
    prompts = cut_prompts(ids, 3)
    assert prompts is not None
    states, dense = dense_text(model, DenseHead(weight, None, stored.vocab_size), prompts, 40)
    head = torch_head(few_probes(weight, 9, stored.vocab_size, fingerprint="x"), weight)
    short = m.free_running(HeadContender("few", head, 2 * D), states, dense)
    lengths = []
    for row, text in zip(prompts, dense):
        ids, n = row.tolist(), 0
        while n < 40:
            token = int(head.step(capture_ids(model, torch.tensor(ids))[-1:]).token)
            if token != text[n]:
                break
            ids.append(token)
            n += 1
        lengths.append(n)
    assert 0 < sum(lengths) < 120  # else the case would show nothing
    assert short == {"prompts": 3, "tokens": 40, "mean": np.mean(lengths), "median": np.median(lengths), "whole": np.mean([n == 40 for n in lengths])}


def test_targets_are_the_next_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Perplexity of the document against the model's own loss on the same windows; the last position's target lies beyond the positions."""
    text = "abcdefgh" * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    document = evaluate_checkpoint(checkpoint, [tmp_path / "text.txt"], 100, rivals=False, prompts=0)
    model = load_model(checkpoint)
    from flashhead_edge.checkpoint import load_tokenizer

    ids = load_tokenizer(checkpoint)(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:100]])).logits[0].double()
    losses = -logits.log_softmax(1)[torch.arange(100), torch.tensor(ids[1:101])]
    assert document["perplexity_dense"] == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert document["perplexity"] == pytest.approx(document["perplexity_dense"], rel=1e-4)
    assert document["rivals"] == []
    assert document["free_running"] is None


def test_lowest_text_counts() -> None:
    def record(name: str, agreement: float, share: float) -> dict[str, Any]:
        return {"text": name, "top1_agreement": agreement, "top1_agreement_interval": [agreement, 1], "bytes_share": share}

    s = summary([record("a", 0.999, 0.02), record("b", 0.99, 0.04)], {"target_agreement": 0.995})
    assert (s["lowest_agreement_text"], s["lowest_agreement"], s["target_agreement"]) == ("b", 0.99, 0.995)
    assert (s["mean_agreement"], s["mean_bytes_share"]) == (pytest.approx(0.9945), pytest.approx(0.03))


@pytest.mark.parametrize(
    ("content", "positions", "sentence"),
    [
        (None, 10, "no such file, expected a text file; check the path"),
        (b" \n", 10, "it is empty, expected text; give another one"),
        (b"ab\xffcd", 10, "byte 2 is not UTF-8, expected UTF-8 text; convert the file"),
        (b"text", 0, "0 positions and 0 prompts, expected at least 1 and 0"),
    ],
)
def test_bad_texts(checkpoint: Path, tmp_path: Path, content: bytes | None, positions: int, sentence: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=sentence):
        evaluate_checkpoint(checkpoint, [path], positions)


def test_a_folder_is_no_text(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="it is a folder, expected a text file"):
        evaluate_checkpoint(checkpoint, [tmp_path])


def test_no_text(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="no text given, expected at least one"):
        evaluate_checkpoint(checkpoint, [])


def test_summarise_names_tokens(weight: Tensor, hidden: Tensor) -> None:
    contender = HeadContender("few", torch_head(few_probes(weight, 1, V, fingerprint="x"), weight), 2 * D, full_width=False)
    (measured,) = measure_all([contender], hidden, np.full(N, -1), DenseHead(weight, None, V), vocab_size=V)
    e = summarise(contender, measured, 1, lambda token: f"<{token}>")
    assert e.worst_tokens
    assert all(w["text"] == f"<{w['id']}>" for w in e.worst_tokens)
    assert e.total_variation is None
