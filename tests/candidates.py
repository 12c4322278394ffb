"""What a head's candidates of a state must be, whatever computed them."""

from __future__ import annotations

import numpy as np
import torch

from flashhead_edge.head import Step
from flashhead_edge.reference import exact_logits


def not_the_references(got: dict[str, np.ndarray], want: Step, weight: torch.Tensor, hidden: torch.Tensor) -> int:
    """Check ids, their order and their exact logits, state by state: how many ids only one of the two sides has."""
    only_one = 0
    for i in range(len(hidden)):
        ids = got["candidate_ids"][i][got["candidate_ids"][i] >= 0]
        assert (np.diff(ids) > 0).all()
        assert (got["candidate_ids"][i][len(ids) :] == -1).all() and np.isneginf(got["candidate_logits"][i][len(ids) :]).all()
        # sums in float32, the reference's in float64
        exact = exact_logits(weight, None, hidden[i : i + 1], torch.from_numpy(ids))[0].numpy()
        assert np.allclose(got["candidate_logits"][i][: len(ids)], exact, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(exact).max())))
        assert got["counts"][i, -1] == len(ids)
        only_one += len(np.setxor1d(ids, want.ids[i][want.ids[i] >= 0].numpy()))
    return only_one
