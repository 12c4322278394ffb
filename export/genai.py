"""What ONNX Runtime GenAI needs beside a decoder: its configuration, and logits where it looks for them.

Found with version 0.18 and kept by the tests: `logits` has three axes, [B, S, V] or [B, 1, V]; prompts of different
lengths are padded on their right and the logits of each one's last real token are wanted; outputs that it does not know
are left alone.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx_ir as ir

from flashhead_edge.export.graph import Ops


def genai_config(built: dict[str, Any], *, filename: str = "model.onnx", shared_cache: bool = True) -> dict[str, Any]:
    """genai_config.json for a whole decoder, from the builder's for its body.

    Args:
        built: what the builder wrote (`Body.genai_config`).
        filename: of the decoder with its head, in the same folder.
        shared_cache: past and present keys and values are one buffer, which attention extends in place; False where the
            graph appends to them (the portable dialect).
    """
    config = copy.deepcopy(built)
    decoder = config["model"]["decoder"]
    decoder["filename"] = filename
    decoder["outputs"] = {"logits": "logits"} | decoder["outputs"]
    config["search"]["past_present_share_buffer"] = shared_cache
    return config


def last_hidden(op: Ops, hidden: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """The hidden state of each row's last real token, [B, S, d] -> [B, d], so that the head runs for it alone.

    The mask [B, T] says which: prompts are padded on their right, and later steps have one token, which is real.
    """
    new = op.Shape(hidden, start=1, end=2)
    past = op.Sub(op.Shape(attention_mask, start=1, end=2), new)
    one = op.const(1, np.int64)
    real = op.ReduceSum(attention_mask, op.ints(1), keepdims=1)
    at = op.Max(op.Min(op.Sub(real, op.Add(past, one)), op.Sub(new, one)), op.const(0, np.int64))
    return op.GatherND(hidden, at, batch_dims=1)  # type: ignore[no-any-return]
