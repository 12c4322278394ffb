"""Programs of every family against transformers' own models of the same values, and what is coded anew or refused. No GPU: the nodes run in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_programs import MODELS, ProgramInterpreter, program_of, small_model, states_of

LENGTHS = [20, 15, 1, 1, 1, 1, 1]  # a prompt longer than the window of 16, a piece onto its cache, and steps of one token
ROUNDING = 3e-5  # of values about 4, after three layers of float32 sums of up to 256 terms in another order


def ids_of(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 120, (batch, sum(LENGTHS)))


def error_of(folder: Path, model: Any, weights: Any, **options: Any) -> float:
    """The largest difference of hidden states."""
    program = program_of(folder / "program", model, weights, **options)
    return float(np.abs(ProgramInterpreter(program).decode(ids_of(), LENGTHS) - states_of(model, ids_of())).max())


@pytest.mark.parametrize("family", MODELS)
def test_family_has_transformers_states(family: str, tmp_path: Path) -> None:
    model, weights = small_model(family)
    error = error_of(tmp_path, model, weights)
    assert error < ROUNDING
