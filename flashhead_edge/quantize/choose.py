"""Scales and ranges of one decoder layer's linear layers, by their output error on hidden states.

Scales of inputs follow AWQ (Lin et al., MLSys 2024, section 3.2): s = rms(x)^a, or rms(x)^a / mean|w|^(1 - a), a on a
grid, 1 everywhere among them; the ranges are `grid.clipped`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_edge.quantize.grid import Coded, clipped, nearest, output_error
from flashhead_edge.quantize.layouts import Site, divide_norm, row_slice, shared, spread

EXPONENTS = tuple(i / 10 for i in range(1, 11))
ROWS = 1024  # of a linear layer that a scale is tried on, at most
WIDEST = 64.0  # a scale is within 1 / WIDEST to WIDEST


@dataclass(frozen=True, eq=False)
class Settings:
    """What all layers have in common."""

    group: int
    symmetric: bool
    config: Any  # of the text model


@dataclass(frozen=True, eq=False)
class Chosen:
    """What became of a site."""

    coded: dict[str, Coded]
    error: float  # mean squared error of the outputs, each linear layer's as a share of its outputs' mean square
    nearest: float  # the same of round-to-nearest without scaling
    exponent: float | None  # None: not scaled


def choose_site(layer: nn.Module, site: Site, moment: Tensor, dtypes: dict[str, torch.dtype], settings: Settings, outer: dict[str, Tensor]) -> Chosen:
    """Scale, clip and code the linear layers of a site; the layer's weights become what they are coded as.

    Args:
        layer: with weights in float32; what stands before the site is scaled back in place.
        moment: [K, K], the mean of x x^T over the site's inputs x.
        dtypes: of the stored tensors, by name in the layer.
        outer: by name of a linear layer, [N]: what its outputs are multiplied with by a scale folded into them. Added to here.
    """
    weights = {name: layer.get_parameter(f"{name}.weight").data for name in site.linears}
    scale_dtypes = {name: scale_dtype(dtypes[f"{name}.weight"]) for name in site.linears}
    importance = {name: outer.get(name, torch.ones(len(w), device=w.device)) ** 2 for name, w in weights.items()}
    power = {name: float((output_error(w, moment) * importance[name]).sum()) or 1.0 for name, w in weights.items()}

    def share(name: str, coded: Coded, scale: Tensor | None) -> float:
        values = coded.values() if scale is None else coded.values() / scale
        return float((output_error(values - weights[name], moment) * importance[name]).sum()) / power[name]

    def rounded(scale: Tensor | None) -> float:
        form = {name: w if scale is None else w * scale for name, w in weights.items()}
        return sum(share(name, nearest(w, settings.group, settings.symmetric, scale_dtypes[name]), scale) for name, w in form.items())

    plain = rounded(None)
    found: tuple[float, Tensor, Tensor] | None = None  # exponent, scale of the inputs, of the channels before them
    if site.before is not None:
        found = _best_scale(layer, site, weights, moment, importance, power, scale_dtypes, dtypes, settings)
        if found is not None and rounded(found[1]) >= plain:  # better on some rows alone
            found = None
    scale = None if found is None else found[1]
    scaled = moment if scale is None else moment / scale / scale[:, None]
    coded = {name: clipped(w if scale is None else w * scale, scaled, settings.group, settings.symmetric, scale_dtypes[name]) for name, w in weights.items()}
    error = sum(share(name, c, scale) for name, c in coded.items())
    if found is not None:
        fold(layer, site, found[2], found[1], dtypes, settings, outer)
    for name in site.linears:
        layer.get_parameter(f"{name}.weight").data = coded[name].values()
    return Chosen(coded, error, plain, None if found is None else found[0])


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    """Of the scales of a weight's groups: the weight's own 16 bits, float16 for float32."""
    return stored if stored == torch.bfloat16 else torch.float16


def _best_scale(
    layer: nn.Module,
    site: Site,
    weights: dict[str, Tensor],
    moment: Tensor,
    importance: dict[str, Tensor],
    power: dict[str, float],
    scale_dtypes: dict[str, torch.dtype],
    dtypes: dict[str, torch.dtype],
    settings: Settings,
) -> tuple[float, Tensor, Tensor] | None:
    """The scale with the least error of rounding to nearest, on some rows; None where no scaling is better."""
    some = {name: torch.arange(0, len(w), -(-len(w) // ROWS), device=w.device) for name, w in weights.items()}
    rms = shared(site, moment.diagonal().clamp(min=0), settings.config).sqrt()
    mean = shared(site, torch.cat(list(weights.values())).abs().mean(0), settings.config)

    def error(scale: Tensor | None) -> float:
        total = 0.0
        for name, rows in some.items():
            w = weights[name][rows]
            values = nearest(w if scale is None else w * scale, settings.group, settings.symmetric, scale_dtypes[name]).values()
            off = (values if scale is None else values / scale) - w
            total += float((output_error(off, moment) * importance[name][rows]).sum()) / power[name]
        return total

    best, least = None, error(None)
    for a in EXPONENTS:
        for raw in (rms.clamp(min=1e-5) ** a, rms.clamp(min=1e-5) ** a / mean.clamp(min=1e-8) ** (1 - a)):
            scale = (raw / (raw.amax() * raw.amin()).sqrt()).clamp(1 / WIDEST, WIDEST)
            if not bool(scale.isfinite().all()):
                continue
            if not site.rows:  # what a norm's stored weight can say
                scale = divide_norm(_norm(layer, site), scale, site.raised, dtypes[f"{site.before}.weight"])[1]
            inputs = spread(site, scale, len(moment), settings.config)
            found = error(inputs)
            if found < least:
                best, least = (a, inputs, scale), found
    return best


def _norm(layer: nn.Module, site: Site) -> Tensor:
    assert site.before is not None
    return layer.get_parameter(f"{site.before}.weight").data


def fold(layer: nn.Module, site: Site, scale: Tensor, inputs: Tensor, dtypes: dict[str, torch.dtype], settings: Settings, outer: dict[str, Tensor]) -> None:
    """Divide what stands before a site by its scale."""
    assert site.before is not None
    weight = layer.get_parameter(f"{site.before}.weight")
    stored = dtypes.get(f"{site.before}.bias")
    bias = None if stored is None else layer.get_parameter(f"{site.before}.bias")
    if not site.rows:
        # of a scale that `divide_norm` made the same comes out: it is what a stored weight can say
        weight.data, exact = divide_norm(weight.data, scale, site.raised, dtypes[f"{site.before}.weight"])
        if bias is not None and stored is not None:
            bias.data = (bias.data / exact).to(stored).float()
        return
    rows = row_slice(site, len(weight), len(inputs), settings.config)
    weight.data[rows] = weight.data[rows] / scale[:, None]
    if bias is not None and stored is not None:
        bias.data[rows] = (bias.data[rows] / scale).to(stored).float()
    outer.setdefault(site.before, torch.ones(len(weight), device=scale.device))[rows] = scale
