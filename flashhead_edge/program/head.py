"""The head as one plugin node: alone, with full-width logits, or at the end of a decoder. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashhead_edge.codes import row_bytes
from flashhead_edge.costs import ERROR_BYTES, TOKEN_BYTES, fixed_bytes
from flashhead_edge.errors import ExportError
from flashhead_edge.index import MOST_CANDIDATES, HeadIndex
from flashhead_edge.kernels.packing import STATIC_SHARED, Packed, pack, plans, words_of
from flashhead_edge.program.nodes import PLAIN, Attribute, Constant, Decoder, External, Graph, Node, Stored, Tensor
from flashhead_edge.program.weights import Item, bytes_item, float_item

MOST_ROWS = 32  # head_step.h: states of one launch
DRAFTED_ROWS = 8  # states that a program's head takes at once at least: of a draft and the token before it, as many as fused nodes and decode products take
SAMPLING = (("temperature", "float32", 0), ("top_p", "float32", 0), ("min_p", "float32", 0), ("top_k", "int32", 0), ("seed", "int32", 2), ("step", "int32", 0))


@dataclass(frozen=True)
class Device:
    """What the launches of the head are planned for."""

    multiprocessors: int
    shared_bytes: int  # shared memory that a block may have, the opt-in limit
    capability: int | None = None  # 87 for 8.7


@dataclass(frozen=True, eq=False)
class HeadPart:
    """A head, ready to become nodes."""

    index: HeadIndex
    packed: Packed
    rows: Item  # the model's own rows [V, d]
    bias: Item | None
    words: tuple[int, ...]  # of the launch plans for 1 to max_rows states
    max_rows: int
    precision: str
    scale: float
    softcap: float | None

    @property
    def items(self) -> list[Item]:
        """The head's tensors beside its rows, the bias last: it alone may have an odd length."""
        return [bytes_item("head.image", self.packed.image), *([] if self.bias is None else [self.bias])]


def head_part(
    index: HeadIndex, rows: Item, bias: np.ndarray | None, device: Device, max_rows: int, precision: str, scale: float = 1.0, softcap: float | None = None
) -> HeadPart:
    """Pack an index and plan its launches.

    Args:
        rows: the tensor of the exact rows, [V or more, d].
        bias: [V or more] float32.
        max_rows: states of one call at most.
        scale, softcap: of the model's logits, for a draw alone.
    Raises:
        ExportError: more rows than a launch takes.
        DeviceError: the index has a code without a kernel, or does not fit the device.
    """
    if not 1 <= max_rows <= MOST_ROWS:
        raise ExportError(f"head: {max_rows} rows at once, expected 1 to {MOST_ROWS}, which the kernel takes; pass a smaller --batch")
    packed = pack(index)
    if packed.layout.candidates > MOST_CANDIDATES:
        raise ExportError(
            f"head: up to {packed.layout.candidates:,} candidates, expected {MOST_CANDIDATES:,} at most, among which a token is drawn; "
            "convert the model again with --device, or with a lower target"
        )
    words = [word for plan in plans(packed, device.multiprocessors, device.shared_bytes - STATIC_SHARED, max_rows) for word in words_of(plan)]
    item = None if bias is None else float_item("head.bias", lambda: bias, bias.shape, precision)
    return HeadPart(index, packed, rows, item, tuple(words), max_rows, precision, scale, softcap)


def head_outputs(h: HeadPart, *, logits: bool, sampling: bool) -> list[Tensor]:
    outputs = [
        Tensor("token", "int32", ("batch",)),
        Tensor("candidate_ids", "int32", ("batch", h.packed.layout.candidates)),
        Tensor("candidate_logits", "float32", ("batch", h.packed.layout.candidates)),
        Tensor("counts", "int32", ("batch", 2 + len(h.index.stages))),
        Tensor("capped", "int32", ("batch",)),
    ]
    if logits:
        outputs.append(Tensor("logits", "float32", ("batch", h.index.vocab_size)))
    if sampling:
        outputs.append(Tensor("logprob", "float32", ("batch",)))
    return outputs


def sampling_inputs() -> list[Tensor]:
    return [Tensor(name, dtype, ("batch", width) if width else ("batch",)) for name, dtype, width in SAMPLING]


