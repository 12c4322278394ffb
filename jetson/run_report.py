"""What a run says of itself: tokens a second, the wait for the first, joules a token, the share of the memory's bandwidth, the head's share.

Power is what `board_telemetry` reads, bandwidth what the module or NVML names, bytes come from the model's headers: each is None where it is
not known, and `unknown` says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_edge.errors import FlashHeadError, first_line
from flashhead_edge.jetson.board import Board, read_board
from flashhead_edge.jetson.board_telemetry import Sample, joules, recorded, sample

if TYPE_CHECKING:
    from flashhead_edge.generation import Summary
    from flashhead_edge.jetson.plan import Need

INTERVAL = 0.25  # seconds between two looks at the power
NANO_FAST = ("MAXN_SUPER", "25W")  # power modes in which an Orin Nano 8 GB has the memory clock of the Super: 102 GB/s instead of 68
NANO_SUPER = 102.0


@dataclass(frozen=True)
class RunReport:
    """Figures of one run. Shares are 0 to 1."""

    tokens_per_second: float | None  # after the first token; None: there was only one
    seconds_to_first_token: float
    joules: float | None  # of the whole run, the prompt included
    joules_per_token: float | None
    power_scope: str | None  # what of the machine those joules are of
    bytes_per_token: int | None  # of memory, that a token reads at least: weights, cache, head; predicted from headers
    bandwidth: float | None  # GB/s, as specified
    bandwidth_share: float | None  # of it, that those bytes took
    head_share_of_bytes: float | None
    head_share_of_time: float | None  # measured where body and head are two calls on a CPU
    unknown: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def power_recorded(root: str | Path = "/") -> Iterator[list[Sample]]:
    """The samples of what happens inside, for `run_report`; where nothing tells the power, one look and no thread."""
    first = sample(root)
    if first.power is None:
        yield [first]
    else:
        with recorded(root, INTERVAL) as taken:
            yield taken


def run_report(
    model: Path, summary: Summary, taken: Sequence[Sample], end: float, *, head_seconds: float | None = None, gpu: bool = False, need: Need | None = None
) -> RunReport:  # fmt: skip
    """The figures of a run.

    Args:
        model: its folder.
        taken: from `power_recorded`, which has ended.
        end: when the last token was there, by `time.monotonic`.
        head_seconds: time in the head, where it was measured.
        gpu: a checkpoint ran on a GPU, in 16 bits.
        need: what the model takes where it runs, where that is known better than from its folder.
    """
    unknown: dict[str, str] = {}
    many = summary.tokens > 1
    energy = joules(taken, end - summary.seconds, end)
    if energy is None:
        unknown["joules_per_token"] = (
            "no rail and no NVML tells the power" if all(s.power is None for s in taken) else "the run was too short for a look at the power"
        )
    size = _bytes(model, summary, gpu, need, unknown)
    bandwidth = bandwidth_of(read_board(), taken[0].gpus)
    if bandwidth is None:
        unknown["bandwidth_share"] = "the memory's bandwidth is not known: no Jetson that this version knows, no GPU by NVML"
    return RunReport(
        tokens_per_second=summary.tokens_per_second if many else None,
        seconds_to_first_token=summary.seconds_to_first_token,
        joules=energy,
        joules_per_token=None if energy is None or not summary.tokens else energy / summary.tokens,
        power_scope=None if energy is None else next((s.power_scope for s in taken if s.power_scope), None),
        bytes_per_token=size,
        bandwidth=bandwidth,
        bandwidth_share=None if size is None or bandwidth is None or not many else size * summary.tokens_per_second / (bandwidth * 1e9),
        head_share_of_bytes=None if not size else summary.bytes_per_step / size,
        head_share_of_time=None if head_seconds is None or not summary.seconds else head_seconds / summary.seconds,
        unknown=unknown,
    )


def _bytes(model: Path, summary: Summary, gpu: bool, need: Need | None, unknown: dict[str, str]) -> int | None:
    from flashhead_edge.jetson.plan_sources import need_of

    if summary.exact or summary.passes:
        unknown["bytes_per_token"] = "a pass of the body made several tokens"
        return None
    try:
        need = need or need_of(model, gpu=gpu)
    except FlashHeadError as error:  # the run itself went well: a figure less, with its reason
        unknown["bytes_per_token"] = first_line(error)
        return None
    positions = summary.prompt_tokens + summary.tokens // 2  # of the token in the middle
    cache = sum(layer.per_position * min(positions, layer.window or positions) for layer in need.layers)
    return int(need.weights - need.tables + cache + summary.bytes_per_step)


def bandwidth_of(board: Board, gpus: Sequence[dict[str, object]] = ()) -> float | None:
    """GB/s that the memory is specified with: of a known module, else of the one GPU that NVML sees; None where neither is known."""
    if board.module is not None:
        mode = board.power_mode.name if board.power_mode else None
        return NANO_SUPER if board.module.key == "orin-nano-8gb" and mode in NANO_FAST else board.module.bandwidth
    found = [g["bandwidth"] for g in gpus if isinstance(g.get("bandwidth"), float)]
    return float(found[0]) if len(found) == 1 and isinstance(found[0], float) else None
