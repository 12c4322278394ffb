"""From the weights of a checkpoint to a decoder in nodes, layer by layer as `families` describes it. numpy only.

Nothing is read whole: some rows of a matrix are looked at when it is recorded, and it is read when the program's file is written. So a plan can build a
program for its sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from flashhead_edge.checkpoint.families import SOFTCAPS, logit_rule, text_config
from flashhead_edge.errors import CheckpointError, ExportError, SettingsError, UnsupportedModelError
from flashhead_edge.index import HeadIndex
from flashhead_edge.packed import Weights
from flashhead_edge.packed.coded import GROUPS
from flashhead_edge.program.families import Layout, Rope, describe, rotations
from flashhead_edge.program.head import DRAFTED_ROWS, Device, HeadPart, head_part
from flashhead_edge.program.nodes import Attention, Decoder, HeadNorm, Stored
from flashhead_edge.program.recoding import MINIMA, ORDER, Form, anew, form_of, recoded
from flashhead_edge.program.weights import BLOCK_ROWS, PRECISIONS, STORED, Item, Matrix, rounded

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head"
LOOKED_AT = 16  # rows of a matrix that say how all of it is stored
UNREAD = ("rotary_emb.inv_freq",)  # tables that older checkpoints store, which the config says too
Neutral = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Built:
    """A program that can be written."""

    decoder: Decoder
    head: HeadPart
    positions: int  # that the model was made for
    vocab: int  # rows of its embedding
    batch: int  # texts at once, at most; the head takes some more states, of a text's drafts
    notices: tuple[str, ...]  # what is not in it as the checkpoint has it, a sentence each


@dataclass(frozen=True, eq=False)
class _Stored:
    """A linear layer that has its place in a stack."""

    name: str
    form: Form
    group: int
    rows: np.ndarray | None  # the order of its rows


@dataclass(eq=False)
class _Work:
    """A program in the making."""

    weights: Weights
    layout: Layout
    decoder: Decoder
    group: int
    stem: str  # of the names: "model."
    coded: Callable[[_Stored], Neutral]  # a linear layer for the kernels, the last ones kept: each is asked for its codes, its scales and its zeros
    left: set[str]  # parameters that nothing has taken yet
    tables: dict[Rope | None, Stored] = field(default_factory=dict)  # of the rotary positions
    anew: dict[str, list[str]] = field(default_factory=dict)  # layers that are coded anew, by the reason

    def floats(self, name: str, width: int) -> np.ndarray:
        """A vector, [width] float32."""
        if name not in self.left:
            raise CheckpointError(f"{name}: it is not among the weights, expected the parameter of a {self.layout.family} model; fetch the model again")
        self.left.discard(name)
        array = self.weights.floats(name)
        if array.shape != (width,):
            raise CheckpointError(f"{name}: its shape is {list(array.shape)}, expected {[width]} as config.json says; fetch the model again")
        return array

    def norm(self, name: str, width: int) -> np.ndarray:
        return self.floats(f"{name}.weight", width) + np.float32(self.layout.norm_offset)


def build_program(
    weights: Weights,
    config: Mapping[str, Any],
    index: HeadIndex,
    *,
    precision: str,
    context: int,
    group: int,
    device: Device,
    batch: int = 1,
) -> Built:
    """Record a checkpoint's decoder and plan its head.

    Args:
        config: config.json.
        index: of the checkpoint's head.
        precision: of activations and of all floats that kernels read, float16 or bfloat16.
        context: positions of the cache.
        group: weights that share a scale where a matrix is coded anew, 32, 64 or 128.
        device: that the head's launches are planned for.
        batch: texts at once, at most.
    Raises:
        UnsupportedModelError: a family, or a part of it, that has no program.
        CheckpointError: a parameter is missing or has another shape than the config says.
        ExportError: a size or a value without a kernel. DeviceError: the head does not fit. SettingsError: a setting is out of range.
    """
    layout = describe(config)
    _check(layout, precision, context, group)
    names = set(weights.names())
    stem = _stem(names)
    decoder = Decoder(precision, context)
    left = {n for n in names if n.startswith(f"{stem}layers.") and not n.endswith(UNREAD)} | {f"{stem}norm.weight"} & names

    @lru_cache(maxsize=3)  # as many as a stack has
    def coded(stored: _Stored) -> Neutral:
        return recoded(weights.linear(stored.name), stored.form, stored.group, stored.rows)

    w = _Work(weights, layout, decoder, group, stem, coded, left)
    embedding, exact, bias = _vocabulary(w, names)
    _record(w, embedding)
    # some tools store a bias of zeros for every layer that they quantise
    foreign = sorted(name for name in w.left if not name.endswith(".bias") or weights.floats(name).any())
    if foreign:
        raise UnsupportedModelError(
            f"{foreign[0]}: a parameter that {layout.family} models do not have ({len(foreign)} of them), expected those that config.json describes; "
            "choose another model, or export it with flashhead export onnx"
        )
    if index.hidden_size != layout.hidden or index.vocab_size > exact.shape[0]:
        raise CheckpointError(
            f"head index: it is for a head [{index.vocab_size}, {index.hidden_size}], expected one for {list(exact.shape)}; run flashhead convert again"
        )
    # a config that leaves a cap out has none in these families
    scale, softcap = logit_rule(dict.fromkeys(SOFTCAPS) | dict(text_config(config)), layout.family)
    head = head_part(index, exact, bias, device, max(batch, DRAFTED_ROWS), precision, scale, softcap)
    return Built(decoder, head, layout.positions, layout.vocab, batch, tuple(_notices(w.anew)))


def _check(layout: Layout, precision: str, context: int, group: int) -> None:
    def want(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"program: {what} is {found}, expected {expected}; choose another")

    want(precision in PRECISIONS, "the precision", precision, " or ".join(PRECISIONS))
    want(group in GROUPS, "the group", group, f"one of {', '.join(map(str, GROUPS))}")
    want(2 <= context <= layout.positions, "the context", f"{context:,}", f"2 to the model's {layout.positions:,} positions")


def _stem(names: set[str]) -> str:
    """What stands before the names of the decoder's parameters."""
    found = [n.removesuffix(EMBEDDING) for n in names if n.endswith(EMBEDDING)]
    if not found:
        raise CheckpointError(f"{EMBEDDING}: no parameter has this name, expected the embedding of a decoder; fetch the model again")
    return min(found, key=lambda n: (n.count("."), n))


