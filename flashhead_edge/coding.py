"""Making codes and reading them back, in torch (CPU or GPU by the same code). The data type is in `codes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.codes import Coded

# Step of the uniform mid-rise quantiser of least squared error for N(0, 1) (Max, IRE Transactions 1960).
GAUSSIAN_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308}
ENTRY_NOISE = 0.2  # what rounding a codebook may add to the squared error that its rows have anyway


@dataclass(frozen=True, eq=False)
class TorchCoded:
    """A `Coded` matrix as tensors of one device."""

    kind: str
    columns: int
    arrays: dict[str, Tensor]  # of `Coded`; a codebook as its values, `entries` [256, columns] float32
    runs: tuple[tuple[int, int, int, int], ...]  # runs of columns of one width: first column, end, width, first bit


def to_torch(coded: Coded, device: torch.device | str = "cpu") -> TorchCoded:
    """Put the arrays on a device once, so that decoding does not copy them again."""
    names = ("data", "scale", "steps", "group_ends")
    arrays = {k: torch.from_numpy(np.ascontiguousarray(getattr(coded, k))).to(device) for k in names if getattr(coded, k) is not None}
    runs: list[tuple[int, int, int, int]] = []
    if coded.widths is not None:
        widths = coded.widths.astype(int)
        edges = [0, *(np.flatnonzero(np.diff(widths)) + 1).tolist(), len(widths)]
        bits = np.concatenate([[0], np.cumsum(widths)])
        runs = [(a, b, int(widths[a]), int(bits[a])) for a, b in zip(edges, edges[1:])]
    if coded.codebook is not None:
        arrays["entries"] = _fields(torch.from_numpy(coded.codebook).to(device), coded.columns, runs) * arrays["steps"]
    return TorchCoded(coded.kind, coded.columns, arrays, tuple(runs))


def decode(coded: TorchCoded, rows: Tensor | slice = slice(None)) -> Tensor:
    """The rows' values, [n, columns] float32.

    Args:
        rows: row numbers, int64 [n], or a slice.
    """
    a = coded.arrays
    data = a["data"][rows]
    if coded.kind == "float16":
        return data.contiguous().view(torch.float16).float()
    if coded.kind == "product":
        out = torch.empty(len(data), coded.columns, device=data.device)
        start = 0
        for g, end in enumerate(a["group_ends"].tolist()):
            out[:, start:end] = a["entries"][:, start:end][data[:, g].long()]
            start = end
        return out
    out = _fields(data, coded.columns, coded.runs)
    scale = a["scale"][rows].float()
    if coded.kind == "bits":
        return out * a["steps"] * scale
    # int: zero must be a value, so the grid is whole numbers; `bits` has its halves (mid-rise)
    return (out - 0.5) * scale.repeat_interleave(coded.columns // scale.shape[1], 1)


def _fields(data: Tensor, columns: int, runs: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Fields of packed rows on a grid of halves about zero: [n, columns] float32."""
    out = torch.zeros(len(data), columns, device=data.device)
    for start, end, width, bit in runs:
        if width:
            out[:, start:end] = _unpack(data, bit, width, end - start).float() - 2.0 ** (width - 1) + 0.5
    return out


def _unpack(data: Tensor, bit: int, width: int, count: int) -> Tensor:
    """`count` fields of `width` bits each, from bit `bit` of every row on: [n, count] int32."""
    first = bit + width * torch.arange(count, device=data.device)
    byte, shift = first // 8, (first % 8).to(torch.int32)
    low = data[:, byte].to(torch.int32)
    if (8 % width) or bit % width:  # a field may straddle two bytes
        high = data[:, (byte + 1).clamp(max=data.shape[1] - 1)].to(torch.int32)
        low = low | (high << 8)
    return (low >> shift) & (2**width - 1)


