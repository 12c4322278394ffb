"""The rivals against plain arithmetic: rounding by hand, bytes by hand, the published method state by state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import write_flashhead, write_model

from flashhead_edge import rivals
from flashhead_edge.checkpoint import read_head, read_published
from flashhead_edge.progress import silent

V, D = 131, 80


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(V + 3, D, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(5))


def rounded(rows: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric rounding to nearest with a float16 scale for each group of columns, row by row."""
    out, top = np.empty_like(rows), 2 ** (bits - 1) - 1
    for start in range(0, rows.shape[1], group):
        part = rows[:, start : start + group]
        scale = (np.abs(part).max(1, keepdims=True) / top).astype(np.float16).astype(np.float32)
        out[:, start : start + group] = np.clip(np.rint(part / scale), -top - 1, top) * scale
    return out


@pytest.mark.parametrize(("bits", "group", "row"), [(8, None, 80 + 2), (8, 32, 80 + 6), (4, 32, 40 + 6), (4, 128, 40 + 2), (4, 64, 40 + 4)])
def test_coded_dense(weight: torch.Tensor, hidden: torch.Tensor, bits: int, group: int | None, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns in groups of 32: the last of three groups has 16, and none of its bytes is a filler's."""
    monkeypatch.setattr(rivals, "BLOCK_NUMBERS", 17 * D)  # several blocks, the last one short
    coded = rivals.coded_dense(weight, None, V, bits, group)
    want = hidden.numpy() @ rounded(weight.numpy()[:V], bits, group or D).T
    found = coded.find(hidden)
    assert found.full is not None
    assert found.full.shape == (50, V)
    np.testing.assert_allclose(found.full, want, atol=D * 2**-23 * np.abs(want).max())
    assert (found.token == want.argmax(1)).all()
    assert coded.find(hidden, full=False).full is None
    assert coded.cost(None, 2).tolist() == [V * row] * 2
    if bits == 4:  # coarse enough that it must show
        assert (found.token != (hidden @ weight[:V].T).argmax(1).numpy()).any()


def test_bias_counts(weight: torch.Tensor, hidden: torch.Tensor) -> None:
    bias = torch.zeros(V + 3)
    bias[5] = 1000.0
    bias[V] = 9000.0  # a padding row
    assert (rivals.coded_dense(weight, bias, V, 8).find(hidden).token == 5).all()
    assert (rivals.DenseHead(weight, bias, V).tokens(hidden) == 5).all()


def test_names() -> None:
    rows = torch.randn(4, 256)
    assert [rivals.coded_dense(rows, None, 4, b, g).name for b, g in rivals.DENSE_CODES] == [
        "dense int8, one scale a row",
        "dense int8, groups of 32",
        "dense int4, groups of 32",
        "dense int4, groups of 128",
    ]


def test_dense_head_in_blocks(weight: torch.Tensor, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rivals.DenseHead(weight.bfloat16(), None, V).logits(hidden)
    monkeypatch.setattr(rivals, "BLOCK_NUMBERS", 10 * D)
    np.testing.assert_allclose(rivals.DenseHead(weight.bfloat16(), None, V).logits(hidden), whole, atol=D * 2**-23 * np.abs(whole).max())
    np.testing.assert_allclose(whole, hidden.numpy() @ weight.bfloat16().float().numpy()[:V].T, atol=D * 2**-23 * np.abs(whole).max())


def test_published_heads(tmp_path: Path) -> None:
    """Both settings against the method as it was published: cosine to the member means, the best n, exact rows."""
    folder = write_flashhead(write_model(tmp_path / "model"), tmp_path / "out")
    head, clusters = read_head(folder), read_published(folder)
    k = len(clusters.centroids)
    states = torch.randn(40, head.weight.shape[1], generator=torch.Generator().manual_seed(6))
    found = rivals.rivals_of(folder, head, head.weight, head.bias, silent)
    published = found[-2:]
    assert [c.name for c in published] == [f"published, {k} probes", f"published, default {k // 16} probes"]
    special = json.loads((folder / "config.json").read_text(encoding="utf-8"))["flash_head_special_token_ids"]
    assert special  # always scored, by the published method too
    w = head.weight.double().numpy()
    unit = clusters.centroids / np.linalg.norm(clusters.centroids, axis=1, keepdims=True)
    unit = unit.astype(np.float16).astype(np.float64)
    for contender, probes in zip(published, (k, k // 16)):
        result = contender.find(states)
        assert result.full is None
        assert result.counts is not None
        for i, h in enumerate(states.double().numpy()):
            best = np.argsort(-(unit @ h), kind="stable")[:probes]
            ids = np.union1d(np.flatnonzero(np.isin(clusters.assignments, best)), special)
            assert result.token[i] == ids[np.argmax(w[ids] @ h)]
            assert result.counts[i].tolist() == [probes, len(ids)]
        d = head.weight.shape[1]
        assert contender.cost(result.counts, 40).tolist() == (k * (2 * d + 1) + 4 * len(special) + result.counts[:, 1] * (2 * d + 4)).tolist()