def _vocabulary(w: _Work, names: set[str]) -> tuple[Item, Item, np.ndarray | None]:
    """The embedding, the head's exact rows, which may be the same, and the head's bias."""
    embedding = _rows(w, "embedding", f"{w.stem}{EMBEDDING}")
    name = next((n for n in (HEAD, f"{w.stem}{HEAD}", f"{w.stem.removesuffix('model.')}{HEAD}") if f"{n}.weight" in names), None)
    if name is None and not w.layout.tied:
        raise UnsupportedModelError(f"{HEAD}.weight: it is not among the weights, and config.json does not tie it to the embedding; choose another model")
    if embedding.shape != (w.layout.vocab, w.layout.hidden):
        want = [w.layout.vocab, w.layout.hidden]
        raise CheckpointError(f"{w.stem}{EMBEDDING}: its shape is {list(embedding.shape)}, expected {want} as config.json says; fetch the model again")
    exact = embedding if name is None else _rows(w, "head.rows", f"{name}.weight")
    bias = f"{name or HEAD}.bias"
    return embedding, exact, w.weights.floats(bias) if bias in names else None


def _rows(w: _Work, item: str, name: str) -> Item:
    """A matrix of the vocabulary, some rows in memory at a time."""
    shape, precision = w.weights.shape(name), w.decoder.precision

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], BLOCK_ROWS):
            yield rounded(w.weights.rows(name, start, min(start + BLOCK_ROWS, shape[0])), precision, name)

    return Item(item, STORED[precision], shape, blocks)


