"""Which 4-bit format a model folder has, from its config and the kinds of its tensors; what is not read is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError, UnsupportedModelError
from flashhead_edge.packed.files import Files

BITS = 4
READ = "compressed-tensors (pack-quantized), AWQ (gemm), GPTQ or MLX (affine)"
MARKS = {"compressed-tensors": ".weight_packed", "awq": ".qweight", "gptq": ".qweight", "mlx": ".scales"}  # the tensor that says a matrix is packed
PARTS = {  # all tensors of a packed matrix
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "mlx": (".weight", ".scales", ".biases"),
}
TRACES = (  # ends of tensors' names that tell a format which is not read, whatever the config says
    (".quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes FP4"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes int8"),
    (".weight_scale_inv", "fp8 in blocks"),
    (".weight_scale_2", "nvfp4"),
    (".weight_global_scale", "nvfp4"),
    ("_proj_blocks", "mxfp4"),
    (".tensor_impl", "torchao"),
)
DTYPES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E8M0": "scales of mxfp4 or mxfp8", "F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}


@dataclass(frozen=True)
class Scheme:
    """How a folder's matrices are packed."""

    kind: str  # a key of MARKS
    groups: frozenset[int] = frozenset()  # sizes that the config names, -1 for all inputs in one; empty: it names none
    symmetric: bool = False  # the config says so, or leaves it open
    second: bool = False  # GPTQ: zeros are stored as they are (version 2), not one lower
    ordered: bool = False  # GPTQ: inputs are in another order, so that g_idx must be there
    zeros: bool = False  # the config says that every matrix has zero points of its own
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # MLX: bits and group of layers that have their own


def scheme_of(config: Mapping[str, Any], folder: Path, files: Files, name: str) -> Scheme | None:
    """The format of a folder's packed matrices, or None where all are floats.

    Args:
        config: its config.json.
        name: what messages call the model.
    Raises:
        UnsupportedModelError: a format, variant or width that is not read.
        CheckpointError: packed tensors that the config says nothing of, or none where it says so.
    """
    found = _said(config, folder)
    scheme = None if found is None else _scheme(found, name)
    stored = list(files)
    for end, what in TRACES:
        if any(tensor.endswith(end) for tensor in stored):
            raise refused(name, what)
    for tensor in stored:
        if files.entry(tensor).dtype in DTYPES:
            raise refused(name, DTYPES[files.entry(tensor).dtype])
    packed = {mark for mark in MARKS.values() for tensor in stored if tensor.endswith(mark)}
    if scheme is None and packed:
        raise CheckpointError(f"{name}: packed weights ({min(packed)}), but no quantization_config, expected one in config.json; fetch the model again")
    if scheme is not None:
        alone = next((t for t in stored if t.endswith(".weight_scale") and t.removesuffix("_scale") + "_packed" not in files), None)
        if alone is not None:
            weight = alone.removesuffix("_scale")
            raise refused(name, f"{alone} over {files.entry(weight).dtype if weight in files else 'nothing'} (one number each, not packed)")
        if MARKS[scheme.kind] not in packed:
            raise CheckpointError(
                f"{name}: config.json says {scheme.kind}, but there is no {MARKS[scheme.kind]}, expected packed weights; fetch the model again"
            )
    return scheme


def refused(name: str, what: str) -> UnsupportedModelError:
    """The error for a format that is not read."""
    return UnsupportedModelError(f"{name}: the weights are quantised as {what}, expected {BITS}-bit {READ}, or floats; choose another checkpoint")


def _said(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The quantisation that a folder's files name: quant_method "mlx" where MLX wrote it."""
    for part in (config, text_config(config)):
        own, others = part.get("quantization"), part.get("quantization_config")
        if isinstance(others, Mapping) and "quant_method" in others:
            return dict(others)
        mlx = next((q for q in (own, others) if isinstance(q, Mapping) and "bits" in q and "group_size" in q), None)
        if mlx is not None:
            return {**mlx, "quant_method": "mlx"}
        if isinstance(others, Mapping):
            return dict(others)
    if (folder / "quantize_config.json").is_file():  # GPTQ of the first kind
        said = read_json(folder / "quantize_config.json")
        return {"quant_method": "gptq", **said} if isinstance(said, dict) else {"quant_method": "gptq"}
    return None


def _scheme(said: Mapping[str, Any], name: str) -> Scheme:
    kind = str(said.get("quant_method"))
    if kind == "auto-round":
        kind = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(str(said.get("packing_format")), kind)
    if kind == "compressed-tensors":
        return _compressed(said, name)
    if kind == "mlx":
        return _mlx(said, name)
    if kind not in MARKS:
        details = [str(said[k]) for k in ("quant_method", "quant_algo", "format", "packing_format", "fmt", "quant_type") if said.get(k)]
        raise refused(name, ", ".join(details) or "something that its config does not name")
    version = str(said.get("version") or "gemm").lower()
    if kind == "awq" and version != "gemm":
        raise refused(name, f"AWQ of version {version}")
    _four(said.get("bits", said.get("w_bit")), kind.upper(), name)
    if kind == "gptq" and str(said.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        raise refused(name, f"GPTQ of checkpoint_format {said['checkpoint_format']}")
    size = said.get("group_size", said.get("q_group_size"))
    groups = frozenset([size]) if isinstance(size, int) else frozenset()
    second, zeros = str(said.get("checkpoint_format")) == "gptq_v2", kind == "awq" and said.get("zero_point") is True
    return Scheme(kind, groups, said.get("sym") is not False, second, said.get("desc_act") is True, zeros)


def _compressed(said: Mapping[str, Any], name: str) -> Scheme:
    groups = said.get("config_groups")
    parts = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    weights = [g["weights"] for g in parts if isinstance(g.get("weights"), Mapping)]
    for part in (said, *parts):
        form = str(part.get("format") or "pack-quantized")
        if form != "pack-quantized" and not (part is said and form == "mixed-precision"):
            raise refused(name, f"compressed-tensors in the format {form}")
    sizes = set()
    for weight in weights:
        if weight.get("type", "int") != "int":
            raise refused(name, f"compressed-tensors with weights of type {weight['type']}")
        _four(weight.get("num_bits"), "compressed-tensors", name)
        strategy, size = weight.get("strategy", "group"), weight.get("group_size")
        if strategy == "channel" or (strategy == "group" and isinstance(size, int)):
            sizes.add(-1 if strategy == "channel" else int(size))
        else:
            raise refused(name, f"compressed-tensors with a scale for each {strategy} ({size})")
    return Scheme("compressed-tensors", frozenset(sizes), zeros=bool(weights) and all(w.get("symmetric") is False for w in weights))


def _mlx(said: Mapping[str, Any], name: str) -> Scheme:
    mode = str(said.get("mode") or "affine")
    if mode != "affine":
        raise refused(name, f"MLX in the mode {mode}")
    layers = {}
    for layer, own in said.items():
        if isinstance(own, Mapping):
            if str(own.get("mode") or "affine") != "affine":
                raise refused(name, f"MLX in the mode {own['mode']} ({layer})")
            layers[layer] = _number(own.get("bits", said["bits"])), _number(own.get("group_size", said["group_size"]))
    layers[""] = _number(said["bits"]), _number(said["group_size"])
    return Scheme("mlx", layers=layers)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _four(bits: Any, what: str, name: str) -> None:
    if bits != BITS:
        raise refused(name, f"{what} of {'an unnamed number of' if bits is None else bits} bits")
