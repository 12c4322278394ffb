"""The models that hold a head: the whole head, with and without full-width logits, and each stage alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.dialects import Dialect
from flashhead_edge.export.graph import Function, Main, Ops
from flashhead_edge.export.head import HeadFunctions
from flashhead_edge.index import HeadIndex

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
STAGES = ("probe", "score", "rescore", "decode")


@dataclass(frozen=True, eq=False)
class StepValues:
    """What a step of the head computes inside a graph."""

    token: ir.Value
    candidate_ids: ir.Value
    candidate_logits: ir.Value
    counts: ir.Value
    capped: ir.Value
    logits: ir.Value | None


def add_head(main: Main, hidden: ir.Value, f: HeadFunctions, index: HeadIndex, logits: bool) -> StepValues:
    """Call the stages on hidden states [N, d]."""
    op = main.ops
    probed = main.call(f.probe, hidden)
    scored = main.call(f.score, *(probed[n] for n in ("z", "unit", "clusters", "opened", "opened_valid", "kept")))
    exact = main.call(f.rescore, hidden, scored["tokens"])["logits"]
    found = main.call(f.decode, scored["tokens"], exact, scored["valid"])
    wide = None
    if logits:
        some = [scored.get(n, scored[m]) for n, m in (("scored_tokens", "tokens"), ("scores", "valid"), ("scored", "valid"))]
        wide = main.call(f.widen, probed["clusters"], *some, scored["tokens"], exact, scored["valid"])["logits"]
    opened = op.Cast(op.Min(probed["opened_count"], op.const(float(index.probe.cap))), to=INT64)
    counts = op.Concat(op.Unsqueeze(opened, op.ints(1)), scored["scored_counts"], axis=1)
    capped = probed["probe_capped"]
    if "scored_capped" in scored:
        capped = op.Or(capped, scored["scored_capped"])
    return StepValues(found["token"], found["candidate_ids"], found["candidate_logits"], counts, capped, wide)


def head_model(f: HeadFunctions, index: HeadIndex, dialect: Dialect, metadata: dict[str, str], *, logits: bool) -> ir.Model:
    """hidden_states [N, d] float32 -> token, candidate_ids, candidate_logits, counts, capped (see `head.Step`), and logits [N, V]."""
    main = Main()
    hidden = ir.val("hidden_states", dtype=FLOAT, shape=("N", index.hidden_size))
    step = add_head(main, hidden, f, index, logits)
    outputs = [
        _named(main.ops, "token", step.token, INT64, "N"),
        _named(main.ops, "candidate_ids", step.candidate_ids, INT64, "N", "C"),
        _named(main.ops, "candidate_logits", step.candidate_logits, FLOAT, "N", "C"),
        _named(main.ops, "counts", step.counts, INT64, "N", 2 + len(index.stages)),
        _named(main.ops, "capped", step.capped, BOOL, "N"),
    ]
    if step.logits is not None:
        outputs.append(_named(main.ops, "logits", step.logits, FLOAT, "N", index.vocab_size))
    return main.model("head", [hidden], outputs, dialect.imports, metadata)


def rescore_model(f: HeadFunctions, index: HeadIndex, dialect: Dialect, metadata: dict[str, str]) -> ir.Model:
    """hidden_states [N, d] float32, tokens [M] int64 -> their exact logits [N, M] float32."""
    main = Main()
    hidden = ir.val("hidden_states", dtype=FLOAT, shape=("N", index.hidden_size))
    tokens = ir.val("tokens", dtype=INT64, shape=("M",))
    logits = main.call(f.rescore, hidden, main.ops.Unsqueeze(tokens, main.ops.ints(0)))["logits"]
    return main.model("rescore", [hidden, tokens], [_named(main.ops, "logits", logits, FLOAT, "N", "M")], dialect.imports, metadata)


def stage_model(name: str, f: Function, inputs: dict[str, tuple[ir.DataType, tuple[Any, ...]]], dialect: Dialect, metadata: dict[str, str]) -> ir.Model:
    """One function alone: its own inputs by type and shape, its arrays as initializers."""
    main = Main()
    values = {n: ir.val(n, dtype=dtype, shape=shape) for n, (dtype, shape) in inputs.items()}
    found = main.call(f, *values.values())
    outputs = [main.ops.Identity(value) for value in found.values()]
    for key, value in zip(found, outputs):
        value.name = key
    return main.model(name, list(values.values()), outputs, dialect.imports, metadata)


def _named(op: Ops, name: str, value: ir.Value, dtype: ir.DataType, *shape: Any) -> ir.Value:
    """A graph's output of that name, type and shape."""
    out = op.Identity(value)
    out.name, out.dtype, out.shape = name, dtype, ir.Shape(shape)
    return out  # type: ignore[no-any-return]


def as_array(weight: Any) -> np.ndarray:
    """A torch matrix in its own type as numpy knows it: bfloat16 through its bits."""
    import ml_dtypes
    import torch

    weight = weight.detach().cpu().contiguous()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()  # type: ignore[no-any-return]
