"""From files to states: model folders as tools write them, read by `packed`, built, written and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_heads import everything_open
from small_programs import CONTEXT, ORIN, ProgramInterpreter, put_codes, small_model, states_of

from flashhead_edge.checkpoint.tensors import pack_arrays
from flashhead_edge.packed import Coded4, open_weights
from flashhead_edge.packed.coded import unpaired
from flashhead_edge.program.build import build_program
from flashhead_edge.program.file import write_program

ROUNDING = 3e-5  # as in test_build


def words(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K] as [N, K / 8] int32, the first in the lowest bits."""
    return (codes.astype(np.uint32).reshape(len(codes), -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


def gptq(stem: str, code: Coded4) -> dict[str, np.ndarray]:
    """A matrix as GPTQ's first version stores it: zero points one lower, and for each input the group that it was quantised in (act-order)."""
    codes, groups = unpaired(code.codes), np.arange(2 * code.codes.shape[1]) // code.group
    if code.order is not None:
        codes, groups = codes[:, np.argsort(code.order)], groups[np.argsort(code.order)]
    zeros = np.full(code.scales.shape, 8, np.uint8) if code.zeros is None else code.zeros
    return {
        f"{stem}.qweight": np.ascontiguousarray(words(codes).T), f"{stem}.scales": np.ascontiguousarray(code.scales.T).astype(np.float16),
        f"{stem}.qzeros": words(np.ascontiguousarray(zeros.T) - 1), f"{stem}.g_idx": groups.astype(np.int32),
    }  # fmt: skip


def compressed(stem: str, code: Coded4) -> dict[str, np.ndarray]:
    """A matrix as `flashhead quantize` and llm-compressor store it under a config that is not symmetric: all have packed zero points."""
    n, k = unpaired(code.codes).shape
    parts = {"weight_packed": words(unpaired(code.codes)), "weight_scale": code.scales.astype(np.float16), "weight_shape": np.array([n, k], np.int64)}
    zeros = np.full(code.scales.shape, 8, np.uint8) if code.zeros is None else code.zeros
    parts["weight_zero_point"] = np.ascontiguousarray(words(np.ascontiguousarray(zeros.T)).T)
    return {f"{stem}.{name}": part for name, part in parts.items()}


def shared_group(code: Coded4, order: np.ndarray | None) -> Coded4:
    """The same matrix in groups of 32, which one config can say of all, its inputs in an order."""
    times = code.group // 32
    return Coded4(code.codes, code.scales.repeat(times, 1), None if code.zeros is None else code.zeros.repeat(times, 1), None, 32, order)


SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}}
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_vl"])
def test_folder_of_4_bits_has_the_states_of_its_values(family: str, scheme: str, tmp_path: Path) -> None:
    """Not a bit is coded anew: GPTQ's order of down's inputs goes into the rows before them."""
    model, weights = small_model(family)
    store, about = SCHEMES[scheme]
    order = np.random.default_rng(3).permutation(192)
    codes = {
        name: shared_group(code, order if scheme == "gptq" and name.endswith("down_proj") else None)
        for name, code in weights.coded.items()
        if isinstance(code, Coded4)
    }
    put_codes(model, codes)
    tensors = dict(weights.arrays)
    for name, code in codes.items():
        tensors |= store(name, code)
    if family == "qwen3_vl":
        tensors = {name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": about}))
    (folder / "model.safetensors").write_bytes(b"".join(pack_arrays(tensors)))
    with open_weights(folder) as opened:
        index = everything_open(torch.from_numpy(weights.arrays["lm_head.weight"]))
        built = build_program(opened, opened.config, index, precision="float16", context=CONTEXT, group=64, device=ORIN)
        assert built.notices == ()
        program = write_program(tmp_path / "program", built, ORIN, {})
    ids = np.random.default_rng(0).integers(3, 120, (2, 24))
    assert np.abs(ProgramInterpreter(program).decode(ids, [20, 1, 1, 1, 1]) - states_of(model, ids)).max() < ROUNDING