def _record(w: _Work, embedding: Item) -> None:
    """The nodes from the ids to the hidden states."""
    d, m = w.decoder, w.layout
    x, branch = d.embedding("input_ids", embedding, m.embedding_scale), ""

    def norm(name: str, out: str) -> str:
        """The norm of the stream, with the last branch added to it before."""
        nonlocal x, branch
        weight = w.norm(f"{w.stem}{name}", m.hidden)
        if not branch:
            return d.norm(x, None, out, weight, m.epsilon, f"{out}.out")
        found = d.norm(branch, x, out, weight, m.epsilon, f"{out}.out", f"{out}.sum")
        x, branch = f"{out}.sum", ""
        return found

    def after(value: str, name: str) -> str:
        return d.norm(value, None, name, w.norm(f"{w.stem}{name}", m.hidden), m.epsilon, f"{name}.out") if m.four_norms else value

    for i in range(m.layers):
        at, before = f"layers.{i}", "pre_feedforward_layernorm" if m.four_norms else "post_attention_layernorm"
        state = norm(f"{at}.input_layernorm", f"{at}.input_layernorm")
        branch = after(_attention(w, i, state), f"{at}.post_attention_layernorm")
        state = norm(f"{at}.{before}", f"{at}.{before}")
        branch = after(_mlp(w, i, state), f"{at}.post_feedforward_layernorm")
    d.rename(norm("norm", f"layers.{m.layers}.final_norm_layernorm"), "hidden_states")


def _attention(w: _Work, i: int, state: str) -> str:
    d, m, at, self_attn = w.decoder, w.layout, f"layers.{i}", f"{w.stem}layers.{i}.self_attn"
    q, kv = m.q_heads * m.head_size, m.kv_heads * m.head_size
    o = _form(w, f"{self_attn}.o_proj", m.hidden, q)
    values = _value_rows(o.order, m)
    if o.order is not None and values is None:
        o = anew(o, ORDER, w.group)
    if m.fused:
        rows = None if values is None else np.concatenate([np.arange(q + kv), q + kv + values])
        parts = [("qkv_proj", q + 2 * kv, rows)]
    else:
        parts = [("q_proj", q, None), ("k_proj", kv, None), ("v_proj", kv, values)]
    qkv = _linear(w, state, f"{at}.qkv", self_attn, parts, m.hidden)
    norms = [HeadNorm(f"{at}.attn.{p}_norm.layernorm", w.norm(f"{self_attn}.{p}_norm", m.head_size), m.epsilon) if m.head_norms else None for p in "qk"]
    attention = Attention(m.q_heads, m.kv_heads, m.head_size, m.windows[i], m.scale)
    seen = d.attention(qkv, attention, _table(w, m.ropes[i]), norms[0], norms[1], f"{at}.attention")
    return _stack(w, seen, f"{at}.o", self_attn, [("o_proj", o, None)])


def _table(w: _Work, rope: Rope | None) -> Stored:
    if rope not in w.tables:
        cos, sin = (None, None) if rope is None else rotations(rope, w.layout.head_size, w.decoder.context)
        w.tables[rope] = w.decoder.table(cos, sin, w.layout.head_size)
    return w.tables[rope]


def _mlp(w: _Work, i: int, state: str) -> str:
    m, at, mlp = w.layout, f"layers.{i}", f"{w.stem}layers.{i}.mlp"
    down = _form(w, f"{mlp}.down_proj", m.hidden, m.intermediate)
    rows = down.order  # the rows before it take the order of its inputs
    if m.fused:
        both = None if rows is None else np.concatenate([rows, m.intermediate + rows])
        parts = [("gate_up_proj", 2 * m.intermediate, both)]
    else:
        parts = [("gate_proj", m.intermediate, rows), ("up_proj", m.intermediate, rows)]
    wide = w.decoder.gated(_linear(w, state, f"{at}.gate_up", mlp, parts, m.hidden), m.activation, f"{at}.gated")
    return _stack(w, wide, f"{at}.down", mlp, [("down_proj", down, None)])