def _pack(values: Tensor, widths: np.ndarray) -> np.ndarray:
    """Fields [n, columns] of whole numbers from 0 on, packed from the lowest bit up: [n, bytes] uint8."""
    values_np = values.to(torch.uint8).cpu().numpy()
    total = int(widths.sum())
    out = np.zeros((len(values_np), (total + 7) // 8), np.uint8)
    for chunk in range(0, len(values_np), 8192):
        part = values_np[chunk : chunk + 8192]
        fields = [np.unpackbits(part[:, [j]], axis=1, bitorder="little")[:, :w] for j, w in enumerate(widths.tolist())]
        bits = np.concatenate(fields, axis=1)
        out[chunk : chunk + 8192] = np.packbits(bits, axis=1, bitorder="little")
    return out


def encode_float16(values: Tensor) -> Coded:
    """Values [n, columns] as they are, in half precision."""
    data = values.to(torch.float16).cpu().contiguous().numpy()
    return Coded("float16", values.shape[1], data.view(np.uint8).reshape(len(data), -1))


def encode_int(values: Tensor, bits: int, group: int) -> Coded:
    """Signed integers of `bits` bits with a scale for each row and group of `group` columns, rounded to nearest."""
    n, columns = values.shape
    group = largest_divisor(columns, group)
    grouped = values.float().view(n, columns // group, group)
    top = 2 ** (bits - 1) - 1 if bits > 1 else 0.5
    scale = (grouped.abs().amax(2) / top).clamp(min=6e-8).to(torch.float16)
    whole = (grouped / scale.float()[:, :, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    widths = np.full(columns, bits, np.uint8)
    return Coded("int", columns, _pack(whole.view(n, columns), widths), scale=scale.cpu().numpy(), widths=widths)


def largest_divisor(columns: int, group: int) -> int:
    """The largest group of at most `group` columns that divides `columns`."""
    return next(g for g in range(min(group, columns), 0, -1) if columns % g == 0)


def water_level(variance: Tensor, bits: float) -> Tensor:
    """Real-valued bits for each column by reverse water-filling, 0 to 8, `bits` in all: [columns] float64.

    Source: Cover and Thomas, Elements of Information Theory, section 10.3.3.
    """
    log_variance = variance.double().clamp(min=1e-30).log2()
    low, high = float(log_variance.min()) - 18.0, float(log_variance.max()) + 2.0
    for _ in range(80):
        middle = (low + high) / 2
        total = float((0.5 * (log_variance - middle)).clamp(0, 8).sum())
        low, high = (middle, high) if total > bits else (low, middle)
    return (0.5 * (log_variance - high)).clamp(0, 8)


def encode_bits(values: Tensor, bytes_per_row: int) -> Coded:
    """Integers whose widths follow the columns' variances, with one scale a row: `bytes_per_row` bytes and 2 for the scale."""
    values = values.float()
    owed = water_level((values / _row_scale(values).float()).square().mean(0), 8 * bytes_per_row)
    widths = owed.round().to(torch.int64)
    while int(widths.sum()) > 8 * bytes_per_row:  # rounding may overdraw: take from where a bit is owed least
        widths[torch.where(widths > 0, owed - widths + 1, torch.inf).argmin()] -= 1
    return _encode_widths(values, widths[: int(widths.nonzero().max()) + 1])


def _row_scale(values: Tensor) -> Tensor:
    """A row's length over the mean length, [n, 1] float16."""
    length = values.norm(dim=1, keepdim=True)
    return (length / length.mean().clamp(min=1e-12)).clamp(min=1e-4, max=6e4).to(torch.float16)


def _encode_widths(values: Tensor, widths: Tensor) -> Coded:
    """The leading columns as integers of these widths [columns], a step for each column and a scale for each row of `values` [n, more columns]."""
    scale = _row_scale(values)
    unit = values[:, : len(widths)] / scale.float()
    rms, used = unit.square().mean(0).sqrt(), len(widths)
    table = torch.tensor([0.0] + [GAUSSIAN_STEP[b] for b in range(1, 9)], device=values.device)
    steps = torch.where(widths > 0, table[widths] * rms, torch.zeros_like(rms))
    half = (2.0 ** (widths - 1)).floor()
    whole = torch.where(widths > 0, (unit / steps.clamp(min=1e-30)).floor().clamp(min=-half, max=(half - 1).clamp(min=0)) + half, torch.zeros_like(unit))
    whole[:, widths == 1] = (unit[:, widths == 1] >= 0).float()
    packed = widths.to(torch.uint8).cpu().numpy()
    return Coded("bits", used, _pack(whole, packed), scale=scale.cpu().numpy(), widths=packed, steps=steps.float().cpu().numpy())


def encode_columns(values: Tensor, columns: int) -> Coded:
    """The leading columns in 8 bits each, with one scale a row: for runtimes that read a byte a column, whatever its width."""
    return _encode_widths(values.float(), torch.full((min(columns, values.shape[1]),), 8, device=values.device))


def encode_product(values: Tensor, bytes_per_row: int, iterations: int = 10, seed: int = 0, sample: int = 16384) -> Coded:
    """Product code: leading columns in `bytes_per_row` groups that are owed about 8 bits each, 256 entries a group.

    Args:
        values: [n, columns]; later columns, owed no bits, are left out.
        sample: rows that the codebooks are fitted on at most.
    """
    values = values.float()
    n, bytes_per_row = len(values), min(bytes_per_row, values.shape[1])
    generator = torch.Generator().manual_seed(seed)
    variance = values.var(0, correction=0)
    owed = water_level(variance, 8 * bytes_per_row)
    # a column without variance is coded too where leaving it out would cost more than the coded ones lose
    least = float(variance[owed > 0].min()) if bool((owed > 0).any()) else 0.0
    wanted = ((owed > 0) | (values.mean(0).square() > least)).nonzero()
    used = min(values.shape[1], max(int(wanted.max()) + 1 if len(wanted) else 1, bytes_per_row))
    total, level = torch.cumsum(owed[:used], 0), 0.0
    ends: list[int] = []
    for g in range(1, bytes_per_row):
        level = float(total[-1]) * g / bytes_per_row
        end = int(torch.searchsorted(total, level)) + 1
        end = min(max(end, (ends[-1] if ends else 0) + 1), used - (bytes_per_row - g))
        ends.append(end)
    ends.append(used)
    rows = torch.arange(n) if n <= sample else torch.randperm(n, generator=generator)[:sample].sort().values
    rows = rows.to(values.device)
    book = torch.zeros(256, used, device=values.device)
    step, widths = torch.zeros(used, device=values.device), np.zeros(used, np.uint8)
    data = torch.empty(n, len(ends), dtype=torch.uint8, device=values.device)
    start = 0
    for g, end in enumerate(ends):
        entries = _kmeans(values[rows, start:end], 256, iterations, generator)
        left = values[rows, start:end] - entries[_nearest(values[rows, start:end], entries)]
        noise = ENTRY_NOISE * float(left.square().mean(0).sum())
        for width in range(1, 9):
            steps = entry_steps(entries, width)
            whole = (entries / steps).floor().clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
            coarse = (whole + 0.5) * steps
            if float((coarse - entries).square().mean(0).sum()) <= noise:
                break
        book[:, start:end], step[start:end], widths[start:end] = whole + 2 ** (width - 1), steps, width
        data[:, g] = _nearest(values[:, start:end], coarse).to(torch.uint8)
        start = end
    return Coded(
        "product",
        used,
        data.cpu().numpy(),
        widths=widths,
        steps=step.float().cpu().numpy(),
        group_ends=np.array(ends, np.int32),
        codebook=_pack(book, widths),
    )


def entry_steps(entries: Tensor, width: int) -> Tensor:
    """Step of each column of a codebook in `width` bits: the Gaussian's, or a smaller one that reaches the largest entry."""
    whole_range = entries.abs().amax(0) / (2 ** (width - 1) - 0.5)
    return torch.minimum(GAUSSIAN_STEP[width] * entries.square().mean(0).sqrt(), whole_range).clamp(min=1e-12)


def _nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Number of the nearest entry, [n] int64."""
    half = 0.5 * entries.square().sum(1)
    return torch.cat([(part @ entries.T - half).argmax(1) for part in values.split(32768)])


def _kmeans(values: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd iterations from distinct random rows; an entry that wins no row starts again from a random one."""
    first = torch.randperm(len(values), generator=generator)[:k].to(values.device)
    entries = values[first] if len(first) == k else torch.cat([values[first], torch.zeros(k - len(first), values.shape[1], device=values.device)])
    for _ in range(iterations):
        home = _nearest(values, entries)
        mass = home.bincount(minlength=k)
        total = torch.zeros_like(entries).index_add_(0, home, values)
        again = torch.randint(len(values), (k,), generator=generator).to(values.device)
        entries = torch.where(mass[:, None] > 0, total / mass.clamp(min=1)[:, None], values[again])
    return entries


def encode(values: Tensor, code: str, seed: int = 0) -> Coded:
    """Encode by a short name: ``float16``, ``int4/64`` (bits/group), ``columns96`` (in 8 bits), ``bits96`` or ``product16`` (bytes a row)."""
    if code == "float16":
        return encode_float16(values)
    if code.startswith("columns"):
        return encode_columns(values, int(code[7:]))
    if code.startswith("int"):
        bits, group = code[3:].split("/")
        return encode_int(values, int(bits), int(group))
    if code.startswith("bits"):
        return encode_bits(values, int(code[4:]))
    return encode_product(values, int(code.removeprefix("product")), seed=seed)
