"""What two runs of a task say of two heads: the harness's own figures side by side, and how often the answers are the same. Numpy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashhead_edge.evaluation.measures import Measured, join
from flashhead_edge.intervals import wilson

GENERATED, CHOSEN, SCORED, ROLLED = "generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling"  # the harness's kinds of output


def share(same: int, n: int) -> dict[str, Any]:
    """So many of so many, with the 95 % interval of the share."""
    return {"same": same, "of": n, "share": same / n, "interval": list(wilson(same, n))}


def compare_task(kind: str, dense: Mapping[str, Any], flash: Mapping[str, Any], samples: tuple[Sequence[Any], Sequence[Any]]) -> dict[str, Any]:
    """One task of the harness, both heads.

    Args:
        kind: the task's output type.
        dense, flash: the harness's results of the task, by `metric,filter`.
        samples: the harness's samples of both runs, one an item and filter.
    Returns:
        `metrics`: [{metric, filter, dense, flash}]; `equal_answers` by filter, the share of items whose filtered answer is the same: the
        extracted answer, the option chosen, or whether the text is the greedy one; None where a task scores whole texts.
        `equal_texts`: the share whose whole generated text is the same; None where none is generated.
    """
    names = [name for name in dense if "," in name and "_stderr," not in name]
    metrics = [{"metric": m, "filter": f, "dense": number(dense[f"{m},{f}"]), "flash": number(flash[f"{m},{f}"])} for m, f in (n.split(",", 1) for n in names)]
    pairs = paired(*samples)
    equal = None
    if kind != ROLLED:
        equal = {name: share(sum(answer(kind, a) == answer(kind, b) for a, b in found), len(found)) for name, found in pairs.items()}
    texts = None
    if kind == GENERATED:
        found = next(iter(pairs.values()))
        texts = share(sum(a["resps"] == b["resps"] for a, b in found), len(found))
    return {"kind": kind, "items": len(next(iter(pairs.values()))), "metrics": metrics, "equal_answers": equal, "equal_texts": texts}


def paired(dense: Sequence[Any], flash: Sequence[Any]) -> dict[str, list[tuple[Any, Any]]]:
    """The samples of both runs, item by item, by filter."""
    other = {(s["filter"], s["doc_id"]): s for s in flash}
    found: dict[str, list[tuple[Any, Any]]] = {}
    for s in dense:
        found.setdefault(s["filter"], []).append((s, other[s["filter"], s["doc_id"]]))
    return found


def answer(kind: str, sample: Mapping[str, Any]) -> Any:
    """What a sample's answer comes to: two heads' answers are the same if this is equal."""
    found = sample["filtered_resps"]
    if kind == CHOSEN:  # the option with the largest log-probability, as the harness's `acc` has it; the first of equals
        return int(np.argmax([float(r[0]) for r in found]))
    if kind == SCORED:
        return [bool(r[1]) for r in found]
    return found


def number(value: Any) -> float | None:
    """A metric as JSON knows it."""
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None


def scored(parts: Sequence[Measured]) -> dict[str, Any] | None:
    """Every token whose probability a task asked for, on both heads; None where it asked for none.

    Returns:
        `tokens`; `exact_rows`, the share of them whose logit FlashHead has exactly; `agreement`, the share of their positions at which
        both heads name the same token; `loss`, nats a token under FlashHead above the dense head's, of all, of those with an exact row and of the others.
    """
    if not parts:
        return None
    m = join(list(parts))
    extra, held, n = m.loss - m.loss_dense, m.target_covered, len(m.loss)

    def mean(where: np.ndarray) -> float | None:
        return float(extra[where].mean()) if where.any() else None

    loss = {"all": mean(np.ones(n, bool)), "with_exact_row": mean(held), "without": mean(~held)}
    return {"tokens": n, "exact_rows": share(int(held.sum()), n), "agreement": share(int(m.agrees.sum()), n), "loss": loss}
