"""Bytes that a step reads, everything counted: rotation, tables, scales, own errors, token ids. numpy only."""

from __future__ import annotations

import numpy as np

from flashhead_edge.codes import row_bytes, table_bytes, total_bytes
from flashhead_edge.index import HeadIndex

TOKEN_BYTES = 4  # a token id, read for a row that is scored exactly or always
ERROR_BYTES = 1  # an item's own error


def fixed_bytes(index: HeadIndex) -> int:
    """Bytes read at every step, whatever opens: mean, rotation, centroids with their errors, all tables."""
    rotation = 0 if index.rotation is None or index.mean is None else total_bytes(index.rotation) + index.mean.nbytes
    probe = total_bytes(index.centroids) + index.n_clusters * ERROR_BYTES
    return rotation + probe + sum(table_bytes(s.rows) for s in index.stages) + index.always_scored.size * TOKEN_BYTES


def bytes_per_step(index: HeadIndex, counts: np.ndarray, exact_row_bytes: int) -> np.ndarray:
    """Bytes of each step, [N] int64.

    Args:
        counts: [N, 2 + stages] as in `head.Step`: clusters opened, slots scored by each code, rows scored exactly.
        exact_row_bytes: bytes of one of the model's own rows (2 d for a head in 16 bits).
    """
    counts = np.asarray(counts, np.int64)
    each = [row_bytes(s.rows) + ERROR_BYTES for s in index.stages] + [exact_row_bytes + TOKEN_BYTES]
    return fixed_bytes(index) + counts[:, 1:] @ np.array(each, np.int64)


def dense_bytes(vocab_size: int, hidden_size: int) -> int:
    """Bytes of the dense head in two bytes per weight: what every share is a share of."""
    return 2 * vocab_size * hidden_size
