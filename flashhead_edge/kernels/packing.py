"""A head index as the head-step kernel reads it: one image of bytes, and the layout that finds the arrays in it.

The image holds what the index holds, at nearly the same size, in the order in which the kernel reads it; see
plugins_trt/kernels/head_step.h for every field. Made once a head, in numpy.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flashhead_edge.codes import Coded
from flashhead_edge.errors import DeviceError
from flashhead_edge.index import Gate, HeadIndex, own_error, slot_of_token

MAX_STAGES = 4
MAX_TABLES = MAX_STAGES + 1
THREADS = 512
BATCH_CHUNKS = 4
HISTOGRAM = 2052
PASSES = 7
MAX_SLOTS = 1 << 20
MAX_BITS_BYTES = 256  # 16 lanes hold four words each
ALWAYS = 0x8000  # beside a token's cluster
MAX_CLUSTERS = 32 * THREADS  # a thread keeps a bit for each that it looks at
PART_COLUMNS = 256  # columns of a codebook group that share a part: their sums meet at one address
PHASES = MAX_STAGES + 1  # that have a message: each code, the exact rows
STATE_BYTES = 256  # of RowState, rounded up
STATIC_SHARED = 1 << 10  # shared memory that the kernel declares itself, at most; a test asks the driver

I, U, F = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
Fields = list[tuple[str, type[Any]]]  # of a ctypes.Structure


class Table(ctypes.Structure):
    """`FlashHeadTable` of head_step.h."""

    _fields_ = [("columns_at", U), ("book_at", U), ("bytes_at", U), *[(n, I) for n in ("chunks", "wide_chunks", "first_part", "parts")]]


class Stage(ctypes.Structure):
    """`FlashHeadStage` of head_step.h."""

    _fields_: ClassVar[Fields] = [
        *[("table", I), ("rows_at", U), ("stride", I), ("interleaved", I), ("bytes", I), ("error_at", U), ("error_byte", I)],
        *[("words", I), ("lanes", I), ("shared_table", I), ("margin", F), ("cap", I)],
    ]


class Layout(ctypes.Structure):
    """`FlashHeadLayout` of head_step.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, I) for n in ("vocab_size", "hidden_size", "clusters", "cluster_size", "coordinates", "stages", "tables", "always")],
        *[("token_table_at", U), ("cluster_of_at", U), ("filled_at", U), ("least_filled", I), ("always_at", U), ("chunks", I)],
        *[(n, U) for n in ("rotation_at", "virtual_at", "mean_at", "row_scale_at")],
        *[("bound_slope", F), ("bound_base", F), ("state_power", F)],
        ("centroid", Stage),
        *[("probe_margin", F), ("probe_cap", I), ("tail_scale", F), ("tail_offset", F), ("candidates", I), ("parts", I), ("capacity", I)],
        *[("small_at", U), ("small_bytes", I), ("image_bytes", U), ("prefetch_at", U), ("prefetch_bytes", U)],
        *[(n, I) for n in ("multiprocessors", "shared_bytes", "blocks", "chunks_a_block", "clusters_a_block")],
        *[(n, I) for n in ("shared_z", "shared_x", "shared_state", "shared_work")],
        *[(n, I) for n in ("shared_items", "shared_clusters", "shared_errors", "shared_small")],
        *[(n, U) for n in ("row_bytes", "row_messages", "row_tables", "row_z", "row_scores", "row_opened", "row_histograms", "row_items", "row_clusters")],
        ("table", Table * MAX_TABLES),
        ("stage", Stage * MAX_STAGES),
    ]


