"""The 4-bit layouts of model folders, N outputs and K inputs, read without a change of any number.

| format | codes | scales | zero |
|---|---|---|---|
| compressed-tensors | `weight_packed` int32 [N, K / 8] | `weight_scale` [N, G] | 8, or `weight_zero_point` int32 [N / 8, G], packed along N |
| AWQ gemm | `qweight` int32 [K, N / 8], slot i of a word is column AWQ_ORDER[i] | `scales` [G, N] | `qzeros` int32 [G, N / 8], the same slots |
| GPTQ | `qweight` int32 [K / 8, N] | `scales` [G, N] | `qzeros` int32 [G, N / 8]: the zero (version 2) or one less, modulo 16 (version 1) |
| MLX | `weight` uint32 [N, K / 8] | `scales` [N, G] | `biases` [N, G]: a minimum is added instead |

The first code is in a word's lowest bits. GPTQ's `g_idx` [K] and compressed-tensors' `weight_g_idx` give each input's group where
inputs were quantised in another order (act-order). Sources: compressed-tensors 0.20, `compressors/pack_quantized`; AutoAWQ,
`awq/utils/packing_utils.py`; GPTQModel, `gptqmodel/nn_modules/qlinear/__init__.py`; MLX, `mlx.core.dequantize`.
"""

from __future__ import annotations

import numpy as np

from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.packed.coded import HALF, Coded4, paired, unpaired
from flashhead_edge.packed.files import FLOATS, Files
from flashhead_edge.packed.scheme import BITS, Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
A_WORD = 8  # codes
AGAIN = "fetch the model again"


