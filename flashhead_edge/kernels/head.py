"""A head on an NVIDIA GPU through the head-step kernel: an implementation of the `Head` protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flashhead_edge.head import Step
from flashhead_edge.index import HeadIndex
from flashhead_edge.kernels.ops import HALVES, head_step
from flashhead_edge.kernels.packing import Packed, Plan, pack, plan
from flashhead_edge.reference import TorchHead, torch_head

MOST_ROWS = 32  # of one launch; more are split
STATIC_SHARED = 8 << 10  # shared memory that the kernel declares itself, at most


@dataclass(frozen=True, eq=False)
class CudaHead:
    """A packed head on a device, beside the model's own matrix (never a copy of it)."""

    index: HeadIndex
    weight: Tensor  # [V or more, d] float16 or bfloat16
    bias: Tensor | None
    packed: Packed
    image: Tensor  # [bytes] uint8
    multiprocessors: int
    shared_bytes: int  # dynamic shared memory that a block may have
    architecture: str
    plans: dict[int, tuple[Plan, Tensor]] = field(default_factory=dict)  # by rows: launch plan and its workspace

    def launch(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`ops.head_step` of 1 to 32 hidden states: what a CUDA graph captures (after one call outside of it)."""
        rows = len(hidden)
        if rows not in self.plans:
            made = plan(self.packed, self.multiprocessors, self.shared_bytes, rows)
            self.plans[rows] = made, torch.zeros(rows * made.row_bytes, dtype=torch.uint8, device=self.weight.device)
        made, workspace = self.plans[rows]
        return head_step(hidden, self.weight, self.bias, self.image, workspace, made.words(), made.shared_bytes, self.architecture)

    def step(self, hidden: Tensor) -> Step:
        hidden = hidden if hidden.dtype in HALVES else hidden.to(self.weight.dtype)
        return joined([packed_step(*self.launch(part.contiguous())) for part in hidden.split(MOST_ROWS)])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.wide.logits(hidden)

    def step_with_logits(self, hidden: Tensor) -> tuple[Step, Tensor]:
        """The step of the kernel, and the full-width logits of the reference on the same device."""
        return self.step(hidden), self.wide.logits(hidden)

    @cached_property
    def wide(self) -> TorchHead:
        """The reference on this device: full-width logits have no kernel."""
        return torch_head(self.index, self.weight, self.bias)


def cuda_head(
    index: HeadIndex,
    weight: Tensor,
    bias: Tensor | None = None,
    multiprocessors: int | None = None,
    shared_bytes: int | None = None,
    architecture: str | None = None,
) -> CudaHead:
    """Put `index` on the GPU of `weight` [V or more, d], the model's own matrix in float16 or bfloat16.

    Args:
        multiprocessors, shared_bytes, architecture: a smaller device to plan and compile for; by default those found.
    Raises:
        DeviceError: the index holds a code without a kernel, or the kernel does not fit the device.
    """
    properties = torch.cuda.get_device_properties(weight.device)
    packed = pack(index)
    return CudaHead(
        index=index,
        weight=weight,
        bias=bias,
        packed=packed,
        image=torch.from_numpy(packed.image).to(weight.device),
        multiprocessors=multiprocessors or properties.multi_processor_count,
        shared_bytes=shared_bytes or properties.shared_memory_per_block_optin - STATIC_SHARED,
        architecture=architecture or f"sm_{properties.major}{properties.minor}",
    )


def packed_step(token: Tensor, counts: Tensor, capped: Tensor, ids: Tensor, logits: Tensor) -> Step:
    """What the kernel wrote as callers see it: candidates in the order of their ids."""
    width = int(counts[:, -1].max()) if len(counts) else 0
    there = torch.arange(width, device=ids.device) < counts[:, -1:]
    order = ids[:, :width].masked_fill(~there, torch.iinfo(torch.int64).max).sort(1)
    found = logits[:, :width].gather(1, order.indices)
    return Step(token, order.values.masked_fill(~there, -1), found.masked_fill(~there, -torch.inf), counts, capped)


def joined(steps: list[Step]) -> Step:
    """Steps of parts of a batch as one."""
    if len(steps) == 1:
        return steps[0]
    width = max(s.ids.shape[1] for s in steps)
    pad = torch.nn.functional.pad
    return Step(
        torch.cat([s.token for s in steps]),
        torch.cat([pad(s.ids, (0, width - s.ids.shape[1]), value=-1) for s in steps]),
        torch.cat([pad(s.logits, (0, width - s.logits.shape[1]), value=-torch.inf) for s in steps]),
        torch.cat([s.counts for s in steps]),
        torch.cat([s.capped for s in steps]),
    )
