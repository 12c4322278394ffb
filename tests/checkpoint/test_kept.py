"""Every format version that was ever released still reads, from files that were written then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashhead_edge.checkpoint import load_model, read_head, read_index, read_published
from flashhead_edge.index import FORMAT_VERSION
from flashhead_edge.reference import step, torch_head

KEPT = Path(__file__).resolve().parent / "kept"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_kept_checkpoint(version: int) -> None:
    """It reads, belongs to its head, and gives the tokens and counts that it gave when it was written."""
    folder, answer = KEPT / f"v{version}", json.loads((KEPT / f"v{version}.json").read_text())
    head = read_head(folder)
    assert head.fingerprint == answer["fingerprint"]
    index = read_index(folder, head)
    assert len({s.rows.kind for s in index.stages}) == 4  # every kind of code
    hidden = torch.from_numpy(np.random.default_rng(11).normal(size=(16, index.hidden_size)).astype(np.float32))
    found = step(torch_head(index, head.weight), hidden)
    assert found.token.tolist() == answer["tokens"] and found.counts.tolist() == answer["counts"]
    assert read_published(folder).n_probes == answer["n_probes"]
    assert torch.equal(load_model(folder).get_output_embeddings().weight, head.weight.float())
