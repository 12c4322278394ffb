"""A head on an NVIDIA GPU through the head-step kernel: an implementation of the `Head` protocol."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.head import Step
from flashhead_edge.index import HeadIndex
from flashhead_edge.kernels.build import Prepared, architecture_of
from flashhead_edge.kernels.crossover import KINDS, stored_crossover
from flashhead_edge.kernels.ops import HALVES, check_step, head_logits, head_step, head_step_out, prepare_step, prepare_widen, widen_arguments
from flashhead_edge.kernels.packing import STATIC_SHARED, Arguments, Layout, Widen, pack, plans, words_of

MOST_ROWS = 32  # of one launch; more are split
UNMEASURED = 8  # crossover where none was measured: none of those measured on an H100 (8 to 27) was lower
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CudaHead:
    """A packed head on a device, beside the model's own matrix (never a copy of it)."""

    index: HeadIndex
    weight: Tensor  # [V or more, d] float16 or bfloat16
    bias: Tensor | None
    image: Tensor  # [bytes] uint8
    plans: list[Layout]  # of launches of 1, 2, ... MOST_ROWS states
    words: list[list[int]]  # of these, as operators carry them and torch.compile can trace them
    workspace: Tensor  # [bytes] uint8, of all plans: one stream at a time
    architecture: str
    dense_from: int | None = None  # batch from which on the dense head is taken; None: never
    logits_dense_from: int | None = None  # likewise of full-width logits

    def launch(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`ops.head_step` of 1 to 32 hidden states: what a CUDA graph captures (after one call outside of it)."""
        return head_step(*self.arguments(hidden))

    def launch_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `launch`, of `ops.head_logits`."""
        return head_logits(*self.arguments(hidden))

    def arguments(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, list[int], str]:
        """Of either operator for 1 to 32 hidden states."""
        return hidden, self.weight, self.bias, self.image, self.workspace, self.words[max(1, len(hidden)) - 1], self.architecture

    def token(self, hidden: Tensor) -> Tensor:
        """Greedy tokens [N] int64 alone, of any number of states; captured by CUDA graphs as `launch` is."""
        hidden = hidden if hidden.dtype in HALVES else hidden.to(self.weight.dtype)
        if self.takes_dense(len(hidden)):
            return self.dense_logits(hidden).argmax(1)
        tokens = [self.launch(part.contiguous())[0] for part in hidden.split(MOST_ROWS)]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def step(self, hidden: Tensor) -> Step:
        hidden = hidden if hidden.dtype in HALVES else hidden.to(self.weight.dtype)
        if self.takes_dense(len(hidden)):
            return dense_step(self.dense_logits(hidden), 2 + len(self.index.stages))
        return joined([packed_step(*self.launch(part.contiguous())) for part in hidden.split(MOST_ROWS)])

    def wide_logits(self, hidden: Tensor) -> Tensor:
        """Full-width logits [N, V] alone, of any number of states; captured by CUDA graphs as `launch` is."""
        hidden = hidden if hidden.dtype in HALVES else hidden.to(self.weight.dtype)
        if self.takes_dense(len(hidden), logits=True):
            return self.dense_logits(hidden)
        found = [self.launch_logits(part.contiguous())[5] for part in hidden.split(MOST_ROWS)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def takes_dense(self, batch: int, logits: bool = False) -> bool:
        """Whether a step of this batch is the dense head's, or one that gives full-width logits."""
        least = self.logits_dense_from if logits else self.dense_from
        return least is not None and batch >= least

    def dense_logits(self, hidden: Tensor) -> Tensor:
        """The dense head as the model computes it, in the rows' own precision: [N, V]."""
        v, hidden = self.index.vocab_size, hidden.to(self.weight.dtype)
        return hidden @ self.weight[:v].T if self.bias is None else torch.addmm(self.bias[:v], hidden, self.weight[:v].T)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.step_with_logits(hidden)[1]

    def step_with_logits(self, hidden: Tensor) -> tuple[Step, Tensor]:
        hidden = hidden if hidden.dtype in HALVES else hidden.to(self.weight.dtype)
        if self.takes_dense(len(hidden), logits=True):
            logits = self.dense_logits(hidden).float()
            return dense_step(logits, 2 + len(self.index.stages)), logits
        found = [self.launch_logits(part.contiguous()) for part in hidden.split(MOST_ROWS)]
        return joined([packed_step(*f[:5]) for f in found]), torch.cat([f[5] for f in found])


Preparer = Callable[[torch.Size, torch.dtype, torch.device], tuple[Arguments, Prepared]]


def step_preparer(head: CudaHead, out: tuple[Tensor, ...], width: int, totals: Tensor | None) -> Preparer:
    """Steps with everything prepared but `hidden` and what is written freshly each time, by shape, type and device of the states.

    Args:
        out: what `head_step_out` made, for MOST_ROWS states.
        width, totals: as in `logits_launcher`.
    Raises (when called):
        SettingsError: more states than a launch takes, or none.
    """

    @functools.cache
    def prepared(shape: torch.Size, dtype: torch.dtype, place: torch.device) -> tuple[Arguments, Prepared]:
        rows = shape[0]
        if not 1 <= rows <= MOST_ROWS:
            raise SettingsError(f"head: {rows} states were given, expected 1 to {MOST_ROWS}; split the batch")
        plan, device = head.plans[rows - 1], head.weight.device
        check_step(torch.empty(shape, dtype=dtype, device=place), head.weight, head.bias, head.image, head.workspace, plan)
        step = Arguments(
            None, *(None if t is None else t.data_ptr() for t in (head.weight, head.bias, head.image, head.workspace, *out, None, totals)),
            rows, dtype == torch.bfloat16, head.weight.dtype == torch.bfloat16, width, plan,
        )  # fmt: skip
        with torch.cuda.device(device):
            return step, prepare_step(step, head.architecture, device.index)

    return prepared


def token_launcher(head: CudaHead, totals: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Greedy tokens at the least host time, one launch: as `logits_launcher`, of tokens [N] int64."""
    device = head.weight.device
    out = head_step_out(head.weight[:MOST_ROWS], len(head.index.stages), head.plans[0].candidates)
    prepared = step_preparer(head, out, head.index.vocab_size, totals)

    def run(hidden: Tensor) -> Tensor:
        step, launch = prepared(hidden.shape, hidden.dtype, hidden.device)
        token = torch.empty(len(hidden), dtype=torch.int64, device=device)
        hidden = hidden.contiguous()
        step.hidden, step.token = hidden.data_ptr(), token.data_ptr()
        launch(torch.cuda.current_stream(device).cuda_stream)
        return token

    return run


def logits_launcher(head: CudaHead, width: int, totals: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Full-width logits at the least host time: what a server calls at every step, from Python, outside of any graph.

    Everything but two addresses is prepared, and a step is two launches. Other outputs go into memory of the launcher's own.

    Args:
        width: columns of the logits, V or more; those beyond V are `FLASHHEAD_PADDING` of head_step.h.
        totals: [4] int64 on the device, grows by states, clusters opened, rows scored exactly and states that a cap cut; None: not counted.
    Returns:
        A function of hidden states [N, d] in 16 bits, N from 1 to 32: logits [N, width] float32 in memory that nobody else holds. Captured by CUDA graphs.
    """
    device = head.weight.device
    out = head_step_out(head.weight[:MOST_ROWS], len(head.index.stages), head.plans[0].candidates)
    prepared = step_preparer(head, out, width, totals)

    @functools.cache
    def widening(rows: int) -> tuple[Widen, Prepared]:
        plan = head.plans[rows - 1]
        widen = widen_arguments(out, head.image, head.workspace, plan, width)
        widen.rows = rows
        with torch.cuda.device(device):
            return widen, prepare_widen(widen, plan.multiprocessors, head.architecture, device.index)

    def run(hidden: Tensor) -> Tensor:
        rows = len(hidden)
        step, first = prepared(hidden.shape, hidden.dtype, hidden.device)
        widen, second = widening(rows)
        wide = torch.empty(rows, width, dtype=torch.float32, device=device)
        hidden = hidden.contiguous()
        step.hidden = hidden.data_ptr()
        step.wide = widen.wide = wide.data_ptr()
        stream = torch.cuda.current_stream(device).cuda_stream
        first(stream)
        second(stream)
        return wide

    return run


def cuda_head(
    index: HeadIndex,
    weight: Tensor,
    bias: Tensor | None = None,
    multiprocessors: int | None = None,
    shared_bytes: int | None = None,
    architecture: str | None = None,
    choice: Literal["flash", "auto"] = "flash",
) -> CudaHead:
    """Put `index` on the GPU of `weight` [V or more, d], the model's own matrix in float16 or bfloat16.

    Args:
        choice: ``auto`` takes the dense head for batches at or above the crossover that `flashhead bench head OUT --store` kept for this device and head,
            and says so in the log; where none is kept it takes it from 8 on, and says that.
        multiprocessors, shared_bytes (that a block may have in all), architecture: a smaller device to plan and compile for; by default those found.
    Raises:
        DeviceError: the rows are in another type, the index holds a code without a kernel, or the kernel does not fit the device.
        SettingsError: another choice, or a damaged file of the crossover.
    """
    if choice not in ("flash", "auto"):
        raise SettingsError(f"cuda_head: choice is {choice!r}, expected 'flash' or 'auto'; call again with one of them")
    if weight.dtype not in HALVES:
        found = str(weight.dtype).removeprefix("torch.")
        raise DeviceError(
            f"head: its rows are {found}, expected float16 or bfloat16, which the CUDA kernels read; load a model whose head is stored in one of them"
        )
    properties = torch.cuda.get_device_properties(weight.device)
    packed = pack(index)
    least = chosen_crossovers(properties.name, index, weight) if choice == "auto" else dict.fromkeys(KINDS)
    shared = (shared_bytes or properties.shared_memory_per_block_optin) - STATIC_SHARED  # type: ignore[attr-defined]
    made = plans(packed, multiprocessors or properties.multi_processor_count, shared, MOST_ROWS)
    return CudaHead(
        index=index,
        weight=weight,
        bias=bias,
        image=torch.from_numpy(packed.image).to(weight.device),
        plans=made,
        words=[words_of(plan) for plan in made],
        workspace=torch.zeros(MOST_ROWS * made[0].row_bytes, dtype=torch.uint8, device=weight.device),
        architecture=architecture or architecture_of(weight.device),
        dense_from=least["tokens"],
        logits_dense_from=least["logits"],
    )


def chosen_crossovers(device: str, index: HeadIndex, weight: Tensor) -> dict[str, int | None]:
    """The crossovers that are kept for a head on a device, by `crossover.KINDS`, or a guess, said in the log; None is the flash head at every batch."""
    dtype = str(weight.dtype).removeprefix("torch.")
    stored = stored_crossover(device, index, dtype)
    shape = f"{index.vocab_size:,} x {index.hidden_size:,} ({dtype}) on {device}"
    if stored is None:
        LOG.warning(
            "auto: the dense head for batches of %d and more, a guess on the safe side: no crossover is kept for this head of %s; "
            "flashhead bench head OUT --store measures one", UNMEASURED, shape,
        )  # fmt: skip
        return dict.fromkeys(KINDS, UNMEASURED)
    found: dict[str, int | None] = stored["crossovers"]
    said = ("at no batch that was measured" if found[kind] is None else f"for batches of {found[kind]} and more" for kind in KINDS)
    LOG.info("auto: the dense head %s where tokens are wanted, %s where logits are, the flash head else, %s", *said, shape)
    return found


def dense_step(logits: Tensor, counted: int) -> Step:
    """A step of the dense head: every token is a candidate."""
    n, v = logits.shape
    counts = torch.zeros(n, counted, dtype=torch.int64, device=logits.device)
    counts[:, -1] = v
    ids = torch.arange(v, device=logits.device).expand(n, v)
    return Step(logits.argmax(1), ids, logits.float(), counts, torch.zeros(n, dtype=torch.bool, device=logits.device))


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
