"""From a model in floats to a W4A16 checkpoint, and the report on what that costs: the order of the work."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_edge.capture import MIXTURE, own_samples, read_text
from flashhead_edge.checkpoint import (
    HeadWeights,
    Source,
    check_device,
    check_output,
    chosen_device,
    load_model,
    load_tokenizer,
    open_source,
    read_head,
)
from flashhead_edge.checkpoint.atomic import replacing
from flashhead_edge.checkpoint.quantised import quantisation
from flashhead_edge.checkpoint.shards import ShardWriter
from flashhead_edge.checkpoint.write import save_floats
from flashhead_edge.errors import CheckpointError, SettingsError, UnsupportedModelError
from flashhead_edge.intervals import wilson
from flashhead_edge.progress import Progress, silent
from flashhead_edge.quantize.choose import Chosen, Settings, choose_site, scale_dtype
from flashhead_edge.quantize.grid import nearest, packed, packed_bytes
from flashhead_edge.quantize.layouts import Site, layout
from flashhead_edge.quantize.measure import Scored, score
from flashhead_edge.quantize.output import write_rest
from flashhead_edge.quantize.walk import Stream, Walk, Weights, moments

GROUPS = (32, 64, 128)
POSITIONS = 16_384  # of own text, and at most of each text given, that scales and ranges are chosen on
MEASURED = 8_192  # positions of each text that is measured, at most
HELD_OUT = 8  # every eighth sample of the own text is measured, never chosen on
WINDOW = 512  # tokens that a text is read in at a time, each window by itself
BATCH = 4  # windows at a time


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    group: int = 128,
    symmetric: bool = True,
    calibration: Sequence[str] = (),
    texts: Sequence[str] = (),
    positions: int = POSITIONS,
    measured: int = MEASURED,
    seed: int = 0,
    overwrite: bool = False,
    torch_device: str | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `model` to `out` with its decoder's linear layers in 4 bits (compressed-tensors, pack-quantized).

    Args:
        model: a model folder in bfloat16, float16 or float32, a .gguf file (read as floats) or a hub name.
        group: weights of a row that share a scale, 32, 64 or 128.
        symmetric: no zero points.
        calibration: files or ``datasets:NAME`` to choose on beside the model's own text.
        texts: the same, for measuring alone.
        positions: tokens of own text, and at most of each calibration text, to choose on.
        measured: tokens of each text that is measured, at most.
        revision: branch, tag or commit of a hub name.
    Returns:
        The report that the checkpoint's config.json and model card keep.
    Raises:
        FlashHeadError: see its subclasses; nothing is left half-written.
    """
    started = time.monotonic()
    _check(group, positions, measured, calibration, texts)
    device = chosen_device(torch_device)
    check_device(device)
    source = open_source(model, revision=revision)
    _check_floats(source)
    sites = layout(source.config, source.name)
    path = check_output(source, out, overwrite)
    given, held = _texts(calibration), _texts(texts)
    above = next(p for p in path.parents if p.exists())
    with tempfile.TemporaryDirectory(dir=above, prefix=f".{path.name}.flashhead-floats-") as work:
        if source.gguf is not None:
            progress("reading the GGUF file", None)
            source = save_floats(source, Path(work))
        head = read_head(source)
        weights = Weights(source)
        walk = Walk(source, weights, device)
        settings = Settings(group, symmetric, walk.config)
        linears = [name for site in sites for name in site.linears]
        _check_sizes(walk, linears, group, source.name)
        own, own_held = _sampled(source, head, device, positions, seed, progress)
        tokenizer = load_tokenizer(source)
        tuned = Stream("own text", own)
        for name, text in given:
            tuned.ids += _windows(tokenizer, name, text, positions)
        kept = [("own text, held out", own_held), *((Path(n).name, _windows(tokenizer, n, t, measured)) for n, t in held)]
        streams = {form: [Stream(name, ids) for name, ids in kept] for form in ("float", "nearest", "ours")}
        walk.embed([tuned, *(s for some in streams.values() for s in some)])
        sizes = _sizes(walk, weights, linears, settings)
        with replacing(path, sizes["after"] + (64 << 20)) as new:
            writer = ShardWriter(new)
            done: set[str] = set()
            layers = []
            for i in range(len(walk.layers)):
                progress(f"layer {i + 1} of {len(walk.layers)}", i / (len(walk.layers) + 1))
                layers.append(_one_layer(walk, i, sites, settings, tuned, streams, writer, done))
            scored = {form: [score(head, walk.head_states(s), s.ids) for s in some] for form, some in streams.items()}
            progress("writing the checkpoint", 0.99)
            report = _report(source, settings, seed, tuned, scored, kept, layers, sizes, time.monotonic() - started)
            write_rest(new, source, weights, writer, done, report, _left_as_they_are(walk))
    return report


