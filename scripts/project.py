#!/usr/bin/env python3
"""Bytes per step of a converted head's settings at the shapes of other models: projections, not measurements.

    flashhead evaluate OUT --text FILE ... --json > evaluation.json
    python scripts/project.py OUT evaluation.json

Clusters opened, slots scored by each code and exact rows are taken as shares of the vocabulary, as measured. Codes keep
their bytes a row; what has an entry for each coordinate (rotation, codebooks, steps) grows with the hidden size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.checkpoint import read_index
from flashhead_edge.codes import row_bytes, table_bytes
from flashhead_edge.costs import ERROR_BYTES, TOKEN_BYTES, dense_bytes

SHAPES = {"Llama-3.2-1B": (128_256, 2_048), "Qwen3-1.7B": (151_936, 2_048), "Gemma-3-270M": (262_144, 640)}


def mean_counts(evaluation: dict[str, Any]) -> np.ndarray:
    """Clusters opened, slots scored by each code, exact rows: the mean over an evaluation's texts of their means."""
    return np.mean([[t["clusters_opened"]["mean"], *(r["mean"] for r in t["rows_scored"]), t["exact_rows"]["mean"]] for t in evaluation["texts"]], 0)


def main(folder: str, evaluation: str) -> None:
    index = read_index(Path(folder))
    counts = mean_counts(json.loads(Path(evaluation).read_text()))
    assert index.rotation is not None
    v0, d0 = index.vocab_size, index.hidden_size
    print(f"{'shape':14} {'V x d':>16} {'rotation':>9} {'centroids':>9} {'tables':>7} {'rows':>6} {'exact':>6} {'all, % of dense':>16}")
    for name, (v, d) in SHAPES.items():
        grow = d / d0
        rotation = d * (index.rotation.data.shape[1] * grow + 2) + table_bytes(index.rotation) * grow + 4 * d
        clusters = -(-v // index.cluster_size)
        centroids = clusters * (row_bytes(index.centroids) + ERROR_BYTES)
        tables = (table_bytes(index.centroids) + sum(table_bytes(s.rows) for s in index.stages)) * grow
        rows = sum(n / v0 * v * (row_bytes(s.rows) + ERROR_BYTES) for n, s in zip(counts[1:], index.stages))
        exact = counts[-1] / v0 * v * (2 * d + TOKEN_BYTES)
        parts = [100 * x / dense_bytes(v, d) for x in (rotation, centroids, tables, rows, exact)]
        print(f"{name:14} {v:>8} x {d:<5} " + " ".join(f"{x:>{w}.3f}" for x, w in zip(parts, (9, 9, 7, 6, 6))) + f" {sum(parts):>16.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/project.py CHECKPOINT EVALUATION.json")
    main(sys.argv[1], sys.argv[2])
