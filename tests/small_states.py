"""A small head and states with structure, no model needed: correlated, of unlike lengths, and some tokens win often."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

V, D, SIZE = 250, 16, 8


def small_weight() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0)) + 0.3


def small_bias() -> Tensor:
    return 0.5 * torch.randn(V, generator=torch.Generator().manual_seed(1))


def small_states(n: int, seed: int = 2) -> Tensor:
    """[n, D] float32, a mean of 0.5, some directions three times as long as others."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * torch.linspace(0.5, 1.5, D) * (0.5 + torch.rand(n, 1, generator=g)) + 0.5


def small_table() -> np.ndarray:
    """[K, SIZE] int32, shuffled, six slots empty in different clusters."""
    k = -(-V // SIZE)
    table = np.full((k, SIZE), -1, np.int32)
    ids = np.random.default_rng(3).permutation(V).astype(np.int32)
    full = np.ones_like(table, bool)
    full[: k * SIZE - V, SIZE - 1] = False
    table[full] = ids
    return table
