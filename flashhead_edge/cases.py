"""Made heads of any shape, and the list of cases that tests check and benches time. numpy only.

A made head has random codes of a fitted plan's shape; its margins let nothing through until a caller sets them
(`bench.head.with_shares`), since which items pass depends on the states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashhead_edge.codes import Coded, packed_bytes
from flashhead_edge.index import Gate, HeadIndex, Stage

SHAPES = {
    "Llama-3.2-1B": (128_256, 2_048),
    "Llama-3.2-3B": (128_256, 3_072),
    "Qwen3-0.6B": (151_936, 1_024),
    "Qwen3-1.7B": (151_936, 2_048),
    "Gemma-3-270M": (262_144, 640),
    "Gemma-3-1B": (262_144, 1_152),
}


@dataclass(frozen=True)
class Settings:
    """A head as it was calibrated on SmolLM2-135M for 99.5 %, and what opens on five texts (`SHARES_SOURCE`), as shares of the vocabulary.

    Shares are of clusters' slots opened, then of slots that each code's gate lets through, the last ones scored exactly.
    """

    centroids: str
    rows: tuple[str, ...]
    mean: tuple[float, ...]
    caps: tuple[float, ...]
    percentiles: dict[str, tuple[float, ...]]  # half of all steps need at most p50; caps cut below p99
    cluster_size: int = 32
    coordinates: int | None = None  # of the rotation, in 8 bits each; None: as many as the hidden state has, in 4


def _shares(*slots: float) -> tuple[float, ...]:
    return tuple(n / 49_152 for n in slots)


SHARES_SOURCE = (
    "SmolLM2-135M-Instruct's heads on five texts (WikiText-2, GSM8K, Python, German, Chinese), 10,000 positions for few codes and for byte columns, "
    "40,000 for fewest bytes, scaled by the vocabulary; made for a target of 99.5 %, the one of byte columns for 98 %, whose measured agreement is as high"
)
FEWEST_BYTES = Settings(
    "product24",
    ("product8", "bits30", "bits64", "bits128"),
    _shares(492.217675 * 32, 9_272.4862, 2_063.589775, 194.84445, 25.142975),
    _shares(832 * 32, 21_577, 9_888, 1_278, 167),
    {
        "p50": _shares(486 * 32, 7_801, 1_204, 107, 16),
        "p90": _shares(832 * 32, 21_577, 5_328, 476, 60),
        "p99": _shares(832 * 32, 21_577, 9_888, 1_209, 130),
    },
)
FEW_CODES = Settings(  # what --device h100 chooses: `scripts/opened.py` on 2,000 positions of each of the five texts
    "bits96",
    ("bits96",),
    _shares(14_139.5456, 401.5918),
    _shares(22_080, 2_009),
    {"p50": _shares(15_328, 251), "p90": _shares(22_080, 1_027), "p99": _shares(22_080, 2_009)},
)
BYTE_COLUMNS = Settings(  # what --device onnxruntime chooses: `scripts/opened.py`, as for few codes
    "columns384",
    ("columns192",),
    _shares(3_521.3472, 316.1399),
    _shares(12_832, 1_706),
    {
        "p1": _shares(64, 7), "p10": _shares(192, 22), "p25": _shares(768, 64), "p50": _shares(2_000, 180), "p75": _shares(5_456, 384),
        "p90": _shares(9_376, 852.2), "p99": _shares(12_832, 1_706),
    },
    cluster_size=16,
    coordinates=512,
)  # fmt: skip
PUBLISHED_CLUSTER_SIZE, PUBLISHED_PROBES = 16, 256


@dataclass(frozen=True)
class Case:
    """One head and the states that it is asked about."""

    name: str
    vocab_size: int
    hidden_size: int
    cluster_size: int = 32
    rows: tuple[str, ...] = FEWEST_BYTES.rows
    centroids: str = FEWEST_BYTES.centroids  # product, bits, or float16: the published head
    shares: tuple[float, ...] = FEWEST_BYTES.mean  # opened, then what each code's gate keeps, as shares of the vocabulary
    caps: tuple[float, ...] = FEWEST_BYTES.caps
    states: str = "normal"  # normal, negative (all logits), huge (one row, always scored), tied (rows come in pairs that are equal in everything)
    always: int = 18
    state_power: float = 0.5
    coordinates: int | None = None  # as in `Settings`

    def __str__(self) -> str:
        return self.name


def case_of(name: str, settings: Settings) -> Case:
    """The case of a shape of `SHAPES` with the settings of a calibrated head."""
    s = settings
    return Case(name, *SHAPES[name], s.cluster_size, s.rows, s.centroids, s.mean, s.caps, coordinates=s.coordinates)


def _small(name: str, **changes: object) -> Case:
    return Case(name, 5_003, 256, **changes)  # type: ignore[arg-type]


# the published head's probe keeps the best 20 clusters by a cap alone
CASES = (
    _small("fitted"),
    _small("clusters of 16", cluster_size=16),
    _small("two codes", rows=("product12", "bits24"), shares=(0.3, 0.1, 0.02), caps=(1.0, 1.0, 1.0)),
    _small("one code of bits", rows=("bits16",), shares=(0.3, 0.02), caps=(1.0, 1.0)),
    _small("no codes", rows=(), shares=(0.05,), caps=(1.0,)),
    _small("bits alone", centroids="bits48", rows=("bits100",), shares=(0.3, 0.02), caps=(1.0, 1.0)),
    _small("bits alone, caps hit", centroids="bits20", rows=("bits36", "bits50"), shares=(0.4, 0.1, 0.02), caps=(0.2, 0.05, 0.01)),
    _small("centroids of bits, rows of products", centroids="bits64", rows=("product10", "bits33"), shares=(0.3, 0.1, 0.02), caps=(1.0, 1.0, 1.0)),
    _small("centroids of bits, no codes", centroids="bits80", rows=(), shares=(0.05,), caps=(1.0,)),
    _small("every cap hit", caps=tuple(s / 2 for s in FEWEST_BYTES.mean)),
    _small("caps of one", caps=(0.0,) * 5),
    _small("everything open", shares=(math.inf,) * 5, caps=(1.0,) * 5),
    _small("empty margins", shares=(0.0,) * 5),
    _small("nothing always", always=0, state_power=0.0),
    _small("all negative", states="negative"),
    _small("one huge row", states="huge"),
    _small("tied rows", states="tied", shares=(0.5, 0.4, 0.3, 0.2, 0.1), caps=(1.0,) * 5),
    _small("tied rows, caps hit", states="tied", shares=(math.inf,) * 5, caps=(0.5, 0.2, 0.1, 0.05, 0.02)),
    _small("published", centroids="float16", rows=(), cluster_size=16, shares=(math.inf,), caps=(20 / 313,), always=4, state_power=0.0),
    _small("published, tied", centroids="float16", rows=(), cluster_size=16, shares=(math.inf,), caps=(20 / 313,), always=4, states="tied", state_power=0.0),
    Case("SmolLM2-135M", 49_152, 576),
    *(Case(name, *shape) for name, shape in SHAPES.items()),
)


@dataclass(frozen=True)
class DenseCase:
    """A dense head in whole numbers, and the states that it is asked about."""

    vocab_size: int
    hidden_size: int
    bits: int
    group: int  # columns that share a scale; 0: the row
    states: str = "normal"  # as in `Case`

    def __str__(self) -> str:
        form = f"int{self.bits}, " + (f"groups of {self.group}" if self.group else "one scale a row")
        return f"{self.vocab_size} x {self.hidden_size}, {form}" + ("" if self.states == "normal" else f", {self.states}")


DENSE_FORMS = ((8, 0), (8, 32), (8, 128), (4, 32), (4, 128))
DENSE_CASES = (
    *(DenseCase(v, d, *form) for form in DENSE_FORMS for v, d in ((5_003, 256), (49_152, 576), (1, 256), (40, 3_072)) if not form[1] or d % form[1] == 0),
    DenseCase(1_000, 40, 8, 0),
    *(DenseCase(5_003, 256, *form, states) for form in ((8, 0), (4, 32)) for states in ("tied", "negative", "huge")),
    *(DenseCase(*shape, *form) for form in DENSE_FORMS for shape in SHAPES.values()),
)


def made_dense(case: DenseCase, seed: int = 3) -> Coded:
    """A dense head of random codes for a case, [V, d]."""
    random = np.random.default_rng(seed)
    v, d, bits = case.vocab_size, case.hidden_size, case.bits
    fields = random.integers(0, 256, (v, d * bits // 8), dtype=np.uint8)
    if case.states == "negative":
        fields &= 0x7F if bits == 8 else 0x77  # fields below the middle are negative values
    scale = random.uniform(0.5, 1.5, (v, d // case.group if case.group else 1)) * 0.05 / 2 ** (bits - 2)
    if case.states == "huge":
        scale[huge_row(v)] *= 1_000
    elif case.states == "tied":
        for array in (fields, scale):
            pair_up(array)
    return Coded("int", d, fields, scale.astype(np.float16), np.full(d, bits, np.uint8))


@dataclass(frozen=True)
class DecodeCase:
    """Settings of a draw (those of `decoding.Sampling`), and the candidates that it is made from."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    candidates: int = 134  # of a row at most; rows have fewer by turns
    logits: str = "normal"  # normal, tied (many are equal), masked (most are -inf), flat (all are equal), negative

    def __str__(self) -> str:
        cuts = [f"{name} {value:g}" for name, value, off in (("k", self.top_k, 0), ("p", self.top_p, 1), ("min-p", self.min_p, 0)) if value != off]
        return ", ".join([f"T {self.temperature:g}", *cuts, f"{self.candidates} {self.logits}"])


