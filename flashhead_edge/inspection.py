"""What is in a checkpoint, as JSON: the head, its codes, its bytes, how it was calibrated. numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint import read_index
from flashhead_edge.codes import Coded, row_bytes, table_bytes, total_bytes
from flashhead_edge.costs import dense_bytes, fixed_bytes
from flashhead_edge.evaluation.measures import head_kind
from flashhead_edge.index import Gate, HeadIndex, own_error


def describe(folder: str | Path) -> dict[str, Any]:
    """Read the index in `folder` and describe it.

    Raises:
        CheckpointError: the folder holds no FlashHead checkpoint, or a damaged one.
    """
    return {"folder": str(folder), "weights": "not read: generate and evaluate check that the index fits them", **describe_index(read_index(Path(folder)))}


def describe_index(index: HeadIndex) -> dict[str, Any]:
    """Sizes in bytes, margins in own errors, own errors in logits (median); a margin of infinity is null in JSON."""
    stored = sum(total_bytes(c) for c in _codes(index)) + index.token_table.nbytes + index.always_scored.nbytes
    stored += index.n_clusters + len(index.stages) * index.slots + (0 if index.mean is None else index.mean.nbytes)
    fixed, dense = fixed_bytes(index), dense_bytes(index.vocab_size, index.hidden_size)
    return {
        "head": head_kind(index),
        "vocab_size": index.vocab_size,
        "hidden_size": index.hidden_size,
        "n_clusters": index.n_clusters,
        "cluster_size": index.cluster_size,
        "empty_slots": index.slots - index.vocab_size,
        "always_scored": int(index.always_scored.size),
        "fingerprint": index.fingerprint,
        "rotation": None if index.rotation is None else _code(index.rotation),
        "centroids": {**_code(index.centroids), **_gate(index.probe)},
        "stages": {str(i): {**_code(s.rows), **_gate(s.gate)} for i, s in enumerate(index.stages, 1)},
        "tail": {"scale": index.tail_scale, "offset": index.tail_offset},
        "bytes": {"index": stored, "fixed_per_step": fixed, "dense_per_step": dense, "fixed_share": fixed / dense},
        "calibration": index.summary,
    }


def _codes(index: HeadIndex) -> list[Coded]:
    return [c for c in (index.rotation, index.centroids, *(s.rows for s in index.stages)) if c is not None]


def _code(coded: Coded) -> dict[str, Any]:
    if coded.kind == "product":  # its widths are those of the codebook
        bits: float | None = round(8 * coded.data.shape[1] / coded.columns, 2)
    else:
        bits = None if coded.widths is None else round(float(coded.widths.mean()), 2)
    return {
        "code": coded.kind,
        "rows": coded.n,
        "columns": coded.columns,
        "bits_per_column": bits,
        "row_bytes": row_bytes(coded),
        "table_bytes": table_bytes(coded),
    }


def _gate(gate: Gate) -> dict[str, Any]:
    errors = sorted(own_error(gate).tolist())
    return {"margin": gate.margin, "cap": gate.cap, "own_error": errors[len(errors) // 2]}