def _check(group: int, positions: int, measured: int, calibration: Sequence[str], texts: Sequence[str]) -> None:
    if group not in GROUPS:
        raise SettingsError(f"groups of {group}: expected one of {', '.join(map(str, GROUPS))}; choose another")
    if positions < 1_000 or measured < 1_000:
        raise SettingsError(f"{min(positions, measured):,} positions, expected at least 1,000 to choose on and to measure; give more")
    both = {str(Path(t).resolve()) for t in calibration} & {str(Path(t).resolve()) for t in texts}
    if both:
        raise SettingsError(f"{min(both)}: given to calibrate on and to measure on, expected texts of one use each; leave it out of one of them")


def _check_floats(source: Source) -> None:
    """Raise where there is nothing to quantise any more, or a head would be left calibrated on other states."""
    scheme = quantisation(source.config, source.folder if source.gguf is None else None)
    if scheme is not None:
        raise UnsupportedModelError(
            f"{source.name}: the weights are quantised already ({scheme.get('quant_method')}), expected a model in bfloat16, float16 or float32; "
            "choose the model that it was made from"
        )
    if "flash_head_cache_dir" in source.config:
        raise CheckpointError(
            f"{source.name}: a FlashHead checkpoint, whose head is calibrated on its body in floats, expected the model itself; quantize that, then convert it"
        )


def _check_sizes(walk: Walk, linears: Sequence[str], group: int, name: str) -> None:
    for i in range(len(walk.layers)):
        shapes = walk.shapes(i)
        for linear in linears:
            shape = shapes.get(f"{linear}.weight")
            if shape is None or len(shape) != 2:
                raise UnsupportedModelError(
                    f"{name}: layer {i} has no linear layer {linear}, expected one in each layer; choose a model whose layers are alike"
                )
            if shape[1] % group:
                fit = [str(g) for g in GROUPS if all(s[1] % g == 0 for n, s in shapes.items() if n.removesuffix(".weight") in linears)]
                instead = f"pass --group {' or '.join(fit)}" if fit else "choose another model"
                raise SettingsError(f"{name}: {linear} has {shape[1]:,} inputs, expected a multiple of the group {group}; {instead}")


def _texts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each name with its text, found before minutes of work."""
    found = [(name, read_text(name)) for name in names]
    for name, text in found:
        if not text.strip():
            raise SettingsError(f"text {name}: it is empty, expected text; give another one or leave it out")
    return found


def _sampled(source: Source, head: HeadWeights, device: str, positions: int, seed: int, progress: Progress) -> tuple[list[Tensor], list[Tensor]]:
    """The model's own text in batches of equal length: what is chosen on, and what is held out. The whole model is in memory only here."""
    progress("loading the model", None)
    runner, tokenizer = load_model(source, device=device), load_tokenizer(source)
    # `own_samples` counts a part that is read twice as twice as many states; here each is read once
    wanted = math.ceil(positions * HELD_OUT / (HELD_OUT - 1) / sum(part.share for part in MIXTURE))
    chosen, held, before = [], [], 0
    for batch in own_samples(runner, tokenizer, head.vocab_size, wanted, seed, progress):
        ids = torch.cat([batch.start[:, :-1], batch.ids], 1)
        at = torch.arange(before, before + len(ids)) % HELD_OUT == HELD_OUT - 1
        before += len(ids)
        chosen += [part for part in ids[~at].split(16) if len(part)]
        held += [part for part in ids[at].split(16) if len(part)]
    return chosen, held


