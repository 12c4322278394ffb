"""A compressed-tensors checkpoint's own integers in the builder's graph, which does not read that format.

The builder gets the weights as floats and codes them itself, as products of the same form; then each product's codes,
scales and zero points become the checkpoint's, bit for bit. compressed-tensors and ONNX Runtime lay both out alike:
codes low first along the inputs; zero points alone are packed along the outputs there and along the groups here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from flashhead_edge.checkpoint.atomic import check_space
from flashhead_edge.checkpoint.source import Source, weight_map
from flashhead_edge.checkpoint.tensors import read_array, read_header
from flashhead_edge.errors import CheckpointError, ExportError
from flashhead_edge.export.passes.products import Coded, coded_weights

BITS, HALF = 4, 8
SIZES = (16, 32, 64, 128, 256)  # groups that ONNX Runtime's operator takes
PACKED = ".weight_packed"
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "o_proj": ("dense",)}  # the builder's name, ours
LAYER = re.compile(r"layers\.(\d+)\.(?:self_attn|attn|mlp)\.(\w+)$")
CHECKED = 64  # rows of each product that are compared with the builder's
INSTEAD = "export from the model in floats, or the head alone (--body none)"


def packed_group(source: Source, scheme: Mapping[str, Any], precision: str) -> int:
    """The group of a checkpoint whose codes ONNX Runtime's operator takes.

    Raises:
        ExportError: another width, group, order of columns or layout, or another precision asked for.
    """

    def refuse(found: str, expected: str) -> ExportError:
        return ExportError(f"{source.name}: compressed-tensors with {found}, expected {expected}; {INSTEAD}")

    if scheme.get("format", "pack-quantized") != "pack-quantized":
        raise refuse(f"the format {scheme['format']}", "pack-quantized")
    groups = [dict(g) for g in (scheme.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    weights = [dict(g.get("weights") or {}) for g in groups]
    found = {(w.get("num_bits"), w.get("strategy"), w.get("group_size")) for w in weights}
    if len(found) != 1:
        raise refuse(f"{len(found)} kinds of weights", "one")
    bits, strategy, size = next(iter(found))
    if bits != BITS or strategy != "group" or size not in SIZES:
        raise refuse(f"{bits} bits, a scale for each {strategy} ({size})", f"{BITS} bits in groups of {', '.join(map(str, SIZES))}")
    if any(g.get("input_activations") for g in groups):
        raise refuse("quantised activations", "weights alone")
    files = weight_map(source.folder)
    if any(name.endswith(".weight_g_idx") for name in files):
        raise refuse("columns in another order (weight_g_idx)", "their own order")
    if not any(name.endswith(PACKED) for name in files):
        raise CheckpointError(f"{source.name}: config.json says pack-quantized, but there is no {PACKED.removeprefix('.')}; fetch the model again")
    if precision != f"int{BITS}":
        raise ExportError(f"{source.name}: the weights are integers of {BITS} bits, expected a body of int{BITS}, found {precision}; pass --body int{BITS}")
    return int(size)


def write_floats(source: Source, scheme: Mapping[str, Any], folder: Path) -> None:
    """The checkpoint's weights as floats, in an existing folder: what the builder reads. In 16 bits, since its codes do not stay."""
    import torch
    from safetensors import safe_open

    from flashhead_edge.checkpoint.quantised import dequantised
    from flashhead_edge.checkpoint.shards import ShardWriter

    files = weight_map(source.folder)
    headers = {file: read_header(file) for file in set(files.values())}
    check_space(folder, sum((4 if n.endswith(PACKED) else 1) * (headers[f][n].end - headers[f][n].start) for n, f in files.items()), folder)
    opened = {file: safe_open(str(file), framework="pt") for file in headers}
    writer = ShardWriter(folder)
    coded = {name.removesuffix(PACKED) + ".weight" for name in files if name.endswith(PACKED)}

    def get(name: str) -> torch.Tensor:
        return opened[files[name]].get_tensor(name)  # type: ignore[no-any-return,no-untyped-call]

    for name, tensor in dequantised(scheme, set(files), get, torch.float32, source.name):
        # what is no product's weight stays as it is: the rest of the graph is made of it
        writer.add(name, tensor.to(torch.bfloat16) if name in coded else get(name))
    writer.finish()


def put_codes(model: ir.Model, source: Source, group: int) -> None:
    """Give each coded product of a body the checkpoint's codes.

    Raises:
        ExportError: a product that the checkpoint has no codes for, or whose rows the builder has put in another order.
    """
    files = weight_map(source.folder)
    stems: dict[tuple[int, str], str] = {}
    for name in files:
        stem = name.removesuffix(PACKED)
        at = LAYER.search(stem) if name.endswith(PACKED) else None
        if at is not None:
            stems[int(at[1]), at[2]] = stem
    left = set(stems.values())
    for node in model.graph:
        if node.op_type == "MatMul" and any(v is not None and v.const_value is not None and v.const_value.size > 1 for v in node.inputs):
            raise ExportError(f"{source.name}: {node.name} is no product of coded weights, expected all of them coded; {INSTEAD}")
        if node.op_type != "MatMulNBits":
            continue
        made = coded_weights(node)
        at = re.search(r"layers\.(\d+)/\w+/(\w+)/", made.name)
        key = None if at is None else (int(at[1]), at[2])
        parts = [] if key is None else [stems[key]] if key in stems else [stems.get((key[0], p), "") for p in JOINED.get(key[1], ())]
        if not parts or not all(parts):
            raise ExportError(f"{source.name}: {made.name} has no codes in the checkpoint, expected all products coded; {INSTEAD}")
        own = _read(source, files, parts, group, made)
        _compare(made, own, source.name)
        codes, scales = node.inputs[1], node.inputs[2]
        assert codes is not None and scales is not None and made.zeros is None
        for value, array in ((codes, own.codes.numpy()), (scales, own.scales.numpy())):
            assert value.const_value is not None
            value.const_value = ir.Tensor(array.reshape(value.const_value.shape.numpy()), name=value.name)
        if own.zeros is not None:
            _add_zeros(node, own.zeros, str(codes.name))
        left -= set(parts)
    if left:
        raise ExportError(f"{source.name}: {min(left)} is in no product of the body, expected all of them in it; {INSTEAD}")