def head_node(h: HeadPart, hidden: str, *, logits: bool, sampling: bool) -> Node:
    """The plugin over hidden states [B, d] or [B, S, d]."""
    attributes: dict[str, Attribute] = {
        "rows": Stored(h.rows.name), "image": Stored("head.image"), "bias": Stored("" if h.bias is None else h.bias.name),
        "bf16": int(h.precision == "bfloat16"), "vocab": h.index.vocab_size, "hidden": h.index.hidden_size,
        "candidates": h.packed.layout.candidates, "stages": len(h.index.stages), "logits": int(logits), "sampling": int(sampling),
        "logit_scale": float(h.scale), "softcap": float(h.softcap or 0.0),
        "plans": h.words, "plan_words": len(h.words) // h.max_rows, "max_rows": h.max_rows,
    }  # fmt: skip
    inputs = (hidden, *(t.name for t in sampling_inputs())) if sampling else (hidden,)
    return Node("FlashHead", "head/FlashHead", inputs, tuple(t.name for t in head_outputs(h, logits=logits, sampling=sampling)), attributes)


def head_graph(h: HeadPart, *, logits: bool) -> Graph:
    """The head alone: hidden_states [batch, d] to token and candidates, no sampling."""
    outputs = head_outputs(h, logits=logits, sampling=False)
    hidden = Tensor("hidden_states", h.precision, ("batch", h.index.hidden_size))
    return Graph("head", (hidden,), tuple(outputs), (head_node(h, hidden.name, logits=logits, sampling=False),), {})


def decoder_graph(d: Decoder, h: HeadPart) -> Graph:
    """The whole decoder; its last value is called hidden_states."""
    node = head_node(h, "hidden_states", logits=False, sampling=True)
    outputs = [*head_outputs(h, logits=False, sampling=True), *_states(d), *d.cache("present")]
    return Graph("decoder", (*d.inputs(), *sampling_inputs()), tuple(outputs), (*d.nodes, node), d.constants)


def dense_graph(d: Decoder, h: HeadPart) -> Graph:
    """The same decoder with TensorRT's own product over the whole vocabulary, its matrix in the engine: what a head is compared with."""
    bias = None if h.bias is None else External(h.precision, h.bias.shape, Stored(h.bias.name))
    nodes, constants = dense_nodes(External(h.precision, h.rows.shape, Stored(h.rows.name)), bias, h.index.vocab_size)
    outputs = (Tensor("token", "int32", ("batch",)), *_states(d), *d.cache("present"))
    return Graph("decoder_dense", tuple(d.inputs()), outputs, (*d.nodes, *nodes), dict(d.constants) | constants)


def dense_nodes(rows: External, bias: External | None, vocab: int) -> tuple[list[Node], dict[str, Constant | External]]:
    """The end of that decoder: the last hidden state's product with all rows, its best column, as `token`; and the constants that it reads.

    Args:
        rows: [vocab or more, d], of which those behind `vocab` are padding, which may not win; bias: of as many, or None.
    """
    constants: dict[str, Constant | External] = {
        "head.rows": rows,
        "head.last": Constant("int64", np.array([-1])),
        "head.end": Constant("int64", np.array([np.iinfo(np.int64).max])),
        "head.axis": Constant("int64", np.array([1])),
    }
    nodes = [_plain("Slice", ["hidden_states", "head.last", "head.end", "head.axis"], "head.row"), _plain("Squeeze", ["head.row", "head.axis"], "head.state")]
    product = ["head.state", "head.rows"]
    if bias is not None:
        constants["head.bias"] = bias
        product.append("head.bias")
    nodes.append(_plain("Gemm", product, "head.logits", transB=1))
    if rows.shape[0] > vocab:
        constants |= {"head.first": Constant("int64", np.array([0])), "head.vocab": Constant("int64", np.array([vocab]))}
        nodes.append(_plain("Slice", ["head.logits", "head.first", "head.vocab", "head.axis"], "head.named"))
    nodes.append(_plain("ArgMax", [nodes[-1].outputs[0]], "head.best", axis=1, keepdims=0))
    nodes.append(_plain("Cast", ["head.best"], "token", to=6))  # int32
    return nodes, constants


def _plain(op: str, inputs: Sequence[str], out: str, **attributes: int) -> Node:
    return Node(op, f"{out}/{op}", tuple(inputs), (out,), attributes, PLAIN)


def _states(d: Decoder) -> list[Tensor]:
    return [Tensor("hidden_states", d.precision, ("batch", "sequence", d.widths["hidden_states"]))]


def settings_of(index: HeadIndex, scale: float, softcap: float | None, context_length: int | None, embedding_rows: int) -> dict[str, Any]:
    """What a runtime must know of the head, and what a step of it reads."""
    return {
        "vocab_size": index.vocab_size,
        "hidden_size": index.hidden_size,
        "stages": len(index.stages),
        "scale": scale,
        "softcap": softcap,
        "context_length": context_length,
        "embedding_rows": embedding_rows,
        "fixed_bytes": fixed_bytes(index),
        "item_bytes": [row_bytes(s.rows) + ERROR_BYTES for s in index.stages] + [2 * index.hidden_size + TOKEN_BYTES],
    }
