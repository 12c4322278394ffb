"""Perplexity and greedy agreement of a model's states, teacher-forced: against the same model in floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_edge.checkpoint import HeadWeights
from flashhead_edge.progress import Progress, silent

COLUMNS = 16_384  # tokens of the vocabulary scored at a time
ROWS = 1_024  # states at a time


@dataclass(frozen=True, eq=False)
class Scored:
    """What the dense head makes of a text's states, in the order of its positions."""

    tokens: Tensor  # [n] int64 the greedy tokens
    surprise: Tensor  # [m] float64: -log p of the token that follows, where one does

    @property
    def perplexity(self) -> float:
        return float(self.surprise.mean().exp()) if len(self.surprise) else float("nan")


def score(head: HeadWeights, states: Sequence[Tensor], ids: Sequence[Tensor], progress: Progress = silent) -> Scored:
    """Score a text's batches: states [b, s, d] and ids [b, s] each."""
    tokens, surprise = [], []
    for i, (hidden, text) in enumerate(zip(states, ids)):
        following = torch.full_like(text, -1)
        following[:, :-1] = text[:, 1:]
        for rows, targets in zip(hidden.flatten(0, 1).split(ROWS), following.flatten().split(ROWS)):
            best, lost = _rows(head, rows, targets.to(rows.device))
            tokens.append(best.cpu())
            surprise.append(lost[targets.to(lost.device) >= 0].double().cpu())
        progress("scoring", (i + 1) / len(ids))
    return Scored(torch.cat(tokens), torch.cat(surprise))


def _rows(head: HeadWeights, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens and -log p of the targets, the vocabulary in blocks; ties go to the smaller id."""
    n, device = len(hidden), hidden.device
    best, token = torch.full((n,), -torch.inf, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    total, hit = torch.full((n,), -torch.inf, device=device), torch.zeros(n, device=device)
    for first in range(0, head.vocab_size, COLUMNS):
        last = min(first + COLUMNS, head.vocab_size)
        logits = hidden.float() @ head.weight[first:last].to(device).float().T
        if head.bias is not None:
            logits += head.bias[first:last].to(device).float()
        logits *= head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        most, at = logits.max(1)
        token = torch.where(most > best, at + first, token)
        best = torch.maximum(best, most)
        total = torch.logaddexp(total, logits.logsumexp(1))
        inside = (targets >= first) & (targets < last)
        picked = logits.gather(1, (targets - first).clamp(0, last - first - 1)[:, None])[:, 0]
        hit = torch.where(inside, picked, hit)
    return token, total - hit