def packed_shape(files: Files, scheme: Scheme, stem: str) -> tuple[int, int]:
    """[N, K] of a packed matrix, all its tensors' dtypes and shapes checked.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the others say.
        UnsupportedModelError: codes of another width, or a matrix of another rank.
    """
    if scheme.kind == "compressed-tensors":
        return _compressed_shape(files, scheme, stem)
    if scheme.kind == "mlx":
        return _mlx_shape(files, scheme, stem)
    rows, columns = _two(files, f"{stem}.qweight", "I32")
    n, k = (columns * A_WORD, rows) if scheme.kind == "awq" else (columns, rows * A_WORD)
    if scheme.kind == "gptq" and n % A_WORD:
        raise UnsupportedModelError(f"{stem}: {n} outputs, expected a multiple of {A_WORD}, as zero points are packed; choose another checkpoint")
    if scheme.kind == "gptq" and (scheme.ordered or f"{stem}.g_idx" in files):
        held = files.entry(f"{stem}.g_idx")
        if held.dtype != "I32" or len(held.shape) != 1:
            raise _wrong(f"{stem}.g_idx", held.dtype, held.shape, "I32", (k,))
        if held.shape[0] != k and rows * A_WORD * BITS in (held.shape[0] * bits for bits in (2, 3, 8)):
            raise UnsupportedModelError(
                f"{stem}: {rows} words of codes for the {held.shape[0]} inputs of g_idx, expected {BITS} bits a code; choose another checkpoint"
            )
        if held.shape[0] != k:
            raise _wrong(f"{stem}.qweight", "I32", (rows, columns), "I32", (held.shape[0] // A_WORD, columns))
    group = _group(_two(files, f"{stem}.scales", None)[0], k, scheme, stem)
    _expect(files, f"{stem}.scales", None, (k // group, n))
    if f"{stem}.qzeros" in files or scheme.kind == "gptq" or scheme.zeros:
        _expect(files, f"{stem}.qzeros", "I32", (k // group, n // A_WORD))
    return n, k


def read_codes(files: Files, scheme: Scheme, stem: str, start: int, stop: int) -> Coded4:
    """Rows start to stop of a packed matrix that `packed_shape` has checked. Codes may be a view of the file.

    Raises:
        CheckpointError: `g_idx` gives groups of unequal size.
    """
    _, k = packed_shape(files, scheme, stem)
    read = {"compressed-tensors": _compressed, "mlx": _mlx, "awq": _awq, "gptq": _gptq}[scheme.kind]
    return read(files, scheme, stem, k, slice(start, stop))


# ---- the formats


def _compressed_shape(files: Files, scheme: Scheme, stem: str) -> tuple[int, int]:
    _expect(files, f"{stem}.weight_shape", "I64", (2,))
    n, k = (int(x) for x in files.array(f"{stem}.weight_shape"))
    rows, words = _two(files, f"{stem}.weight_packed", "I32")
    if rows != n or k <= 0:
        raise _wrong(f"{stem}.weight_packed", "I32", (rows, words), "I32", (n, -(-k // A_WORD)))
    if words != -(-k // A_WORD):
        raise UnsupportedModelError(f"{stem}: {words} words for {k} codes, expected {BITS} bits a code; choose another checkpoint")
    if k % A_WORD:
        raise UnsupportedModelError(f"{stem}: {k} inputs, expected a multiple of {A_WORD}; choose another checkpoint")
    group = _group(_two(files, f"{stem}.weight_scale", None)[1], k, scheme, stem)
    _expect(files, f"{stem}.weight_scale", None, (n, k // group))
    zero = f"{stem}.weight_zero_point"
    if (scheme.zeros and zero not in files) or (zero in files and files.entry(zero).dtype != "I8"):
        _expect(files, zero, "I32", (-(-n // A_WORD), k // group))
    elif zero in files:
        _expect(files, zero, "I8", (n, k // group))
    if f"{stem}.weight_g_idx" in files:
        _expect(files, f"{stem}.weight_g_idx", "I32", (k,))
    return n, k


def _compressed(files: Files, scheme: Scheme, stem: str, k: int, rows: slice) -> Coded4:
    scales = files.floats(f"{stem}.weight_scale", (rows,))
    zeros, zero = None, f"{stem}.weight_zero_point"
    if zero in files and files.entry(zero).dtype == "I8":  # one number each, as a model in memory has them
        zeros = (files.array(zero)[rows].astype(np.int16) + HALF).astype(np.uint8)
    elif zero in files:
        zeros = _fields(files.array(zero).T)[:, rows].T
    return _ordered(files, _bytes(files.array(f"{stem}.weight_packed")[rows]), scales, zeros, f"{stem}.weight_g_idx", k)


def _gptq(files: Files, scheme: Scheme, stem: str, k: int, rows: slice) -> Coded4:
    codes = _bytes(files.array(f"{stem}.qweight")[:, rows].T)  # a column's words are its inputs in order: bytes of two codes as they are
    scales = np.ascontiguousarray(files.floats(f"{stem}.scales", (slice(None), rows)).T)
    stored = _fields(files.array(f"{stem}.qzeros"))
    second = scheme.second
    if scheme.symmetric and stored.size and stored.min() == stored.max() and stored.flat[0] in (HALF - 1, HALF):
        second = stored.flat[0] == HALF  # writers have mislabelled versions: a symmetric matrix tells by its zeros
    zeros = (stored if second else (stored + 1) & 15)[:, rows].T
    return _ordered(files, codes, scales, zeros, f"{stem}.g_idx", k)


def _awq(files: Files, scheme: Scheme, stem: str, k: int, rows: slice) -> Coded4:
    words = slice(rows.start // A_WORD, -(-rows.stop // A_WORD))
    inner = slice(rows.start - words.start * A_WORD, rows.stop - words.start * A_WORD)

    def columns(name: str) -> np.ndarray:
        """Words [rows, N / 8] as the codes of each column, [N, rows] uint8: a slot of all words at a time, since these are the whole matrix."""
        turned = np.ascontiguousarray(files.array(name)[:, words].T).view("<u4")
        codes = np.empty((len(turned), A_WORD, turned.shape[1]), np.uint8)
        for slot, column in enumerate(AWQ_ORDER):
            codes[:, column] = turned >> (BITS * slot) & 15
        return codes.reshape(-1, turned.shape[1])[inner]

    scales = np.ascontiguousarray(files.floats(f"{stem}.scales", (slice(None), rows)).T)
    zeros = columns(f"{stem}.qzeros") if f"{stem}.qzeros" in files else None
    return _ordered(files, paired(columns(f"{stem}.qweight")), scales, zeros, None, k)


def _mlx_shape(files: Files, scheme: Scheme, stem: str) -> tuple[int, int]:
    bits, group = scheme.layers.get(stem, scheme.layers[""])
    n, words = _two(files, f"{stem}.weight", "U32")
    if bits != BITS:
        raise UnsupportedModelError(f"{stem}: MLX codes of {bits} bits, expected {BITS}; choose another checkpoint")
    k = words * A_WORD
    if group <= 0 or k <= 0 or k % group:
        raise CheckpointError(f"{stem}: {k} inputs in groups of {group}, expected a divisor of them; {AGAIN}")
    for part in ("scales", "biases"):
        _expect(files, f"{stem}.{part}", None, (n, k // group))
    return n, k


def _mlx(files: Files, scheme: Scheme, stem: str, k: int, rows: slice) -> Coded4:
    scales, minima = (files.floats(f"{stem}.{part}", (rows,)) for part in ("scales", "biases"))
    return Coded4(_bytes(files.array(f"{stem}.weight")[rows]), scales, None, minima, k // scales.shape[1])


# ---- what they share


def _ordered(files: Files, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, index: str | None, k: int) -> Coded4:
    """Codes with their inputs group after group, and zeros left out where all are 8."""
    group = k // scales.shape[1]
    zeros = None if zeros is None or bool((zeros == HALF).all()) else np.ascontiguousarray(zeros)
    order = None if index is None or index not in files else input_order(files.array(index), group, index)
    if order is not None:
        codes = paired(np.take(unpaired(codes), order, 1))
    return Coded4(np.ascontiguousarray(codes), scales, zeros, None, group, order)


def input_order(groups: np.ndarray, size: int, name: str) -> np.ndarray | None:
    """The inputs, group after group, [K] int32; None where they lie so, or where no group was ever given (-1).

    Raises:
        CheckpointError: groups that do not have `size` inputs each.
    """
    k = len(groups)
    if bool((groups == np.arange(k) // size).all()) or bool((groups == -1).all()):
        return None
    counts = np.bincount(groups, minlength=k // size) if int(groups.min()) >= 0 and int(groups.max()) < k // size else np.array([-1])
    if bool((counts != size).any()):
        raise CheckpointError(
            f"{name}: groups {int(groups.min())} to {int(groups.max())} of unequal size, expected {k // size} groups of {size} inputs each; {AGAIN}"
        )
    return np.argsort(groups, kind="stable").astype(np.int32)


def _bytes(words: np.ndarray) -> np.ndarray:
    """Words [rows, w] as bytes of two codes, [rows, 4 w] uint8."""
    return np.ascontiguousarray(words).view(np.uint8)


def _fields(words: np.ndarray) -> np.ndarray:
    """Words [rows, w] as codes, [rows, 8 w] uint8."""
    return unpaired(_bytes(words))


def _group(groups: int, k: int, scheme: Scheme, stem: str) -> int:
    """The size of a matrix' groups, from their number."""
    sizes = {k if size == -1 else size for size in scheme.groups}
    if groups <= 0 or k <= 0 or k % groups or (sizes and k // groups not in sizes):
        said = " or ".join(str(s) for s in sorted(sizes)) or "a divisor of the inputs"
        raise CheckpointError(f"{stem}: {groups} groups of scales for {k} inputs, expected groups of {said}; {AGAIN}")
    return k // groups


def _two(files: Files, name: str, dtype: str | None) -> tuple[int, int]:
    """The shape of a matrix; dtype None: floats."""
    held = files.entry(name)
    if held.dtype not in (FLOATS if dtype is None else (dtype,)):
        raise _wrong(name, held.dtype, held.shape, dtype or "floats", ())
    if len(held.shape) != 2:
        raise UnsupportedModelError(f"{name}: {len(held.shape)} dimensions {list(held.shape)}, expected a matrix; choose another checkpoint")
    return held.shape[0], held.shape[1]


def _expect(files: Files, name: str, dtype: str | None, shape: tuple[int, ...]) -> None:
    held = files.entry(name)
    if held.dtype not in (FLOATS if dtype is None else (dtype,)) or held.shape != shape:
        raise _wrong(name, held.dtype, held.shape, dtype or "floats", shape)


def _wrong(name: str, dtype: str, shape: tuple[int, ...], wanted: str, expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{name}: {dtype} {list(shape)}, expected {wanted}{f' {list(expected)}' if expected else ''}; {AGAIN}")
