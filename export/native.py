"""The head's step as one node of our own operator (jetson/native/head_step.c), for ONNX Runtime on a CPU.

The same values as in the models of standard operators, laid out for a loop over rows: matrices row after row in int8,
rows padded to 16 columns, the rotation a row a coordinate, a code's rows with their own numbers behind them. What has
the same layout there is the same initializer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.arrays import Grid, grid
from flashhead_edge.export.dialects import OPSET
from flashhead_edge.export.graph import Main, opset
from flashhead_edge.index import Gate, HeadIndex, own_error, slot_of_token

NATIVE_DOMAIN = "flashhead.native"
PAD = 16  # columns that the operator multiplies at a time
MOST_STAGES = 16  # that the operator has room for


def native_model(index: HeadIndex, rows: Any, bias: np.ndarray | None, metadata: dict[str, str]) -> ir.Model:
    """hidden_states [N, d] float32 -> token, candidate_ids, candidate_logits, counts, capped: see `head.Step`.

    Args:
        rows: the model's own matrix [V or more, d], float16, bfloat16 or float32: an array, or a tensor that is read when it is written.
        bias: [V or more] float32.
    """
    assert len(index.stages) <= MOST_STAGES
    main = Main()
    none = np.empty(0, np.float32)  # of an array that this head does not have

    def weight(name: str, array: Any) -> ir.Value:
        return main.initializer(f"head.{name}", array) if getattr(array, "size", 1) else main.initializer("head.native.none", none)

    columns, types, halves = [0], [int(ir.DataType.INT8)], [0.0]
    inputs = [
        weight("rows", rows),
        weight("bias", none if bias is None else bias),
        weight("native.token_of_slot", index.token_table.reshape(-1)),
        weight("native.always_slots", np.sort(slot_of_token(index)[index.always_scored]).astype(np.int32)),
    ]
    if index.rotation is not None and index.mean is not None:
        turn = grid(index.rotation)
        columns, types, halves = [index.hidden_size], [element_type(turn)], [turn.half]
        inputs += [
            weight("mean", index.mean),
            weight("native.rotation", by_rows(turn.whole.T)),
            weight("rotation.scale", none if turn.scale is None else turn.scale),
            weight("rotation.steps", turn.steps),
        ]
    else:
        inputs += [weight("mean", none)] * 4
    gates = [index.probe, *(s.gate for s in index.stages)]
    for i, coded in enumerate([index.centroids, *(s.rows for s in index.stages)]):
        code, name = grid(coded), f"stage{i}" if i else "centroids"
        columns.append(code.columns)
        types.append(element_type(code))
        halves.append(code.half)
        nearness = (1 / own_error(gates[i])).astype(np.float32)
        steps = weight(f"{name}.steps", code.steps if code.whole.dtype == np.int8 else none)
        if i:
            inputs += [weight(f"native.{name}", records(code, nearness, index.token_table.reshape(-1))), steps]
        else:
            scale = weight(f"{name}.scale", none if code.scale is None else code.scale)
            inputs += [weight(f"native.{name}", by_rows(code.whole)), steps, scale, weight(f"{name}.nearness", nearness)]
    hidden = ir.val("hidden_states", dtype=ir.DataType.FLOAT, shape=("N", index.hidden_size))
    node = ir.node(
        "HeadStep",
        [hidden, *inputs],
        {
            "vocab_size": index.vocab_size,
            "cluster_size": index.cluster_size,
            "state_power": float(index.state_power),
            "columns": columns,
            "types": types,
            "halves": halves,
            "caps": [g.cap for g in gates],
            "margins": [_margin(g) for g in gates],
        },
        domain=NATIVE_DOMAIN,
        num_outputs=5,
        name="head/HeadStep",
    )
    named: dict[str, tuple[ir.DataType, tuple[Any, ...]]] = {
        "token": (ir.DataType.INT64, ("N",)),
        "candidate_ids": (ir.DataType.INT64, ("N", "C")),
        "candidate_logits": (ir.DataType.FLOAT, ("N", "C")),
        "counts": (ir.DataType.INT64, ("N", 2 + len(index.stages))),
        "capped": (ir.DataType.BOOL, ("N",)),
    }
    for value, (name, (dtype, shape)) in zip(node.outputs, named.items()):
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
    main.ops.nodes.append(node)
    return main.model("head", [hidden], list(node.outputs), opset(OPSET, NATIVE_DOMAIN), metadata)


def by_rows(whole: np.ndarray) -> np.ndarray:
    """A matrix of whole numbers with zeros behind each row's columns; one of floats as it is."""
    if whole.dtype != np.int8:
        return np.ascontiguousarray(whole)
    return np.pad(whole, ((0, 0), (0, -whole.shape[1] % PAD)))


def records(code: Grid, nearness: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Each row with what belongs to it behind it, [n, bytes] int8: its scale and nearness (float32), its token (int32), 4 bytes more.

    A step opens clusters here and there: a cluster that is one stretch of memory is one miss, its rows and three arrays are four.
    """
    rows = by_rows(code.whole).view(np.int8)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % PAD)))
    own = np.zeros(len(rows), [("scale", np.float32), ("nearness", np.float32), ("token", np.int32), ("none", np.int32)])
    own["scale"], own["nearness"], own["token"] = 1 if code.scale is None else code.scale, nearness, tokens
    return np.concatenate([rows, own.view(np.int8).reshape(len(rows), -1)], 1)


def element_type(code: Grid) -> int:
    return int(ir.DataType.INT8 if code.whole.dtype == np.int8 else ir.DataType.FLOAT16)


def _margin(gate: Gate) -> float:
    """As float32: the operator takes 1e30 and more as infinite."""
    return min(gate.margin, 1e30) if math.isfinite(gate.margin) else 1e30