def _value_rows(order: np.ndarray | None, m: Layout) -> np.ndarray | None:
    """The order of the rows of values under which the inputs of o come as it wants them; None: there is none.

    It has to stay within a head, and be one for all heads of queries that share a head of keys.
    """
    if order is None:
        return None
    heads = order.reshape(m.q_heads, m.head_size) - np.arange(m.q_heads)[:, None] * m.head_size
    shared = heads.reshape(m.kv_heads, -1, m.head_size)
    if heads.min() < 0 or heads.max() >= m.head_size or (shared != shared[:, :1]).any():
        return None
    return (shared[:, 0] + np.arange(m.kv_heads)[:, None] * m.head_size).reshape(-1)


# ---- linear layers


def _form(w: _Work, name: str, n: int, k: int) -> Form:
    """How a linear layer is stored."""
    if f"{name}.weight" not in w.left:
        raise CheckpointError(f"{name}.weight: it is not among the weights, expected the parameter of a {w.layout.family} model; fetch the model again")
    w.left.discard(f"{name}.weight")
    form = form_of(w.weights.linear(name, LOOKED_AT), w.group)
    form = replace(form, n=w.weights.shape(f"{name}.weight")[0])
    if (form.n, form.k) != (n, k):
        raise CheckpointError(f"{name}.weight: its shape is {[form.n, form.k]}, expected {[n, k]} as config.json says; fetch the model again")
    return form


def _linear(w: _Work, x: str, out: str, owner: str, parts: Sequence[tuple[str, int, np.ndarray | None]], k: int) -> str:
    """Layers over one input as one product. Their inputs come in the layer's own order: the norm before them serves all."""
    forms = []
    for name, n, rows in parts:
        form = _form(w, f"{owner}.{name}", n, k)
        forms.append((name, form if form.order is None else anew(form, ORDER, w.group), rows))
    return _stack(w, x, out, owner, forms)


def _stack(w: _Work, x: str, out: str, owner: str, parts: Sequence[tuple[str, Form, np.ndarray | None]]) -> str:
    """One product of layers on top of each other, and the sum with their biases."""
    group = min(form.group for _, form, _ in parts)
    for name, form, _ in parts:
        if form.reason is not None:
            w.anew.setdefault(form.reason, []).append(f"{owner}.{name}")
            if form.k % group and form.reason != MINIMA:
                raise ExportError(f"{owner}.{name}: {form.k} inputs to be coded in groups of {group}, expected a multiple of it; pass a smaller --group")
    stored = [_Stored(f"{owner}.{name}", form, group, rows) for name, form, rows in parts]
    made = [partial(w.coded, one) for one in stored]
    matrix = Matrix(out, sum(f.n for _, f, _ in parts), parts[0][1].k, group, all(f.symmetric for _, f, _ in parts), made)
    found = w.decoder.linear(x, matrix, out)
    if not any(name in w.layout.biases for name, _, _ in parts):
        return found
    biases = [_bias(w, f"{owner}.{name}", form.n, rows) if name in w.layout.biases else np.zeros(form.n, np.float32) for name, form, rows in parts]
    return w.decoder.plain("Add", found, np.concatenate(biases), f"{out}.biased")


def _bias(w: _Work, name: str, n: int, rows: np.ndarray | None) -> np.ndarray:
    bias = w.floats(f"{name}.bias", n)
    return bias if rows is None else bias[rows]


def _notices(reasons: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for reason, names in reasons.items():
        which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        yield f"{len(names)} {'matrix' if len(names) == 1 else 'matrices'} ({which}) {reason}"
