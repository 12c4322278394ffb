"""The models that hold a head: the whole head, with and without full-width logits, and each stage alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from flashhead_edge.export.dialects import Dialect
from flashhead_edge.export.genai import last_hidden
from flashhead_edge.export.graph import DOMAIN, DOMAIN_VERSION, Function, Main, Ops
from flashhead_edge.export.head import HeadFunctions
from flashhead_edge.index import HeadIndex

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
STAGES = ("probe", "score", "rescore", "decode")
# of the stages' outputs: type, and what the second axis counts; nothing where there is one axis alone
STAGE_OUTPUTS: dict[str, tuple[ir.DataType, str]] = {
    "z": (FLOAT, "r"), "unit": (FLOAT, "one"), "clusters": (FLOAT, "K"), "opened": (INT64, "P"), "opened_valid": (BOOL, "P"), "kept": (BOOL, "K"),
    "opened_count": (FLOAT, ""), "probe_capped": (BOOL, ""), "scored_tokens": (INT64, "S"), "scores": (FLOAT, "S"), "scored": (BOOL, "S"),
    "tokens": (INT64, "W"), "valid": (BOOL, "W"), "scored_counts": (INT64, "codes"), "scored_capped": (BOOL, ""), "logits": (FLOAT, "W"),
    "token": (INT64, ""), "candidate_ids": (INT64, "W"), "candidate_logits": (FLOAT, "W"),
}  # fmt: skip


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
    scored = main.call(f.score_all if logits else f.score, *(probed[n] for n in ("z", "unit", "clusters", "opened", "opened_valid", "kept")))
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


def whole_decoder(body: ir.Model, f: HeadFunctions, index: HeadIndex, scale: float, softcap: float | None, metadata: dict[str, str]) -> ir.Model:
    """The body with its head: logits [B, 1, V] float32 of each row's last real token, scaled and capped as the model does, beside the cache."""
    model = body.clone()
    graph, main = model.graph, Main()
    op = main.ops
    hidden = next(v for v in graph.outputs if v.name == "hidden_states")
    last = last_hidden(op, hidden, next(v for v in graph.inputs if v.name == "attention_mask"))
    logits = add_head(main, last, f, index, logits=True).logits
    assert logits is not None
    if scale != 1.0:
        logits = op.Mul(logits, op.const(scale))
    if softcap is not None:
        logits = op.Mul(op.Tanh(op.Div(logits, op.const(softcap))), op.const(softcap))
    logits = op.Reshape(logits, op.ints(-1, 1, index.vocab_size))
    for node in op.nodes:
        if node.domain == "":
            node.name = f"head/{node.name}"
            for value in node.outputs:
                value.name = f"head/{value.name}"
    logits.name, logits.dtype, logits.shape = "logits", FLOAT, ir.Shape(("batch_size", 1, index.vocab_size))
    graph.extend(op.nodes)
    for name, value in main.initializers.items():
        graph.initializers.setdefault(name, value)
        if graph.initializers[name] is not value:  # the embedding of a tied model
            value.replace_all_uses_with(graph.initializers[name])
    graph.outputs[:] = [logits, *(v for v in graph.outputs if v is not hidden)]
    for function in main.functions.values():
        model.functions[function.identifier()] = function
    graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.metadata_props.update(metadata)
    return model


def stage_models(f: HeadFunctions, index: HeadIndex, dialect: Dialect, metadata: dict[str, str]) -> dict[str, ir.Model]:
    """Each stage alone: its function's own inputs and outputs."""
    z = ("N", index.hidden_size if index.rotation is None else index.rotation.columns + 1)
    items = {"tokens": (INT64, ("N", "W")), "logits": (FLOAT, ("N", "W")), "valid": (BOOL, ("N", "W"))}
    inputs: dict[str, dict[str, tuple[ir.DataType, tuple[Any, ...]]]] = {
        "probe": {"hidden_states": (FLOAT, ("N", index.hidden_size))},
        "score": {
            "z": (FLOAT, z), "unit": (FLOAT, ("N", 1)), "clusters": (FLOAT, ("N", index.n_clusters)), "opened": (INT64, ("N", "P")),
            "opened_valid": (BOOL, ("N", "P")), "kept": (BOOL, ("N", index.n_clusters)),
        },
        "rescore": {"hidden_states": (FLOAT, ("N", index.hidden_size)), "tokens": (INT64, ("N", "W"))},
        "decode": items,
    }  # fmt: skip
    return {name: _stage_model(name, getattr(f, name), inputs[name], dialect, metadata) for name in STAGES}


def _stage_model(name: str, f: Function, inputs: dict[str, tuple[ir.DataType, tuple[Any, ...]]], dialect: Dialect, metadata: dict[str, str]) -> ir.Model:
    main = Main()
    values = {n: ir.val(n, dtype=dtype, shape=shape) for n, (dtype, shape) in inputs.items()}
    found = main.call(f, *values.values())
    outputs = []
    for key, value in found.items():
        dtype, second = STAGE_OUTPUTS[key]
        outputs.append(_named(main.ops, key, value, dtype, "N", *([second] if second else [])))
    return main.model(name, list(values.values()), outputs, dialect.imports, metadata | {"flashhead.part": name})


def _named(op: Ops, name: str, value: ir.Value, dtype: ir.DataType, *shape: Any) -> ir.Value:
    """A graph's output of that name, type and shape."""
    out = op.Identity(value)
    out.name, out.dtype, out.shape = name, dtype, ir.Shape(shape)
    return out  # type: ignore[no-any-return]
