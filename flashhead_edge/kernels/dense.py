"""A dense head in whole numbers of 8 or 4 bits on an NVIDIA GPU: greedy tokens by one kernel, the rival of a clustered head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_edge.codes import Coded
from flashhead_edge.errors import SettingsError
from flashhead_edge.kernels.build import architecture_of
from flashhead_edge.kernels.ops import DENSE_WORKSPACE, dense_head, most_dense_rows

TILE = 16  # rows
CHUNK_BYTES = 64  # of a row
GROUPS = {8: (0, 32, 128), 4: (32, 128)}  # columns that share a scale, by bits; 0: the whole row


@dataclass(frozen=True, eq=False)
class CudaDense:
    """Packed rows on a device, as plugins_trt/kernels/dense_head.h lays them out."""

    codes: Tensor  # [tiles, chunks, 1024] uint8
    scales: Tensor  # [tiles, blocks, 16, scales of a row in a block] float16
    workspace: Tensor  # one stream at a time
    vocab_size: int
    hidden_size: int
    bits: int
    group: int  # columns that share a scale; 0: the row
    blocks: int  # of a launch
    most_rows: int  # of a launch: as many states as shared memory holds
    architecture: str

    def launch(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`ops.dense_head` of 1 to 32 hidden states: what a CUDA graph captures (after one call outside of it)."""
        return dense_head(hidden, self.codes, self.scales, self.workspace, self.vocab_size, self.bits, self.group, self.blocks, self.architecture)

    def token(self, hidden: Tensor) -> Tensor:
        """Greedy tokens [N] int64 of hidden states [N, d] float16 or bfloat16."""
        return torch.cat([self.launch(part.contiguous())[0] for part in hidden.split(self.most_rows)])

    @property
    def bytes_per_step(self) -> int:
        """What a launch reads: codes and scales, filled up to whole tiles and chunks."""
        return self.codes.numel() + 2 * self.scales.numel()


def cuda_dense(
    rows: Coded,
    device: torch.device | str = "cuda",
    multiprocessors: int | None = None,
    shared_bytes: int | None = None,
    architecture: str | None = None,
) -> CudaDense:
    """Put a dense head's rows, coded as `int` in 8 or 4 bits, on a GPU.

    Args:
        rows: [V, d] with a scale for each 32 or 128 columns, in 8 bits also for the row.
        multiprocessors, shared_bytes, architecture: a smaller device to plan and compile for; by default those found.
    Raises:
        SettingsError: another code, width or group.
    """
    codes, scales, bits, group = packed_rows(rows, device)
    properties = torch.cuda.get_device_properties(codes.device)
    shared = shared_bytes or properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return CudaDense(
        codes=codes,
        scales=scales,
        workspace=torch.zeros(DENSE_WORKSPACE, dtype=torch.uint8, device=codes.device),
        vocab_size=rows.n,
        hidden_size=rows.columns,
        bits=bits,
        group=group,
        blocks=multiprocessors or properties.multi_processor_count,
        most_rows=most_dense_rows(rows.columns, bits, group, shared),
        architecture=architecture or architecture_of(codes.device),
    )


def packed_rows(rows: Coded, device: torch.device | str) -> tuple[Tensor, Tensor, int, int]:
    """Codes and scales in the kernel's order (dense_head.h), with bits and group.

    Raises:
        SettingsError: a code without a kernel.
    """
    widths = set() if rows.widths is None else set(rows.widths.tolist())
    bits = next(iter(widths)) if len(widths) == 1 else 0
    n, d, groups = rows.n, rows.columns, 0 if rows.scale is None else rows.scale.shape[1]
    group = 0 if groups == 1 and bits == 8 else d // max(groups, 1)
    if rows.kind != "int" or rows.scale is None or group not in GROUPS.get(bits, ()) or d % 8:
        raise SettingsError(
            f"dense_head: rows are {rows.kind} of widths {sorted(widths)} with {groups} scales for {d} columns, expected int of 8 or 4 bits, "
            "d a multiple of 8, and a scale for each 32 or 128 columns (8 bits: or the row); code them again with such a group"
        )
    chunk = CHUNK_BYTES * 8 // bits
    columns = -(-d // max(chunk, group)) * max(chunk, group)
    tiles, chunks, parts = -(-n // TILE), columns // chunk, chunk // 32
    pad = torch.nn.functional.pad
    data = pad(torch.from_numpy(rows.data).to(device), (0, columns * bits // 8 - rows.data.shape[1], 0, tiles * TILE - n))
    # tile, half, row, chunk, part of 32 columns, lane, bytes -> tile, chunk, half, row, lane, part, bytes
    codes = data.view(tiles, 2, 8, chunks, parts, 4, bits).permute(0, 3, 1, 2, 5, 4, 6).reshape(tiles, chunks, TILE * CHUNK_BYTES)
    blocks = 1 if group == 0 else columns // max(chunk, group)
    each = 1 if group == 0 else max(1, chunk // group)
    scale = pad(torch.from_numpy(rows.scale).to(device), (0, blocks * each - groups, 0, tiles * TILE - n))
    return codes.contiguous(), scale.view(tiles, TILE, blocks, each).transpose(1, 2).contiguous(), bits, group
