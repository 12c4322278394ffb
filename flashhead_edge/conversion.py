"""From a model to a FlashHead checkpoint, and a checkpoint calibrated again: the order of the work, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge import calibration
from flashhead_edge.capture import Source, capture_text, end_ids, read_text, sample_own_text
from flashhead_edge.checkpoint import (
    HeadWeights,
    PublishedClusters,
    check_device,
    check_output,
    check_update,
    chosen_device,
    load_model,
    load_tokenizer,
    open_source,
    read_head,
    read_index,
    read_published,
    update_index,
    write_checkpoint,
)
from flashhead_edge.clustering import Clusters, cluster
from flashhead_edge.coding import encode_float16
from flashhead_edge.costs import dense_bytes, fixed_bytes
from flashhead_edge.devices import Runtime, device_named
from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.fitting import accumulate, roots, second_moment
from flashhead_edge.index import FORMAT_VERSION, Gate, HeadIndex, default_probes
from flashhead_edge.progress import Progress, silent

log = logging.getLogger(__name__)

PUBLISHED_SIZE = 16  # tokens in a cluster of every released checkpoint
HEADS = ("fitted", "published")


def convert(
    model: str | Path,
    out: str | Path,
    *,
    head: str = "fitted",
    target: float = 0.995,
    texts: Sequence[str] = (),
    positions: int | None = None,
    device_model: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    torch_device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `model` to `out` as a FlashHead checkpoint.

    Args:
        model: a model folder, a .gguf file or a hub name.
        head: ``fitted`` (calibrated) or ``published`` (clusters, unit centroids and exact rows; needs no calibration).
        target: share of steps that keep the dense head's token, 0.5 to below 1.
        texts: files or ``datasets:NAME`` to calibrate on beside the model's own text, each held to the target.
        positions: states of own text, and at most of each text given; unless told, `calibration.default_positions` of the target.
        device_model: a name in `devices.DEVICES` or `devices.RUNTIMES`, to count cost in its time instead of bytes.
        torch_device: where the model is run and the head is fitted; unless told, a GPU if there is one.
        revision: branch, tag or commit of a hub name.
    Returns:
        The summary that the checkpoint keeps.
    Raises:
        FlashHeadError: see its subclasses; nothing is left half-written.
    """
    if head not in HEADS:
        raise SettingsError(f"head is {head!r}, expected one of {', '.join(HEADS)}; leave it out for the default")
    positions = calibration.default_positions(target) if positions is None else positions
    calibration.check_settings(target, positions)
    priced = device_named(device_model)
    if head == "published" and texts:
        raise SettingsError("head published: it is calibrated on nothing, expected no calibration text; leave the texts out, or convert to the fitted head")
    device = chosen_device(torch_device)
    check_device(device)
    source = open_source(model, trust_remote_code=trust_remote_code, revision=revision)
    check_output(source, out, overwrite)
    given = _read_texts(texts)
    if head == "fitted":
        _warn_of_few_positions(target, positions)
    progress("reading the head", None)
    weights = read_head(source)
    weight, bias = _on_device(weights, device)
    published = cluster_published(weight, seed, progress)
    if head == "published":
        index = published_head(published, weights)
        write_checkpoint(source, out, index, released(published, default_probes(len(published.token_table))), overwrite=overwrite)
        _warn_of_a_large_head(index)
        return index.summary
    progress("loading the model", None)
    runner, tokenizer = load_model(source, device=device), load_tokenizer(source)
    sources = capture(runner, tokenizer, weights.vocab_size, given, positions, seed, progress)
    ends = end_ids(runner, tokenizer, weights.vocab_size)
    del runner
    rows = in_state_metric(weight, sources)
    tables: dict[int, np.ndarray] = {}
    for size in calibration.cluster_sizes(priced):
        if size <= max(1, weights.vocab_size // 4) or not tables:
            tables[size] = cluster(rows, size, seed=seed, progress=_clustering(progress, size)).token_table
    del rows
    index, data = calibrated(weights, weight, bias, sources, tables, target, ends, priced, seed, progress)
    probes = probes_needed(released(published, 1), data, target)
    progress("writing the checkpoint", None)
    write_checkpoint(source, out, index, released(published, probes), overwrite=overwrite)
    _warn_of_a_large_head(index)
    return index.summary


def calibrate(
    folder: str | Path,
    *,
    target: float | None = None,
    texts: Sequence[str] = (),
    positions: int | None = None,
    device_model: str | None = None,
    seed: int = 0,
    torch_device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fit the head of a checkpoint again, in place, for another target or other texts, with the clusters it has.

    Arguments, returned summary and errors as in `convert`; without a target the checkpoint keeps the one that it has.
    """
    calibration.check_settings(0.995 if target is None else target, calibration.POSITIONS if positions is None else positions)
    priced = device_named(device_model)
    device = chosen_device(torch_device)
    check_device(device)
    folder = Path(folder)
    source = open_source(folder, trust_remote_code=trust_remote_code)
    check_update(folder)
    given = _read_texts(texts)
    weights = read_head(source)
    before = read_index(folder, weights)
    target = before.summary.get("target_agreement", 0.995) if target is None else target
    positions = calibration.default_positions(target) if positions is None else positions
    if before.rotation is None:
        raise CheckpointError(
            f"{folder}: a published head, which is calibrated on nothing, expected a fitted one; convert the model again without --head published"
        )
    published = read_published(folder)
    _warn_of_few_positions(target, positions)
    weight, bias = _on_device(weights, device)
    progress("loading the model", None)
    runner, tokenizer = load_model(source, device=device, trust_remote_code=trust_remote_code), load_tokenizer(source)
    sources = capture(runner, tokenizer, weights.vocab_size, given, positions, seed, progress)
    ends = end_ids(runner, tokenizer, weights.vocab_size)
    del runner
    index, data = calibrated(weights, weight, bias, sources, {before.cluster_size: before.token_table}, target, ends, priced, seed, progress)
    update_index(folder, index, probes_needed(published, data, target))
    _warn_of_a_large_head(index)
    return index.summary


def _read_texts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each name with its text. A text that is missing, empty or none is found here, before minutes of work."""
    given = [(name, read_text(name)) for name in names]
    for name, text in given:
        if not text.strip():
            raise SettingsError(f"calibration text {name}: it is empty, expected text; give another one or leave it out")
    return given


def _warn_of_few_positions(target: float, positions: int) -> None:
    """Say before the work what only its end would show."""
    least = calibration.least_positions(target)
    if positions < least:
        log.warning(
            f"{positions:,} positions cannot show {100 * target:g} %, at least {least:,} can: margins will give up no held-out token; "
            "give more --positions or a lower target"
        )


def _warn_of_a_large_head(index: HeadIndex) -> None:
    """Say of a head that is small anyway that nothing is gained."""
    read, dense = index.summary["bytes_per_step"], index.summary["dense_bytes_per_step"]
    if read >= dense:
        log.warning(f"a step reads {read:,.0f} bytes, the dense head {dense:,}: on a head of {index.vocab_size:,} tokens FlashHead gains nothing")


def _on_device(weights: HeadWeights, device: str) -> tuple[Tensor, Tensor | None]:
    """The rows that can be returned, where the work is done."""
    bias = None if weights.bias is None else weights.bias[: weights.vocab_size].to(device)
    return weights.weight[: weights.vocab_size].to(device), bias


def capture(model: Any, tokenizer: Any, vocab_size: int, texts: Sequence[tuple[str, str]], positions: int, seed: int, progress: Progress) -> list[Source]:
    """States of the model's own text and of each text given, (name, text)."""
    own = sample_own_text(model, tokenizer, vocab_size, positions, seed, progress)
    return [own, *(capture_text(model, tokenizer, name, text, positions, progress) for name, text in texts)]


def in_state_metric(weight: Tensor, sources: Sequence[Source]) -> Tensor:
    """The head's rows about their mean, turned so that distance is the spread of logits over the states, [V, d] float32."""
    root = roots(second_moment([s.states for s in sources], weight.device))[0].float()
    mean = weight.double().mean(0)
    return torch.cat([(w.double() - mean).float() @ root for w in weight.split(16384)])


def calibrated(
    weights: HeadWeights,
    weight: Tensor,
    bias: Tensor | None,
    sources: Sequence[Source],
    tables: dict[int, np.ndarray],
    target: float,
    ends: Sequence[int],
    priced: Any,
    seed: int,
    progress: Progress,
) -> tuple[HeadIndex, calibration.Data]:
    """Fit, search and choose margins: the index with its summary, and the states it was chosen on."""
    with torch.inference_mode():
        moments, winners = accumulate(weight, bias, [s.states for s in sources], tables, progress)
        data = calibration.gather(sources, winners, target)
        fitted, tried = calibration.search(data, moments, tables, weight, bias, priced, seed, progress)
        index = calibration.finish(fitted, data, target, weight, bias, ends, weights.fingerprint, seed, progress)
    dense = None if isinstance(priced, Runtime) else dense_bytes(weights.vocab_size, weight.shape[1])  # a runtime's prices are no bytes
    searched = [
        {"plan": calibration.describe(t.plan), "state_power": t.plan.state_power, "cost": t.cost, "share": None if dense is None else t.cost / dense}
        for t in tried
    ]
    chosen = f"{calibration.describe(fitted.plan)}: the least cost of {len(tried)} candidates at equal held-out misses"
    frontier = index.summary["frontier"]
    if priced is not None:  # bytes' worth of time, as time
        frontier = [p | {"cost": p["cost"] / (priced.bandwidth * 1e3)} for p in frontier]
    more = {"searched": searched, "chosen": chosen, "frontier": frontier, "device": None if priced is None else priced.name}
    return dataclasses.replace(index, summary=index.summary | more), data


def _clustering(progress: Progress, size: int) -> Any:
    def said(done: int, total: int, objective: float, imbalance: float) -> None:
        progress(f"clusters of {size}: objective {objective:.4f}, imbalance {imbalance:.2f}", done / total)

    return said


def cluster_published(weight: Tensor, seed: int, progress: Progress) -> Clusters:
    """Clusters of the published method: equal sizes, spherical, in the rows' own metric."""
    return cluster(weight, PUBLISHED_SIZE, seed=seed, progress=_clustering(progress, PUBLISHED_SIZE))


def released(clusters: Clusters, n_probes: int) -> PublishedClusters:
    """The clusters as other tools of the field read them."""
    return PublishedClusters(clusters.centroids, clusters.assignments, n_probes)


def probes_needed(clusters: PublishedClusters, data: calibration.Data, target: float, n: int = 6000) -> int:
    """Clusters that the published method must open so that `target` of n states find the dense head's token."""
    at = torch.randperm(len(data.states), generator=torch.Generator().manual_seed(0))[:n]
    unit = torch.nn.functional.normalize(torch.from_numpy(clusters.centroids), dim=1)
    home = torch.from_numpy(clusters.assignments)[data.winners[at]]
    rank = torch.cat(
        [
            (s >= s.gather(1, k[:, None])).sum(1)
            for s, k in ((data.states[i].float() @ unit.T, home[j]) for i, j in zip(at.split(512), torch.arange(len(at)).split(512)))
        ]
    )
    return int(rank.sort().values[min(len(rank) - 1, int(np.ceil(target * len(rank))) - 1)])


def published_head(clusters: Clusters, weights: HeadWeights) -> HeadIndex:
    """The published head as an index: unit centroids, a count of probes, exact rows."""
    centroids = torch.from_numpy(clusters.centroids)
    length = centroids.norm(dim=1, keepdim=True).clamp(min=1e-12)
    k = len(centroids)
    probes = default_probes(k)
    index = HeadIndex(
        vocab_size=weights.vocab_size,
        hidden_size=weights.weight.shape[1],
        token_table=clusters.token_table,
        centroids=encode_float16(centroids / length),
        probe=Gate(np.zeros(k, np.uint8), 1.0, float("inf"), probes),
        stages=(),
        always_scored=np.zeros(0, np.int32),
        mean=None,
        rotation=None,
        tail_scale=float(length.mean()),
        tail_offset=0.0,
        fingerprint=weights.fingerprint,
    )
    d = index.hidden_size
    summary = {
        "format_version": FORMAT_VERSION,
        "head": "published",
        "n_probes": probes,
        "bytes_per_step": fixed_bytes(index) + probes * index.cluster_size * (2 * d + 4),
        "dense_bytes_per_step": dense_bytes(index.vocab_size, d),
    }
    return dataclasses.replace(index, summary=summary)