class Widen(ctypes.Structure):
    """`FlashHeadWiden` of head_step.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, ctypes.c_void_p) for n in ("ids", "logits", "counts", "image", "workspace", "wide")],
        *[(n, I) for n in ("rows", "vocab_size", "wide_stride", "candidates", "counted")],
        *[(n, U) for n in ("cluster_of_at", "row_bytes", "row_scores", "row_opened")],
        *[("tail_scale", F), ("tail_offset", F)],
    ]


class Arguments(ctypes.Structure):
    """`FlashHeadArguments` of head_step.h."""

    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("hidden", "weight", "bias", "image", "workspace", "token", "counts", "capped", "ids", "logits", "wide", "totals")],
        *[(n, I) for n in ("rows", "hidden_bf16", "weight_bf16", "wide_stride")],
        ("layout", Layout),
    ]


class DecodeArguments(ctypes.Structure):
    """`FlashHeadDecode` of decode.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, ctypes.c_void_p) for n in ("ids", "logits", "count", "temperature", "top_p", "min_p", "top_k", "seed", "step")],
        *[(n, ctypes.c_void_p) for n in ("token", "logprob", "best_ids", "best_logprobs")],
        *[(n, I) for n in ("rows", "width", "count_stride", "best")],
    ]


@dataclass(frozen=True, eq=False)
class Packed:
    """An index for the kernel, before a launch plan."""

    image: np.ndarray  # [bytes] uint8
    layout: Layout  # without its launch plan