def _read(source: Source, files: Mapping[str, Path], stems: list[str], group: int, made: Coded) -> Coded:
    """The codes of some linear layers, on top of each other."""

    def get(name: str) -> np.ndarray:
        return read_array(files[name], name, read_header(files[name])[name])

    codes, scales, zeros = [], [], []
    for stem in stems:
        n, k = (int(x) for x in get(f"{stem}.weight_shape"))
        words, scale = get(f"{stem}{PACKED}"), get(f"{stem}.weight_scale")
        groups = k // group
        if k % group or words.shape != (n, k // 8) or scale.shape != (n, groups):
            raise CheckpointError(
                f"{source.name}: {stem} has codes {list(words.shape)} and scales {list(scale.shape)}, expected {[n, k // 8]} and {[n, groups]}; "
                "fetch the model again"
            )
        codes.append(np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8))
        scales.append(scale.astype(np.float32))
        if f"{stem}.weight_zero_point" in files:
            zeros.append(_zeros(get(f"{stem}.weight_zero_point"), n, groups, f"{source.name}: {stem}"))
        else:
            zeros.append(np.full((n, groups), HALF, np.uint8))
    stacked, found = np.concatenate(codes), np.concatenate(zeros)
    if (len(stacked), stacked.shape[1] * 2, group) != (made.n, made.k, made.group):
        raise ExportError(
            f"{source.name}: {made.name} is [{made.n}, {made.k}] in groups of {made.group}, the checkpoint's codes are "
            f"[{len(stacked)}, {stacked.shape[1] * 2}] in groups of {group}; {INSTEAD}"
        )
    packed = None
    if bool((found != HALF).any()):
        even = np.pad(found, ((0, 0), (0, found.shape[1] % 2)))
        packed = ir.Tensor(even[:, ::2] | even[:, 1::2] << 4)
    return Coded(made.name, made.n, made.k, BITS, group, ir.Tensor(stacked), ir.Tensor(np.concatenate(scales)), packed)


def _zeros(stored: np.ndarray, n: int, groups: int, name: str) -> np.ndarray:
    """Zero points [N, groups] uint8, of words along N, or one number each."""
    if stored.shape == (n, groups):
        return (stored.astype(np.int16) + HALF).astype(np.uint8)
    if stored.shape != (-(-n // 8), groups):
        raise CheckpointError(f"{name} has zero points {list(stored.shape)}, expected {[-(-n // 8), groups]}; fetch the model again")
    fields = np.ascontiguousarray(stored.T.astype("<i4", copy=False)).view(np.uint8)
    return np.ascontiguousarray(np.stack([fields & 15, fields >> 4], -1).reshape(groups, -1)[:, :n].T)


def _floats(c: Coded, rows: np.ndarray) -> np.ndarray:
    """Some rows' values, [rows, groups, group]."""
    codes = c.codes.numpy().reshape(c.n, -1)[rows]
    fields = np.stack([codes & 15, codes >> 4], -1).reshape(len(rows), c.groups, c.group).astype(np.float32)
    zeros = c.unpacked_zeros().T[rows].astype(np.float32)
    return (fields - zeros[..., None]) * c.scales.numpy().reshape(c.n, c.groups)[rows][..., None]


def _compare(made: Coded, own: Coded, name: str) -> None:
    """Raise where the builder's own rounding of the floats is further away than a step: another order of rows or columns."""
    rows = np.arange(0, made.n, max(1, made.n // CHECKED))
    theirs, ours = _floats(made, rows), _floats(own, rows)
    step = np.abs(made.scales.numpy().reshape(made.n, made.groups)[rows])[..., None]
    if bool((np.abs(theirs - ours) > 1.1 * step + 1e-6).any()):
        raise ExportError(f"{name}: {made.name} has its rows in another order than the checkpoint, expected the same; {INSTEAD}")


def _add_zeros(node: ir.Node, zeros: ir.TensorProtocol, codes: str) -> None:
    """Give a product zero points, its fourth input."""
    name = f"{codes}.zeros"
    value = ir.Value(name=name, shape=ir.Shape(zeros.shape.numpy()), type=ir.TensorType(zeros.dtype), const_value=ir.Tensor(zeros.numpy(), name=name))
    assert node.graph is not None
    node.graph.initializers[name] = value
    node.resize_inputs(max(4, len(node.inputs)))
    node.replace_input_with(3, value)
