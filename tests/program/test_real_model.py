"""A real model: SmolLM2-135M's GGUF, its Q4_1 matrices with zero points for the kernels, against transformers' model of the very values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_heads import few_probes
from small_programs import ORIN, ProgramInterpreter, nearest, states_of, values_of

from flashhead_edge.packed import Coded4, open_weights
from flashhead_edge.program.build import build_program
from flashhead_edge.program.file import write_program
from flashhead_edge.program.recoding import MINIMA, with_zeros

FILE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashhead-edge" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PIECES = [40, 20, 1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not FILE.is_file(), reason="needs the model's file in the cache, where make demo fetches it")
def test_real_model_has_transformers_states(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = open_weights(FILE)
    rows = weights.rows("model.embed_tokens.weight", 0, 49152)
    index = few_probes(torch.from_numpy(rows), 16, fingerprint="sha256:" + "0" * 64)
    built = build_program(weights, weights.config, index, precision="float16", context=128, group=32, device=ORIN)
    assert len(built.notices) == 1 and built.notices[0].startswith("210 matrices (") and built.notices[0].endswith(MINIMA)
    program = write_program(tmp_path / "program", built, ORIN, {})
    model: Any = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 49152, (1, sum(PIECES)))
    before = states_of(model, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                code = weights.linear(name.removesuffix(".weight"))
                assert isinstance(code, Coded4)
                fine = with_zeros(code)
                parameter.copy_(torch.from_numpy(values_of(fine.codes, nearest(fine.scales), fine.zeros)))
            else:
                parameter.copy_(torch.from_numpy(nearest(parameter.numpy())))
    want = states_of(model, ids)
    found = ProgramInterpreter(program).decode(ids, PIECES)
    # values up to 50, float32 sums of up to 1,536 terms in another order through 30 layers: 1.8e-4 was measured; the zero points' sixteenths move more
    assert np.abs(found - want).max() < 1e-3 < np.abs(before - want).max()