DECODE_CUTS = ((0, 0.9, 0.0), (0, 1.0, 0.05), (50, 1.0, 0.0), (1_500, 0.9, 0.0), (0, 0.9, 0.05), (0, 1.0, 0.0))  # top-k, top-p, min-p

DECODE_CASES = (
    *(DecodeCase(t) for t in (0.0, 0.001, 0.7, 1.0, 3.0)),
    *(DecodeCase(t, logits=kind) for t in (0.0, 1.0) for kind in ("tied", "masked", "flat", "negative")),
    *(DecodeCase(0.8, top_k=k, logits=kind) for k in (1, 5, 133, 134, 500) for kind in ("normal", "tied")),
    *(DecodeCase(1.2, top_p=p, logits=kind) for p in (1e-6, 0.1, 0.5, 0.93, 0.9999) for kind in ("normal", "tied", "masked")),
    *(DecodeCase(0.9, min_p=p, logits=kind) for p in (0.02, 0.3, 1.0) for kind in ("normal", "tied")),
    *(DecodeCase(0.7, 40, 0.9, 0.05, n, kind) for n in (1, 2, 64, 65, 900, 5_000, 8_192) for kind in ("normal", "tied")),
    *(DecodeCase(1.0, *cuts, 2_000, kind) for cuts in DECODE_CUTS for kind in ("normal", "flat", "masked")),
    DecodeCase(5.0, 0, 0.95, 0.0, 3_000),
)


