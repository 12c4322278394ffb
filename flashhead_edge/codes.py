"""Codes of matrices, row by row: the data, its checks and its size in bytes. numpy only.

A `Coded` matrix is what every backend reads; `coding.py` makes one from floats and decodes it again.
Four kinds, told apart by `kind`:

* ``float16``: the values themselves.
* ``int``: signed integers of one width (2, 3, 4 or 8 bits), with a scale for each row and group of columns.
* ``bits``: integers whose width falls from column to column with the column's variance, a step for each
  column and a scale for each row (reverse water-filling: Cover and Thomas, Elements of Information Theory,
  section 10.3.3).
* ``product``: consecutive columns in groups; one byte a group names one of the group's 256 codebook entries
  (product quantisation: Jegou et al., TPAMI 2011, section II). The entries are integers of one width a group: in a
  group of many columns an entry is far from its rows anyway, and a few bits of each column lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashhead_edge.errors import CheckpointError

KINDS = ("float16", "int", "bits", "product")


@dataclass(frozen=True, eq=False)
class Coded:
    """A matrix [n, columns], coded row by row. Columns beyond `columns` are zero by definition."""

    kind: str
    columns: int
    data: np.ndarray  # [n, bytes a row] uint8: each row's own code, fields packed from the lowest bit up
    scale: np.ndarray | None = None  # int: [n, groups] float16; bits: [n, 1] float16
    widths: np.ndarray | None = None  # [columns] uint8, bits of each column (product: in the codebook), 0 to 8
    steps: np.ndarray | None = None  # bits, product: [columns] float32, distance of two neighbouring values at scale 1
    group_ends: np.ndarray | None = None  # product: [groups] int32, end column of each group, ascending
    codebook: np.ndarray | None = None  # product: [256, bytes] uint8: entry e of every group, packed like a row of `bits`

    def __post_init__(self) -> None:
        check_coded(self)

    @property
    def n(self) -> int:
        return self.data.shape[0]


def row_bytes(coded: Coded) -> int:
    """Bytes that one row costs when it is read: its code and its scales."""
    return coded.data.shape[1] + (0 if coded.scale is None else coded.scale.shape[1] * coded.scale.itemsize)


def table_bytes(coded: Coded) -> int:
    """Bytes read once a step whatever rows are read: steps and codebooks."""
    tables = (None if coded.kind == "int" else coded.widths, coded.steps, coded.group_ends, coded.codebook)
    return sum(t.nbytes for t in tables if t is not None)


def total_bytes(coded: Coded) -> int:
    """Bytes of the whole matrix, tables included."""
    return coded.n * row_bytes(coded) + table_bytes(coded)


def packed_bytes(widths: np.ndarray) -> int:
    """Bytes of one row whose columns have these widths in bits."""
    return (int(np.asarray(widths, dtype=np.int64).sum()) + 7) // 8


def check_coded(coded: Coded, name: str = "code") -> None:
    """Raise CheckpointError where an array's dtype or shape does not fit the kind."""

    def want(ok: bool, what: str, found: object, expected: object) -> None:
        if not ok:
            raise CheckpointError(f"{name}: {what} is {found}, expected {expected}; convert the model again")

    def array(field: str, dtype: type, shape: tuple[int, ...]) -> None:
        a = getattr(coded, field)
        found = "absent" if a is None else f"{a.dtype} {list(a.shape)}"
        want(a is not None and a.dtype == dtype and a.shape == shape, field, found, f"{np.dtype(dtype)} {list(shape)}")

    def widths() -> None:
        array("widths", np.uint8, (coded.columns,))
        most = int(coded.widths.max(initial=0))  # type: ignore[union-attr]
        want(most <= 8, "widths", most, "at most 8 bits")

    want(coded.kind in KINDS, "kind", coded.kind, f"one of {', '.join(KINDS)}")
    want(coded.columns >= 1, "columns", coded.columns, "at least 1")
    want(coded.data.dtype == np.uint8 and coded.data.ndim == 2, "data", f"{coded.data.dtype} {list(coded.data.shape)}", "uint8 [n, bytes]")
    n, columns = coded.data.shape[0], coded.columns
    if coded.kind == "float16":
        want(coded.data.shape[1] == 2 * columns, "data", list(coded.data.shape), [n, 2 * columns])
    elif coded.kind == "product":
        groups = coded.data.shape[1]
        array("group_ends", np.int32, (groups,))
        widths()
        array("steps", np.float32, (columns,))
        array("codebook", np.uint8, (256, packed_bytes(coded.widths)))  # type: ignore[arg-type]
        ends = np.concatenate([[0], coded.group_ends])  # type: ignore[list-item]
        want(bool((np.diff(ends) > 0).all()) and ends[-1] == columns, "group_ends", coded.group_ends, f"ascending, the last {columns}")
    else:
        widths()
        assert coded.widths is not None
        want(coded.data.shape[1] == packed_bytes(coded.widths), "data", list(coded.data.shape), [n, packed_bytes(coded.widths)])
        groups = 1 if coded.kind == "bits" or coded.scale is None else coded.scale.shape[-1]
        array("scale", np.float16, (n, groups))
        if coded.kind == "bits":
            array("steps", np.float32, (columns,))
        else:
            want(groups >= 1 and columns % groups == 0, "scale groups", groups, f"a divisor of {columns}")
    for field in ("scale", "steps"):
        a = getattr(coded, field)
        want(a is None or bool(np.isfinite(a).all()), field, "not finite", "finite values")
