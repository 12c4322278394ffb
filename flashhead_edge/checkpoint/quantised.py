"""Quantised bodies: what packed them, and their weights as floats where transformers' own quantiser does not run.

Layouts, N outputs and K inputs, codes of 2, 4 or 8 bits in words of 32, the first code in the lowest bits:

* compressed-tensors pack-quantized: `weight_packed` [N, K / codes a word], `weight_scale` [N, groups],
  `weight_zero_point` packed along N; stored codes and zeros are raised by half their range.
* AutoAWQ gemm: `qweight` [K, N / 8], `qzeros` [groups, N / 8], slot i of a word holds column AWQ_ORDER[i].
* GPTQ: `qweight` [K / codes, N], `qzeros` [groups, N / codes], `g_idx` [K]; version 1 stores zero - 1.

Weights only: where a scheme also quantises activations, the floats here leave that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError, UnsupportedModelError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WIDTHS = (2, 4, 8)
COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")

Get = Callable[[str], Tensor]


def quantisation(config: Mapping[str, Any], folder: Any = None) -> dict[str, Any] | None:
    """The quantisation config of a model, or None where its weights are plain floats."""
    for part in (config, families.text_config(config)):
        if isinstance(part.get("quantization_config"), Mapping):
            return dict(part["quantization_config"])
    if folder is not None and (folder / "quantize_config.json").is_file():  # GPTQ of the first kind
        return {"quant_method": "gptq"} | dict(read_json(folder / "quantize_config.json"))
    return None


def method(scheme: Mapping[str, Any], name: str) -> str:
    """Which layout the weights have: compressed-tensors, awq or gptq.

    Raises:
        UnsupportedModelError: one that is not turned into floats here.
    """
    kind = str(scheme.get("quant_method"))
    if kind == "auto-round":
        kind = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(str(scheme.get("packing_format")), kind)
    fine = kind == "gptq" or (kind == "awq" and str(scheme.get("version", "gemm")).lower() == "gemm")
    if fine or (kind == "compressed-tensors" and scheme.get("format", "pack-quantized") in COMPRESSED):
        return kind
    found = ", ".join(str(scheme[k]) for k in ("quant_method", "format", "packing_format", "version") if k in scheme)
    raise UnsupportedModelError(
        f"{name}: the weights are quantised as {found}, expected compressed-tensors (pack-quantized), AWQ (gemm) or GPTQ; "
        "install what transformers needs for it, or choose another checkpoint"
    )


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes in the last axis of int32 words, the first in the lowest bits: [..., w] -> [..., w * 32 / bits] int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def dequantise_compressed(get: Get, names: set[str], stem: str, bits: int) -> Tensor:
    """A compressed-tensors weight, [N, K] float32."""
    if f"{stem}.weight_packed" not in names:
        weight, scale = get(f"{stem}.weight").float(), get(f"{stem}.weight_scale").float()
        if f"{stem}.weight_zero_point" in names:
            weight = weight - _per_column(get(f"{stem}.weight_zero_point").float(), weight.shape[1])
        return weight * _per_column(scale, weight.shape[1])
    n, k = (int(x) for x in get(f"{stem}.weight_shape"))
    half = 2 ** (bits - 1)
    codes = unpack(get(f"{stem}.weight_packed"), bits)[:, :k].float() - half
    scale = get(f"{stem}.weight_scale").float()
    zero = torch.zeros_like(scale)
    if f"{stem}.weight_zero_point" in names:
        zero = get(f"{stem}.weight_zero_point").float()
        if zero.shape != scale.shape:
            zero = unpack(get(f"{stem}.weight_zero_point").T.contiguous(), bits).T[:n].float() - half
    if f"{stem}.weight_g_idx" in names and bool((get(f"{stem}.weight_g_idx") >= 0).all()):
        group = get(f"{stem}.weight_g_idx").long()
        return (codes - zero[:, group]) * scale[:, group]
    return (codes - _per_column(zero, k)) * _per_column(scale, k)


def _per_column(values: Tensor, columns: int) -> Tensor:
    """Values of groups [N, groups] (or one value, or one a row) as wide as the weight."""
    if values.ndim < 2:
        return values.reshape(-1, 1)
    return values.repeat_interleave(-(-columns // values.shape[1]), 1)[:, :columns]


def dequantise_awq(get: Get, names: set[str], stem: str) -> Tensor:
    """An AutoAWQ gemm weight of 4 bits, [N, K] float32."""

    def columns(words: Tensor) -> Tensor:
        slots = unpack(words, 4).view(len(words), -1, 8)
        return slots[:, :, torch.tensor(AWQ_ORDER).argsort()].flatten(1).float()

    codes, scales = columns(get(f"{stem}.qweight")), get(f"{stem}.scales").float()
    zeros = columns(get(f"{stem}.qzeros")) if f"{stem}.qzeros" in names else torch.full_like(scales, 8.0)
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T.contiguous()


def dequantise_gptq(get: Get, names: set[str], stem: str, bits: int, second: bool) -> Tensor:
    """A GPTQ weight, [N, K] float32.

    Args:
        second: the zeros are stored as they are (version 2), not one lower. A symmetric file tells by its zeros:
            all half the range is version 2, all one below is version 1, whatever its config says.
    """
    codes = unpack(get(f"{stem}.qweight").T.contiguous(), bits).T.float()
    scales = get(f"{stem}.scales").float()
    zeros = unpack(get(f"{stem}.qzeros"), bits)[:, : scales.shape[1]]
    half = 2 ** (bits - 1)
    if bool((zeros == half).all()) or bool((zeros == half - 1).all()):
        second = int(zeros.flatten()[0]) == half
    zero = (zeros if second else (zeros + 1) & (2**bits - 1)).float()
    size = -(-len(codes) // len(scales))
    group = get(f"{stem}.g_idx").long() if f"{stem}.g_idx" in names else torch.arange(len(codes)) // size
    return ((codes - zero[group]) * scales[group]).T.contiguous()


def dequantised(scheme: Mapping[str, Any], names: set[str], get: Get, dtype: torch.dtype, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model in its unquantised form, one after another.

    Args:
        names: the tensors in the files.
        get: reads one of them.
        dtype: of what comes out.
        name: of the model, for messages.
    Raises:
        CheckpointError, UnsupportedModelError: a layout or width that is not read here.
    """
    kind = method(scheme, name)
    mark = ".weight_scale" if kind == "compressed-tensors" else ".qweight"
    stems = {n.removesuffix(mark) for n in names if n.endswith(mark)}
    for key in sorted(names):
        stem = key.rpartition(".")[0]
        if stem not in stems:
            tensor = get(key)
            yield key, tensor.to(dtype) if tensor.is_floating_point() else tensor
        elif key.endswith(mark):
            bits = _bits(scheme, kind, stem, get, names, name)
            try:
                if kind == "compressed-tensors":
                    weight = dequantise_compressed(get, names, stem, bits)
                elif kind == "awq":
                    weight = dequantise_awq(get, names, stem)
                else:
                    second = str(scheme.get("checkpoint_format", "gptq")) == "gptq_v2"
                    weight = dequantise_gptq(get, names, stem, bits, second)
            except (KeyError, RuntimeError, IndexError) as error:
                raise CheckpointError(
                    f"{name}: the packed weight {stem} does not have the form that its config says ({error}); fetch the model again"
                ) from error
            yield f"{stem}.weight", weight.to(dtype)
        elif key.endswith(".bias"):
            yield key, get(key).to(dtype)


def _bits(scheme: Mapping[str, Any], kind: str, stem: str, get: Get, names: set[str], name: str) -> int:
    """Width of a weight's codes."""
    if kind == "compressed-tensors":
        if f"{stem}.weight_packed" not in names:
            return 8
        k = int(get(f"{stem}.weight_shape")[1])
        words = get(f"{stem}.weight_packed").shape[1]
        bits = next((b for b in WIDTHS if -(-k * b // 32) == words), 0)
    else:
        bits = int(scheme.get("bits") or scheme.get("w_bit") or 0)
    if bits not in ((4,) if kind == "awq" else WIDTHS):
        found = bits or "another number of"
        raise UnsupportedModelError(f"{name}: {stem} has codes of {found} bits, expected {'4' if kind == 'awq' else '2, 4 or 8'}; choose another checkpoint")
    return bits