def made_candidates(case: DecodeCase, n: int, seed: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of n rows: ids [n, C] int64 in no order, logits [n, C] float32, count [n] int64; what lies behind a row's count is garbage."""
    random = np.random.default_rng(seed)
    c = case.candidates
    ids = np.stack([random.choice(262_144, c, replace=False) for _ in range(n)])
    logits = (3 * random.standard_normal((n, c)) + 12).astype(np.float32)
    if case.logits == "tied":
        logits = (np.round(logits / 2) * 2).astype(np.float32)
    elif case.logits == "masked":
        logits[:, 1:][random.random((n, c - 1)) < 0.9] = -np.inf
    elif case.logits == "flat":
        logits[:] = 7.25
    elif case.logits == "negative":
        logits -= 60
    return ids, logits, np.maximum(1, c - np.arange(n) % 4 * (c // 8)).astype(np.int64)


def made_index(case: Case, seed: int = 0) -> HeadIndex:
    """A head of random codes for a case, its margins 0: `with_shares` sets them."""
    random = np.random.default_rng(seed)
    v, d, size = case.vocab_size, case.hidden_size, case.cluster_size
    k = -(-v // size)
    table = np.full(k * size, -1, np.int32)
    short = k * size - v  # the last clusters go one token short each, until all empty slots are placed
    filled = np.full(k, size) - np.bincount(np.arange(k - short, k) if short < k else np.zeros(0, np.int64), minlength=k)
    order = random.permutation(v)
    if case.states == "tied":  # a pair of tokens lies side by side
        order = np.append((2 * random.permutation(v // 2)[:, None] + np.arange(2)).reshape(-1), np.arange(v // 2 * 2, v))
    table[(np.arange(size) < filled[:, None]).reshape(-1)] = order
    always = random.choice(v, case.always, replace=False)
    if case.states == "huge":
        always = np.append(always[always != huge_row(v)], huge_row(v))
    always = np.sort(always).astype(np.int32)

    def gate(n: int, share: float, of: int) -> Gate:
        error = random.integers(0, 21, n, dtype=np.uint8)
        if case.states == "tied" and n != k:
            pair_up(error)
        if case.states == "huge" and n != k:  # a row so large has a large error, too: it passes
            error[table == huge_row(v)] = 255
        return Gate(error, 0.5, 0.0, max(1, min(n, round(share * of))))

    published = case.centroids == "float16"
    turned = min(case.coordinates or d, d)
    coordinates = d if published else turned + 1
    rotation = None
    if not published:
        spread = 1 / math.sqrt(d)
        rotation = made_columns(random, d, turned, spread) if case.coordinates else made_bits(random, d, 4 * d // 8, d, spread)
    if published:
        centroids = Coded("float16", d, random.standard_normal((k, d)).astype(np.float16).view(np.uint8))
    else:
        centroids = made_code(random, k, case.centroids, coordinates, coordinates, 1.0)
    stages = []
    for code, cap, spread in zip(case.rows, case.caps[1:], (1.0, 0.5, 0.3, 0.15)):
        rows = made_code(random, k * size, code, min(114, coordinates), coordinates, spread)
        if case.states == "tied":  # neighbours in a cluster have the same codes
            for array in (rows.data, rows.scale):
                if array is not None:
                    pair_up(array)
        stages.append(Stage(rows, gate(k * size, cap, v)))
    return HeadIndex(
        vocab_size=v,
        hidden_size=d,
        token_table=table.reshape(k, size),
        centroids=centroids,
        probe=gate(k, case.caps[0], k),
        stages=tuple(stages),
        always_scored=always,
        mean=None if published else (0.1 * random.standard_normal(d)).astype(np.float32),
        rotation=rotation,
        tail_scale=1.0,
        tail_offset=-1.0,
        fingerprint="made",
        state_power=case.state_power,
    )


def pair_up(array: np.ndarray) -> None:
    """Make every second row that of the one before it, in place."""
    array[1::2] = array[0 : len(array) // 2 * 2 : 2]


def huge_row(vocab_size: int) -> int:
    """The token whose row is the largest by far, where a case has one."""
    return vocab_size // 3


def made_code(random: np.random.Generator, n: int, code: str, product_columns: int, coordinates: int, spread: float) -> Coded:
    """A random code by its short name, ``product24``, ``columns128`` or ``bits96``."""
    if code.startswith("columns"):
        return made_columns(random, n, min(int(code.removeprefix("columns")), coordinates), spread)
    if code.startswith("product"):
        return made_product(random, n, int(code.removeprefix("product")), product_columns, coordinates, spread)
    return made_bits(random, n, int(code.removeprefix("bits")), coordinates, spread)


def made_bits(random: np.random.Generator, n: int, size: int, coordinates: int, spread: float) -> Coded:
    """A random `bits` code of `size` bytes a row whose values are about `spread` large, in wide and narrow columns."""
    bits = 8 * size
    columns = min(coordinates, bits)
    widths = np.full(columns, bits // columns, np.uint8)
    widths[: bits - int(widths.sum())] += 1
    few = min(columns // 4, 8)  # some columns are wider, others narrower or empty
    widths[:few] += 1
    widths[-few:] -= 1
    scale = random.uniform(0.5, 1.5, (n, 1)).astype(np.float16)
    steps = (spread * 2.0 ** (1.0 - widths.astype(float)) * (1 + np.arange(columns) / 32) ** -0.5).astype(np.float32)
    data = random.integers(0, 256, (n, packed_bytes(widths)), dtype=np.uint8)
    return Coded("bits", columns, data, scale, widths, np.where(widths > 0, steps, 0).astype(np.float32))


def made_columns(random: np.random.Generator, n: int, columns: int, spread: float) -> Coded:
    """A random `bits` code of 8 bits a column whose values are about `spread` large."""
    scale = random.uniform(0.5, 1.5, (n, 1)).astype(np.float16)
    steps = (spread / 128 * (1 + np.arange(columns) / 32) ** -0.5).astype(np.float32)
    return Coded("bits", columns, random.integers(0, 256, (n, columns), dtype=np.uint8), scale, np.full(columns, 8, np.uint8), steps)


def made_product(random: np.random.Generator, n: int, groups: int, columns: int, coordinates: int, spread: float) -> Coded:
    """A random product code: groups that grow, the last one to `columns`."""
    ends = np.unique(np.minimum(np.cumsum(2 + np.arange(groups) ** 2 // 24), columns - groups) + np.arange(groups))
    ends[-1] = columns
    widths = np.clip(8 - np.arange(columns) // 12, 2 if columns < coordinates else 4, 8).astype(np.uint8)
    steps = (spread * 2.0 ** (1.0 - widths.astype(float)) * (1 + np.arange(columns) / 32) ** -0.5).astype(np.float32)
    return Coded(
        "product",
        columns,
        random.integers(0, 256, (n, len(ends)), dtype=np.uint8),
        widths=widths,
        steps=steps,
        group_ends=ends.astype(np.int32),
        codebook=random.integers(0, 256, (256, packed_bytes(widths)), dtype=np.uint8),
    )


def made_rows(case: Case, seed: int = 1) -> np.ndarray:
    """The head's own rows for a case, [V, d] float32."""
    random = np.random.default_rng(seed)
    rows = 0.05 * random.standard_normal((case.vocab_size, case.hidden_size), dtype=np.float32)
    if case.states == "negative":
        rows = -np.abs(rows)
    elif case.states == "huge":
        rows[huge_row(case.vocab_size)] *= 1_000
    elif case.states == "tied":
        pair_up(rows)
    return rows


def made_states(case: Case | DenseCase, n: int, seed: int = 2) -> np.ndarray:
    """Hidden states for a case, [n, d] float32."""
    states = np.random.default_rng(seed).standard_normal((n, case.hidden_size), dtype=np.float32)
    return np.abs(states) if case.states == "negative" else states


def mean_counts(case: Case, shares: Sequence[float]) -> np.ndarray:
    """Counts of a step at these shares: clusters opened, slots scored by each code, rows scored exactly, [2 + stages] float64."""
    opened = shares[0] * case.vocab_size
    return np.array([opened / case.cluster_size, opened + case.always, *(s * case.vocab_size for s in shares[1:])])