class _Image:
    """Arrays one after the other, each aligned to 256 bytes."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        start = self.size
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.parts += [data, np.zeros(-data.size % 256, np.uint8)]
        self.size += data.size + (-data.size % 256)
        return start


def fields(coded: Coded, data: np.ndarray) -> np.ndarray:
    """Packed fields of rows [n, bytes] as whole numbers, [n, columns] uint8; columns without bits are 0."""
    assert coded.widths is not None
    bits = np.unpackbits(data, axis=1, bitorder="little")
    out, first = np.zeros((len(data), coded.columns), np.uint8), 0
    for j, width in enumerate(coded.widths.tolist()):
        if width:
            out[:, j] = np.packbits(bits[:, first : first + width], axis=1, bitorder="little")[:, 0]
        first += width
    return out


def pack(index: HeadIndex) -> Packed:
    """Lay an index out for the kernel.

    Raises:
        DeviceError: the index holds a code that the kernel does not read.
    """
    check_codes(index)
    image, layout = _Image(), Layout()
    layout.vocab_size, layout.hidden_size = index.vocab_size, index.hidden_size
    layout.clusters, layout.cluster_size, layout.stages = index.n_clusters, index.cluster_size, len(index.stages)
    layout.coordinates = index.hidden_size if index.rotation is None else index.rotation.columns + 1
    layout.always, layout.state_power = index.always_scored.size, index.state_power
    layout.probe_margin, layout.probe_cap = index.probe.margin, index.probe.cap
    layout.tail_scale, layout.tail_offset = index.tail_scale, index.tail_offset
    most = index.probe.cap * index.cluster_size + index.always_scored.size
    layout.candidates = min(index.slots, index.stages[-1].gate.cap if index.stages else most)

    layout.prefetch_at = image.size
    filled = (index.token_table >= 0).sum(1)
    layout.filled_at, layout.least_filled = image.add(filled.astype(np.uint8)), int(filled.min())
    layout.always_at = image.add(slot_of_token(index)[index.always_scored].astype(np.int32))
    layout.centroid.error_at, layout.centroid.error_byte = image.add(index.probe.error), -1
    columns = np.zeros((0, 4), np.int64)
    if index.rotation is not None:
        assert index.mean is not None and index.rotation.scale is not None
        rotation, columns, reach = pack_rotation(index.rotation)
        layout.chunks = len(columns)
        layout.mean_at, layout.row_scale_at = image.add(index.mean), image.add(index.rotation.scale)
        layout.virtual_at = image.add(_pairs(columns.reshape(-1), factors(index.rotation, columns)))
    codes = [index.centroids, *(s.rows for s in index.stages)]
    products = [c for c in codes if c.kind == "product"]
    layout.tables = len(products)
    part = 0
    books = []
    for i, coded in enumerate(products):
        t = layout.table[i]
        book, where, t.wide_chunks, t.chunks, names = pack_book(coded, columns)
        t.bytes_at, t.first_part, t.parts = image.add(names), part, len(names)
        part += len(names)
        books.append((t, book))
        t.columns_at = image.add(where)
    weights = [bit_weights(c) for c in codes if c.kind == "bits"]
    small = [inverse_errors(g).view(np.uint32) for g in (index.probe, *(stage.gate for stage in index.stages))]
    small += [w.reshape(-1) for w in weights]
    layout.small_at, layout.small_bytes = image.add(np.concatenate(small)), 4 * sum(map(len, small))
    table = 0
    if index.rotation is not None:  # centroids are read whole and at once, as small arrays are; float16 ones are streamed
        table = pack_code(image, layout.centroid, index.centroids, None, table)
    layout.prefetch_bytes = image.size - layout.prefetch_at
    layout.parts = part

    if index.rotation is None:
        layout.centroid.rows_at = image.add(index.centroids.data)
    else:
        layout.rotation_at = image.add(rotation)
        layout.bound_slope, layout.bound_base = 0.0, 1e-6
        for coded in products:
            slope, base = table_bound(coded, reach)
            layout.bound_slope, layout.bound_base = max(layout.bound_slope, slope), max(layout.bound_base, base)
    for t, book in books:
        t.book_at = image.add(book)
    layout.token_table_at, layout.cluster_of_at = image.add(index.token_table), image.add(clusters_of_tokens(index))
    for i, (stage, s) in enumerate(zip(index.stages, layout.stage)):
        s.margin, s.cap = stage.gate.margin, stage.gate.cap
        table = pack_code(image, s, stage.rows, stage.gate.error, table, index.cluster_size if i == 0 else 0)
    if image.size >= 1 << 31:
        raise DeviceError(f"head index: {image.size} bytes for the kernel, expected less than 2 GiB; use the torch backend")
    layout.image_bytes = image.size
    return Packed(np.concatenate(image.parts), layout)


def pack_code(image: _Image, stage: Stage, coded: Coded, error: np.ndarray | None, table: int, interleave: int = 0) -> int:
    """Lay out the records of a code.

    Args:
        error: [n] uint8 own errors, or None where they lie elsewhere already.
        table: number of the next product code; the one after it is returned.
        interleave: slots of a cluster whose records are interleaved word by word, as is best for a code that scores whole clusters; 0: none.
    """
    records, stage.bytes, inside = row_records(coded, error)
    stage.stride, stage.words, stage.interleaved = records.shape[1], -(-stage.bytes // 4), int(interleave > 0)
    if interleave:
        records = records.view(np.uint32).reshape(-1, interleave, stage.stride // 4).transpose(0, 2, 1)
    stage.rows_at = image.add(records)
    if error is not None:
        stage.error_at, stage.error_byte = (0, inside) if inside else (image.add(error), -1)
    if coded.kind == "product":
        stage.table, stage.lanes = table, 1
        return table + 1
    lanes = 2 if stage.words <= 8 else 1 << (min(stage.words, 32) - 1).bit_length()
    stage.table, stage.lanes = -1, 1 if interleave else min(lanes, 16) if error is None else lanes
    return table


def check_codes(index: HeadIndex) -> None:
    """Raise DeviceError where the kernel lacks a code of the index."""

    def want(ok: bool, what: str, found: object, expected: object) -> None:
        if not ok:
            raise DeviceError(f"head index: {what} is {found}, the CUDA kernel reads {expected}; use the torch backend")

    want(index.hidden_size % 8 == 0, "hidden size", index.hidden_size, "multiples of 8")
    want(index.slots < MAX_SLOTS, "number of slots", index.slots, f"fewer than {MAX_SLOTS}")
    want(index.n_clusters <= MAX_CLUSTERS, "number of clusters", index.n_clusters, f"at most {MAX_CLUSTERS}")
    want(len(index.stages) <= MAX_STAGES, "number of row codes", len(index.stages), f"at most {MAX_STAGES}")
    want(index.cluster_size <= 255, "cluster size", index.cluster_size, "at most 255")
    if index.rotation is None:
        whole = index.centroids.kind == "float16" and index.centroids.columns == index.hidden_size
        want(whole, "centroid code", index.centroids.kind, "float16 of all columns")
        want(not index.stages, "number of row codes without a rotation", len(index.stages), "none")
    else:
        want(index.rotation.kind == "bits", "rotation code", index.rotation.kind, "bits")
        want(index.centroids.kind in ("product", "bits"), "centroid code", index.centroids.kind, "product and bits")
    for stage in index.stages:
        want(stage.rows.kind in ("product", "bits"), "row code", stage.rows.kind, "product and bits")
    for coded in (index.centroids, *(stage.rows for stage in index.stages)):
        size = coded.data.shape[1] if coded.kind == "bits" else 0
        want(size <= MAX_BITS_BYTES, "size of a bits code", size, f"at most {MAX_BITS_BYTES} bytes a row")


def clusters_of_tokens(index: HeadIndex) -> np.ndarray:
    """Each token's cluster, with `ALWAYS` where it is always scored, [V] uint16."""
    clusters = (slot_of_token(index) // index.cluster_size).astype(np.uint16)
    clusters[index.always_scored] |= ALWAYS
    return clusters


def inverse_errors(gate: Gate) -> np.ndarray:
    """1 / own error of every coded error, [256] float32."""
    codes = dataclasses.replace(gate, error=np.arange(256).astype(np.uint8))
    return (1 / own_error(codes)).astype(np.float32)


def pack_rotation(coded: Coded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rotation in chunks of four virtual columns of four bits.

    Returns:
        [chunks, d / 8, 4] uint32: eight rows' fields of a virtual column; [chunks, 4] int64: its coordinate (-1: none,
        0: the constant 1), ascending, one of more than four bits twice (low bits first); [coordinates] float64: the
        largest |coordinate| for sum|x| = 1.
    """
    assert coded.widths is not None and coded.steps is not None
    values, widths = fields(coded, coded.data), coded.widths.astype(int)
    columns: list[int] = [0]
    planes: list[np.ndarray] = [np.full(coded.n, 8, np.uint8)]
    for j, width in enumerate(widths.tolist()):
        if width == 0:
            continue
        if width > 4 and len(columns) % 4 == 3:  # the two halves of a column share a chunk
            columns.append(-1)
            planes.append(planes[0])
        if width <= 4:
            planes.append(values[:, j] + 8 - (1 << width >> 1))
            columns.append(j + 1)
        else:
            planes += [values[:, j] & 15, (values[:, j] >> 4) + 8 - (1 << (width - 5))]
            columns += [j + 1, j + 1]
    while len(columns) % 4:
        columns.append(-1)
        planes.append(planes[0])
    octets = np.stack(planes, 1).astype(np.uint32).reshape(coded.n // 8, 8, -1)  # [d / 8, 8, virtual columns]
    words = (octets << (4 * np.arange(8, dtype=np.uint32))[None, :, None]).sum(1, dtype=np.uint32)
    reach = np.concatenate([[0.0], coded.steps.astype(np.float64) * (2.0 ** np.maximum(widths - 1, 0) - 0.5)])
    return words.reshape(coded.n // 8, -1, 4).transpose(1, 0, 2), np.array(columns).reshape(-1, 4), reach


def factors(coded: Coded, columns: np.ndarray) -> np.ndarray:
    """What the centred sum of each virtual column is multiplied by, [virtual columns] float32."""
    assert coded.steps is not None
    flat = columns.reshape(-1)
    step = np.where(flat > 0, coded.steps[np.maximum(flat, 1) - 1], 0)
    upper = np.concatenate([[False], flat[1:] == flat[:-1]]) & (flat > 0)
    return (step * np.where(upper, 16, 1)).astype(np.float32)


def _pairs(numbers: np.ndarray, floats: np.ndarray) -> np.ndarray:
    return np.stack([numbers.astype(np.int32).view(np.uint32), floats.astype(np.float32).view(np.uint32)], 1)


def pack_book(coded: Coded, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int, np.ndarray]:
    """A product code's codebook in the rotation's chunks, one coordinate after the other.

    Returns:
        [bytes] uint8: the 256 fields of a chunk's four coordinates, a byte each in the first chunks, then half a byte;
        [chunks, 4, 4] float32 {step, centre, part (int32; -1: none), 0}; the number of chunks in bytes; the number of
        chunks that the codebook reaches; [parts] uint8: the code byte of each part.
    """
    assert coded.widths is not None and coded.steps is not None and coded.codebook is not None and coded.group_ends is not None
    values = fields(coded, coded.codebook)
    group = np.searchsorted(coded.group_ends, np.arange(coded.columns), side="right")
    start = np.concatenate([[0], coded.group_ends])[group]
    names = group * (1 << 16) + (np.arange(coded.columns) - start) // PART_COLUMNS
    _, first, part = np.unique(names, return_index=True, return_inverse=True)
    twice = np.concatenate([np.zeros((len(columns), 1), bool), columns[:, 1:] == columns[:, :-1]], 1)
    there = (columns >= 0) & (columns < coded.columns) & ~twice
    chunks = int(there.any(1).nonzero()[0].max()) + 1
    at = np.where(there, columns, 0)
    wide = ((coded.widths[at] > 4) & there).any(1).nonzero()[0]
    wide_chunks = int(wide.max()) + 1 if wide.size else 0
    entries = np.where(there[:chunks, :, None], values.T[at[:chunks]], 0).astype(np.uint8)  # [chunks, 4, 256]
    book = np.concatenate([entries[:wide_chunks].reshape(-1), (entries[wide_chunks:, :, 0::2] | entries[wide_chunks:, :, 1::2] << 4).reshape(-1)])
    where = np.zeros((*columns.shape, 4), np.float32)
    widths = coded.widths[at].astype(int)
    where[..., 0], where[..., 1] = coded.steps[at], np.where(widths > 0, 2.0 ** (widths - 1) - 0.5, 0)
    where[..., 2] = np.where(there, part[at], -1).astype(np.int32).view(np.float32)
    return book, where, wide_chunks, chunks, group[first].astype(np.uint8)


def table_bound(coded: Coded, reach: np.ndarray) -> tuple[float, float]:
    """Slope and base of a bound on any sum of one entry a group, over sum|x|."""
    assert coded.widths is not None and coded.steps is not None
    most = coded.steps.astype(np.float64) * (2.0 ** np.maximum(coded.widths.astype(int) - 1, 0) - 0.5)
    return float(most @ reach[: coded.columns]) * 1.001, float(most[0]) * 1.001


def bit_weights(coded: Coded) -> np.ndarray:
    """Half the weight of every bit of a code and its coordinate, [bits, 2] uint32: a bit adds its half or takes it away.

    Bits that there are not weigh nothing: they fill the words up to a multiple of four.
    """
    assert coded.widths is not None and coded.steps is not None
    count = 128 * -(-coded.data.shape[1] // 16)
    weights, coordinates, bit = np.zeros(count, np.float32), np.zeros(count, np.int32), 0
    for j, width in enumerate(coded.widths.tolist()):
        for b in range(width):
            weights[bit], coordinates[bit] = coded.steps[j] * 2.0 ** (b - 1), j
            bit += 1
    return _pairs(coordinates, weights)[:, ::-1]


def row_records(coded: Coded, error: np.ndarray | None) -> tuple[np.ndarray, int, int]:
    """Records of a code: [n, stride] uint8, bytes of a code, and where in a record the own error lies (0: outside)."""
    parts: list[np.ndarray] = [coded.data]
    size = coded.data.shape[1]
    if coded.scale is not None:
        parts.append(np.zeros((coded.n, size % 2), np.uint8))  # the scale is read as one number of two bytes
        parts.append(np.ascontiguousarray(coded.scale).view(np.uint8).reshape(coded.n, 2))
        size += size % 2
    used = sum(p.shape[1] for p in parts)
    inside = 0
    if error is not None and used % 4:
        inside = used
        parts.append(error[:, None])
    parts.append(np.zeros((coded.n, -(used + bool(inside)) % 4), np.uint8))
    return np.concatenate(parts, 1), size, inside


def words_of(layout: Layout) -> list[int]:
    """The layout as whole numbers, as the custom operators carry it."""
    return np.frombuffer(bytes(layout), np.int32).tolist()


def layout_of(words: list[int]) -> Layout:
    """The layout that `words_of` wrote."""
    return Layout.from_buffer_copy((ctypes.c_int32 * len(words))(*words))


def plans(packed: Packed, multiprocessors: int, shared_bytes: int, most_rows: int) -> list[Layout]:
    """The launches of 1 to `most_rows` states on a device. They may share a workspace: a row's part of it is laid out alike in all of them."""
    made = [plan(packed, multiprocessors, shared_bytes, rows) for rows in range(1, most_rows + 1)]
    most = max(one.row_bytes for one in made)
    for one in made:
        one.row_bytes = most
    return made


def plan(packed: Packed, multiprocessors: int, shared_bytes: int, rows: int) -> Layout:
    """The layout with the plan of a launch of `rows` states on a device.

    A row gets its share of the multiprocessors; where its items would then not fit into shared memory and fit in twice as many, half of the rows
    wait for the others: as fast within a tenth on an H100, and items in global memory would cost a megabyte a row.

    Args:
        multiprocessors: of the device; every block must be resident, and a block takes one.
        shared_bytes: dynamic shared memory that a block may have.
    Raises:
        DeviceError: the index needs more shared memory than a block can have.
    """
    share = max(1, multiprocessors // max(1, rows))
    first, second = (_plan_of_blocks(packed, multiprocessors, shared_bytes, b) for b in (share, max(1, multiprocessors // -(-rows // 2))))
    return second if first.row_items and not second.row_items else first


def _plan_of_blocks(packed: Packed, multiprocessors: int, shared_bytes: int, blocks: int) -> Layout:
    layout = Layout.from_buffer_copy(bytes(packed.layout))
    layout.multiprocessors, layout.blocks = multiprocessors, blocks
    layout.chunks_a_block, layout.clusters_a_block = -(-layout.chunks // layout.blocks), -(-layout.clusters // layout.blocks)
    opened = -(-min(layout.clusters, layout.probe_cap) // layout.blocks)  # a block's share, at most
    items = opened * layout.cluster_size + -(-layout.always // layout.blocks) + layout.cluster_size  # and the best cluster's rows
    layout.capacity = max(items, layout.clusters_a_block)
    octets = layout.hidden_size // 8
    work = 16 * BATCH_CHUNKS * -(-octets // 32) + BATCH_CHUNKS * (16 + MAX_TABLES * 64 + layout.tables * 1024)
    size = 0

    def shared(count: int) -> int:
        nonlocal size
        start = size
        size += -(-count // 64) * 64  # tables of bits codes must start at a multiple of 64
        return start

    layout.shared_z, layout.shared_state = shared(4 * layout.coordinates), shared(4 * layout.hidden_size)
    layout.shared_work, layout.shared_errors = shared(max(work, 4 * HISTOGRAM)), shared(layout.clusters)
    layout.shared_small = shared(layout.small_bytes)
    layout.shared_x = size  # the rotation's input is done with when tables are made: they take its place
    looked_up = [layout.centroid] if layout.chunks and layout.centroid.table < 0 else []
    for s in [*looked_up, *layout.stage[: layout.stages]]:
        s.shared_table = shared(1024 * s.bytes if s.table >= 0 else 2048 * -(-s.words // 4))
    size = max(size, layout.shared_x + (4 * layout.hidden_size if layout.chunks else 0))
    scores, items = 4 * layout.clusters, 16 * layout.capacity
    scores_fit = size + scores <= shared_bytes
    if scores_fit:
        layout.shared_clusters = shared(scores)
    items_fit = size + items <= shared_bytes
    if items_fit:
        layout.shared_items = shared(items)
    if size > shared_bytes:
        raise DeviceError(f"head index: a block needs {size} bytes of shared memory, the device gives {shared_bytes}; use the torch backend")
    used = STATE_BYTES

    def row(count: int) -> int:
        nonlocal used
        start = used
        used += -(-count // 256) * 256
        return start

    layout.row_messages = row(16 * PHASES * multiprocessors)  # of any plan for this device: plans may share a workspace
    layout.row_tables, layout.row_z, layout.row_scores = row(2048 * layout.parts), row(8 * layout.coordinates), row(8 * layout.clusters)
    layout.row_opened = row(4 * layout.clusters)
    layout.row_histograms = row(4 * layout.stages * PASSES * HISTOGRAM)
    if not items_fit:
        layout.row_items = row(items * layout.blocks)
    if not scores_fit:
        layout.row_clusters = row(scores * layout.blocks)
    layout.row_bytes, layout.shared_bytes = used, size
    return layout
