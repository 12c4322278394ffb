"""A model of a decode step's time on the CUDA backend: the bytes that it reads, the codes that it decodes, the phases that wait for each other.

    microseconds = max(bytes / bandwidth, stretch * codes / rate) + phase * phases

A phase is what cannot begin before all of another is known, to the last block: a product, a norm in front of one, the parts of an attention, an exchange
inside the head. Products are held by whichever is slower, memory or what else grows with the codes, of which `rate` is a measured beginning
(docs/kernels.md) and `stretch` is fitted; everything in a small model is held by its phases, whatever they compute. On an H100
bytes are the faster part: an H200, whose memory brings a third more, takes as long. The two parameters are fitted on two shapes
of one device and say the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashhead_edge.bench.cuda import CACHED, models
from flashhead_edge.errors import SettingsError

HEAD_PHASES = 20  # block-wide waits of a head step (docs/kernels.md)
END_PHASES = 4  # embedding, last norm, the step's end, the mail to the host
HEAD_SHARE = 0.02  # of a dense head's bytes in 16 bits that a calibrated head reads on the average (docs/benchmarks.md: 0.013 to 0.04)
CODES_A_TICK = 4 * 1024 / 135  # of a multiprocessor, bf16: docs/kernels.md, "A decoder layer in five launches"
LAYER_PHASES = 9  # q, k, v 2 (norm, product); attention 3 (rotation, a warp's positions, their merging); o 1; gate and up 2; down 1


@dataclass(frozen=True)
class Step:
    """What a step of one text costs whatever runs it."""

    bytes: float  # codes, scales, cached positions and the head's
    phases: int
    codes: int  # of the body's matrices


@dataclass(frozen=True)
class Card:
    """What a device has of what a step needs."""

    bandwidth: float  # of a copy, bytes a second
    multiprocessors: int
    gigahertz: float

    @property
    def codes_a_microsecond(self) -> float:
        return CODES_A_TICK * self.multiprocessors * self.gigahertz * 1e3


@dataclass(frozen=True)
class Fit:
    """Of one device."""

    stretch: float  # of codes over their rate
    phase: float  # us

    def microseconds(self, step: Step, card: Card) -> float:
        return max(step.bytes / card.bandwidth * 1e6, self.stretch * step.codes / card.codes_a_microsecond) + self.phase * step.phases


def step_of(name: str, cached: int = CACHED) -> Step:
    """A step of a made model (bench.cuda.models), W4A16.

    Raises:
        SettingsError: there is no such model.
    """
    if name not in models():
        raise SettingsError(f"step model: {name!r}, expected one of {', '.join(models())}; choose one of these")
    model, vocab, group = models()[name]
    heads, pairs = model.q_heads * model.head_size, model.kv_heads * model.head_size
    codes = model.hidden * (heads + 2 * pairs) + heads * model.hidden + 3 * model.hidden * model.intermediate
    cache = 2 * 2 * cached * pairs
    each = LAYER_PHASES + model.head_norms + 2 * model.post_norms
    return Step(
        model.layers * (codes / 2 + 2 * codes / group + cache) + HEAD_SHARE * 2 * vocab * model.hidden,
        model.layers * each + HEAD_PHASES + END_PHASES,
        model.layers * codes,
    )


def fitted(measured: Sequence[tuple[Step, float]], card: Card) -> Fit:
    """By least squares of relative errors, where instructions are slower than memory; two steps are met exactly.

    Args:
        measured: steps and what they took, us.

    Raises:
        SettingsError: fewer than two, or such that the two parameters cannot be told apart, or memory is the slower by them.
    """
    rows = np.array([[step.codes / card.codes_a_microsecond / us, step.phases / us] for step, us in measured], np.float64).reshape(-1, 2)
    if len(rows) < 2 or np.linalg.matrix_rank(rows, 1e-6) < 2:
        raise SettingsError(f"step model: {len(rows)} steps to fit, expected two or more of different shapes; measure another")
    stretch, phase = (float(x) for x in np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0])
    largest = max((step for step, _ in measured), key=lambda step: step.bytes)
    if stretch * largest.codes / card.codes_a_microsecond < largest.bytes / card.bandwidth * 1e6:
        raise SettingsError(f"step model: codes stretched {stretch:.2f} times take less than their bytes, expected more; fit on a device with more bandwidth")
    return Fit(stretch, phase)


def compared(records: Sequence[Any], fit_on: Sequence[str], card: Card, fit: Fit | None = None) -> tuple[Fit, list[dict[str, Any]]]:
    """Measured beside predicted, by records of `bench decode` (flashhead_edge.records); fit: of another device, else fitted here on `fit_on`.

    Raises:
        SettingsError: a shape to fit on was not measured.
    """
    ours = [r for r in records if r["batch"] == 1 and r["head"] == "FlashHead"]
    steps = {r["model"]: (step_of(r["model"], r["context"]), float(r["microseconds"]["median"])) for r in ours}
    if missing := [name for name in fit_on if name not in steps]:
        raise SettingsError(f"step model: {', '.join(missing)} is not among {', '.join(steps)}, expected the shapes to fit on; measure it")
    fit = fit or fitted([steps[name] for name in fit_on], card)
    rows = []
    for name, (step, us) in steps.items():
        said = fit.microseconds(step, card)
        rows.append({"model": name, "fitted_on": name in fit_on, "measured": us, "predicted": round(said, 1), "off": round(said / us - 1, 4)})
    return fit, rows
