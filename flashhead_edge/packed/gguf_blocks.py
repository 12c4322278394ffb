"""The blocks of a GGUF file as codes and scales, value for value. numpy only.

| type | values, bytes | a block, and what a value is |
|---|---|---|
| Q4_0 | 32, 18 | d, 16 bytes of codes: d (q - 8) |
| Q4_1 | 32, 20 | d, m, 16 bytes of codes: d q + m |
| Q8_0 | 32, 34 | d, 32 int8: d q |
| Q4_K | 256, 144 | d, dmin, 12 bytes with 8 scales sc and 8 minima mn of 6 bits, 128 bytes of codes: d sc q - dmin mn, 32 values each |
| Q6_K | 256, 210 | 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales sc, d: d sc (q - 32), 16 values each |

d, dmin and m are float16. Of Q4_0's and Q4_1's 16 bytes the low nibbles are values 0 to 15, the high ones 16 to 31; Q4_K's go in
runs of 32 bytes in the same way. Source: https://github.com/ggml-org/ggml, src/ggml-quants.c, dequantize_row_*.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashhead_edge.packed.coded import Coded4, Coded8, paired


def floats(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Rows of F32, F16 or BF16 bytes [rows, bytes] as float32 [rows, K]."""
    if kind == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return blocks.view("<f4" if kind == "F32" else "<f2").astype(np.float32)


def coded(blocks: np.ndarray, kind: str) -> Coded4 | Coded8:
    """Rows of quantised blocks [rows, bytes], contiguous, as codes."""
    return READERS[kind](len(blocks), blocks)


def _q4_0(rows: int, data: np.ndarray) -> Coded4:
    block = data.reshape(rows, -1, 18)
    return Coded4(_runs(block[..., 2:], rows), _halves(block[..., :2]), None, None, 32)


def _q4_1(rows: int, data: np.ndarray) -> Coded4:
    block = data.reshape(rows, -1, 20)
    return Coded4(_runs(block[..., 4:], rows), _halves(block[..., :2]), None, _halves(block[..., 2:4]), 32)


def _q8_0(rows: int, data: np.ndarray) -> Coded8:
    block = data.reshape(rows, -1, 34)
    return Coded8(np.ascontiguousarray(block[..., 2:]).view(np.int8).reshape(rows, -1), _halves(block[..., :2]), 32)


def _q4_k(rows: int, data: np.ndarray) -> Coded4:
    block = data.reshape(rows, -1, 144)
    d, least, packed = _halves(block[..., :2]), _halves(block[..., 2:4]), block[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    # scales and minima 0 to 3 have bytes of their own; of 4 to 7 the low nibbles lie in the last four bytes, the high pairs above the first ones
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
    codes = _runs(block[..., 16:].reshape(rows, -1, 4, 32), rows)
    return Coded4(codes, (d[..., None] * scales).reshape(rows, -1), None, (-least[..., None] * minima).reshape(rows, -1), 32)


def _q6_k(rows: int, data: np.ndarray) -> Coded8:
    block = data.reshape(rows, -1, 210)
    low, high, scales, d = block[..., :128], block[..., 128:192], block[..., 192:208], _halves(block[..., 208:])
    halves = low.reshape(rows, -1, 2, 1, 64)
    nibbles = np.concatenate([halves & 15, halves >> 4], -2).reshape(rows, -1, 2, 4, 32)  # of a half of 128 values: four runs of 32
    pairs = high.reshape(rows, -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (nibbles | pairs << 4).view(np.int8) - np.int8(32)
    return Coded8(codes.reshape(rows, -1), (d[..., None] * np.ascontiguousarray(scales).view(np.int8)).reshape(rows, -1), 16)


READERS: dict[str, Callable[[int, np.ndarray], Coded4 | Coded8]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def _runs(codes: np.ndarray, rows: int) -> np.ndarray:
    """Runs of bytes [..., b], whose low nibbles come before their high ones, as pairs of neighbours [rows, K / 2]."""
    return np.concatenate([paired(codes & 15), paired(codes >> 4)], -1).reshape(rows, -1)


def _halves(data: np.ndarray) -> np.ndarray:
    """float16 bytes [..., 2] as float32 [...]."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)