def _windows(tokenizer: Any, name: str, text: str, positions: int) -> list[Tensor]:
    """A text's first tokens in batches of windows."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:positions], dtype=torch.int64)
    if len(ids) < 2:
        raise SettingsError(f"text {name}: {len(ids)} tokens, expected at least two; give a file with text in it")
    whole = len(ids) // WINDOW * WINDOW
    batches = list(ids[:whole].view(-1, WINDOW).split(BATCH)) if whole else []
    return batches + ([ids[None, whole:]] if len(ids) - whole > 1 else [])


def _one_layer(
    walk: Walk,
    i: int,
    sites: Sequence[Site],
    settings: Settings,
    tuned: Stream,
    streams: dict[str, list[Stream]],
    writer: ShardWriter,
    done: set[str],
) -> list[Chosen]:
    """Carry every stream through a layer, in its own form of it, and write ours."""
    with walk.layer(i) as (layer, dtypes), torch.no_grad():
        for stream in streams["float"]:
            walk.advance(i, layer, stream)
        means = moments(walk, i, layer, [site.linears for site in sites], tuned)
        plain = {name: layer.get_parameter(f"{name}.weight") for site in sites for name in site.linears}
        for name, weight in plain.items():
            rounded = nearest(weight.data, settings.group, settings.symmetric, scale_dtype(dtypes[f"{name}.weight"])).values()
            layer.get_submodule(name)._parameters["weight"] = nn.Parameter(rounded, requires_grad=False)
        for stream in streams["nearest"]:
            walk.advance(i, layer, stream)
        for name, weight in plain.items():
            layer.get_submodule(name)._parameters["weight"] = weight
        outer: dict[str, Tensor] = {}
        chosen = [choose_site(layer, site, mean, dtypes, settings, outer) for site, mean in zip(sites, means, strict=True)]
        for stream in [tuned, *streams["ours"]]:
            walk.advance(i, layer, stream)
        coded = {name: c for site in chosen for name, c in site.coded.items()}
        parameters = dict(layer.named_parameters())
        for name, stored in walk.names(i).items():
            linear = name.removesuffix(".weight")
            done.add(stored)
            if linear in coded:
                for part, tensor in packed(coded[linear]).items():
                    writer.add(f"{stored.removesuffix('weight')}{part}", tensor)
            else:
                writer.add(stored, parameters[name].data.to(dtypes[name]))
    return chosen


def _sizes(walk: Walk, weights: Weights, linears: Sequence[str], settings: Settings) -> dict[str, int]:
    """Bytes of all weights before and after, and of the linear layers alone."""
    from flashhead_edge.checkpoint.tensors import read_header

    headers = {file: read_header(file) for file in set(weights.files.values())}
    each = {name: headers[file][name] for name, file in weights.files.items()}
    sizes = {"before": sum(e.end - e.start for e in each.values()), "linear_before": 0, "linear_after": 0}
    for i in range(len(walk.layers)):
        names = walk.names(i)
        for linear in linears:
            entry = each[names[f"{linear}.weight"]]
            sizes["linear_before"] += entry.end - entry.start
            sizes["linear_after"] += packed_bytes(entry.shape[0], entry.shape[1], settings.group, settings.symmetric, 2)
    return sizes | {"after": sizes["before"] - sizes["linear_before"] + sizes["linear_after"]}


def _left_as_they_are(walk: Walk) -> list[str]:
    """Linear modules outside the decoder's layers: the head, a vision tower's."""
    inside = {id(m) for m in walk.layers.modules()}
    return [name for name, m in walk.model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def _report(
    source: Source,
    settings: Settings,
    seed: int,
    tuned: Stream,
    scored: dict[str, list[Scored]],
    kept: Sequence[tuple[str, list[Tensor]]],
    layers: Sequence[Sequence[Chosen]],
    sizes: dict[str, int],
    seconds: float,
) -> dict[str, Any]:
    """What config.json, the card, the table and --json say."""
    texts = []
    for t, (name, ids) in enumerate(kept):
        forms: dict[str, Any] = {}
        for form, each in scored.items():
            forms[form] = {"perplexity": each[t].perplexity}
            if form != "float":
                same = int((each[t].tokens == scored["float"][t].tokens).sum())
                n = len(each[t].tokens)
                forms[form] |= {"top1_agreement": same / n, "top1_agreement_interval": list(wilson(same, n))}
        texts.append({"name": name, "positions": sum(i.numel() for i in ids), **forms})
    flat = [site for layer in layers for site in layer]
    return {
        "model": source.name,
        "bits": 4,
        "group": settings.group,
        "symmetric": settings.symmetric,
        "seed": seed,
        "positions": tuned.positions,
        "texts": texts,
        "output_error": {"nearest": sum(c.nearest for c in flat) / len(flat), "ours": sum(c.error for c in flat) / len(flat)},
        "scaled_sites": sum(c.exponent is not None for c in flat),
        "sites": len(flat),
        "bytes": sizes,
        "seconds": round(seconds, 1),
    }
