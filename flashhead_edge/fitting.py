"""Fitting a head to hidden states, all in closed form: coordinates, centroids, and the errors of what is coded.

States enter once, in `accumulate`; what it keeps is small and serves every rotation, code and fold that calibration
tries. Row i of a head, w, gives the state h the logit w.h = w.mean + w.(h - mean). With coordinates
z = [1, P (h - mean)] it is fitted by a row a so that a.z is as close as can be in the mean square over states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.codes import Coded
from flashhead_edge.coding import decode, encode, encode_bits, to_torch
from flashhead_edge.index import ERROR_STEPS
from flashhead_edge.progress import Progress, silent
from flashhead_edge.reference import settled

BLOCK = 512  # states in one block
FOLD_BLOCK = 128  # consecutive states, one sample, that stay in one fold
RIDGE_STATES = 1e-3  # of the mean variance, added to the states' second moment
RIDGE_CENTROIDS = 3.0  # of the mean second moment of a coordinate: how strongly a centroid is held to its members' mean


def fold_of(n: int) -> Tensor:
    """The fold, 0 or 1, of each of n states in their order: [n] int64."""
    return torch.arange(n) // FOLD_BLOCK % 2


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over states x = [1, h - mean] of two folds, float64; best is the largest logit in each cluster."""

    mean: Tensor  # [d]
    count: tuple[int, int]
    second: Tensor  # [2, 1 + d, 1 + d]: sum of x x'
    best: dict[int, Tensor]  # by cluster size: [2, 1 + d, K], sum of x best'
    best_square: dict[int, Tensor]  # by cluster size: [2, K], sum of best^2


def accumulate(
    weight: Tensor, bias: Tensor | None, sources: Sequence[Tensor], tables: dict[int, np.ndarray], progress: Progress = silent
) -> tuple[Moments, Tensor]:
    """One pass over the states with every row of the head.

    Args:
        weight: [V, d], bias: [V] or None.
        sources: hidden states [n, d] each; folds are counted within each source.
        tables: token tables [K, cluster_size] by cluster size.
    Returns:
        The moments, and the dense head's token of every state in the order of the sources, [n] int64 on the CPU.
    """
    device, (v, d) = weight.device, weight.shape
    total = sum(len(s) for s in sources)
    mean = torch.stack([s.to(device).double().sum(0) for s in sources]).sum(0) / total
    matrix = weight.float().T
    order = {size: _slots(table, v).to(device) for size, table in tables.items()}
    second = torch.zeros(2, 1 + d, 1 + d, dtype=torch.float64, device=device)
    best = {size: torch.zeros(2, 1 + d, len(t), dtype=torch.float64, device=device) for size, t in tables.items()}
    square = {size: torch.zeros(2, len(t), dtype=torch.float64, device=device) for size, t in tables.items()}
    # made once: fresh memory of this size costs as much time as the sums
    wide = torch.full((BLOCK, v + 1), -torch.inf, device=device)  # its last column stands for empty slots
    gathered = torch.empty(BLOCK * max((len(s) for s in order.values()), default=0), device=device)
    count, done = [0, 0], 0
    winners = torch.empty(total, dtype=torch.int64)
    for states, place in zip(sources, torch.arange(total).split([len(s) for s in sources])):
        folds = fold_of(len(states))
        for fold in (0, 1):
            for at in (folds == fold).nonzero()[:, 0].split(BLOCK):
                h = states[at].to(device).float()
                logits = wide[: len(h)]
                torch.mm(h, matrix, out=logits[:, :v])
                if bias is not None:
                    logits[:, :v] += bias.float()
                winners[place[at]] = settled(weight, bias, h, logits[:, :v]).cpu()
                x = torch.cat([torch.ones(len(h), 1, device=device), (h.double() - mean).float()], 1)
                second[fold] += (x.T @ x).double()
                for size, slots in order.items():
                    slotted = gathered[: len(h) * len(slots)].view(len(h), -1)
                    top = torch.index_select(logits, 1, slots, out=slotted).view(len(h), -1, size).amax(2)
                    best[size][fold] += (x.T @ top).double()
                    square[size][fold] += top.square().sum(0).double()
                count[fold] += len(h)
                done += len(h)
                progress("fitting clusters", done / total)
    return Moments(mean, (count[0], count[1]), second, best, square), winners


def _slots(table: np.ndarray, empty: int) -> Tensor:
    """Token of each slot, `empty` where there is none, [slots] int64."""
    flat = torch.from_numpy(table.reshape(-1).astype(np.int64))
    return flat.masked_fill(flat < 0, empty)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The rotation as it is coded, and the head's rows in its coordinates."""

    rotation: Coded  # [d, r - 1]
    lift: Tensor  # [1 + d, r] float64: z = x @ lift
    metric: Tensor  # [r, r] float64: mean of z z'
    rows: Tensor  # [V, r] float32
    lost: Tensor  # [V] float32: variance of a row's logit that the coordinates do not see


def second_moment(sources: Sequence[Tensor], device: torch.device) -> Tensor:
    """Second moment of states [n, d] about their mean, [d, d] float64."""
    total = sum(len(s) for s in sources)
    mean = torch.stack([s.to(device).double().sum(0) for s in sources]).sum(0) / total
    out = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for states in sources:
        for h in states.split(8192):
            x = (h.to(device).double() - mean).float()
            out += (x.T @ x).double()
    return out / total


def roots(h: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a second moment [d, d], made safe by a small ridge, and its inverse, float64 each."""
    h = h + RIDGE_STATES * h.diagonal().mean().clamp(min=1e-12) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    values, vectors = torch.linalg.eigh(h)
    values = values.clamp(min=1e-12)
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T


def fit_coordinates(weight: Tensor, bias: Tensor | None, moments: Moments, bits: float, most: int | None = None) -> Coordinates:
    """Coordinates in which few matter: the eigenbasis of (W - its mean) H^(1/2), H the states' second moment.

    The rotation is coded in `bits` bits a weight on the average, more for the coordinates that matter more; those owed
    none are dropped. The rows are then fitted to the coordinates as coded, so that its rounding costs sharpness of the
    order of coordinates, not truth.

    Args:
        most: coordinates at most, where what is read costs more than what is lost.

    Source: the Karhunen-Loeve transform under the metric H; regression of w.h on z.
    """
    root, inverse = roots(moments.second.sum(0)[1:, 1:] / sum(moments.count))
    w = weight.double()
    centred = (w - w.mean(0)) @ root
    variance, vectors = torch.linalg.eigh(centred.T @ centred / len(w))
    variance, vectors = variance.flip(0).clamp(min=1e-20), vectors.flip(1)
    matrix = inverse @ vectors  # [d, d]: (h - mean) @ matrix has unit second moment
    importance = variance.sqrt()
    matrix, importance = matrix[:, :most], importance[:most]
    coded = encode_bits((matrix * importance).float(), max(1, round(bits * matrix.shape[1] / 8)))
    importance = importance[: coded.columns]
    rotation = dataclasses.replace(coded, steps=(torch.from_numpy(coded.steps).to(importance) / importance).float().cpu().numpy())  # type: ignore[arg-type]
    matrix = decode(to_torch(rotation, weight.device)).double()
    h = root @ root
    unit = (matrix * (h @ matrix)).sum(0).clamp(min=1e-20).sqrt()  # rounding has changed the lengths a little
    rotation = dataclasses.replace(rotation, steps=rotation.steps / unit.float().cpu().numpy())  # type: ignore[operator]
    matrix = decode(to_torch(rotation, weight.device)).double()
    d, r = matrix.shape[0], matrix.shape[1] + 1
    lift = torch.zeros(1 + d, r, dtype=torch.float64, device=weight.device)
    lift[0, 0], lift[1:, 1:] = 1, matrix
    inner = matrix.T @ h @ matrix
    inner = inner + 1e-9 * inner.diagonal().mean() * torch.eye(r - 1, dtype=inner.dtype, device=inner.device)
    rows = torch.linalg.solve(inner, matrix.T @ h @ w.T).T
    seen = ((rows @ inner) * rows).sum(1)
    lost = (((w @ h) * w).sum(1) - seen).clamp(min=0)
    constant = w @ moments.mean + (0 if bias is None else bias.double())
    metric = torch.zeros(r, r, dtype=torch.float64, device=weight.device)
    metric[0, 0], metric[1:, 1:] = 1, inner
    return Coordinates(rotation, lift, metric, torch.cat([constant[:, None], rows], 1).float(), lost.float())


def errors(coordinates: Coordinates, missing: Tensor, lost: Tensor | None = None) -> Tensor:
    """Root mean square over states of what `missing` [n, r] leaves out of a score, [n] float64."""
    metric = coordinates.metric.to(torch.float32)
    square = torch.cat([((m @ metric) * m).sum(1) for m in missing.split(16384)]).double()
    return (square + (0 if lost is None else lost.double())).clamp(min=1e-12).sqrt()


@dataclass(frozen=True, eq=False)
class Centroids:
    """Centroids fitted to their cluster's best logit, as coded; and those of each fold, fitted on the other one."""

    coded: Coded  # [K, columns]
    values: Tensor  # [K, r] float32, decoded
    folds: Tensor  # [2, K, r] float32: for the states of fold 0 and of fold 1
    error: Tensor  # [K] float64: root mean square of best - score over held-out states


def fit_centroids(coordinates: Coordinates, moments: Moments, table: np.ndarray, code: str, seed: int = 0) -> Centroids:
    """Ridge regression of each cluster's best logit on z, held to the mean of the members' rows.

    C = M + (B - M G)(G + ridge)^-1, with G the sum of z z', B of best z' and M the means. Each fold's error is
    measured with the centroids of the other one, as coded.
    """
    size, lift = table.shape[1], coordinates.lift
    r = lift.shape[1]
    members = torch.from_numpy(np.where(table < 0, 0, table).astype(np.int64)).to(lift.device)
    filled = torch.from_numpy(table >= 0).to(lift.device)
    mean = (coordinates.rows[members].double() * filled[:, :, None]).sum(1) / filled.sum(1).clamp(min=1)[:, None]
    gram = torch.stack([lift.T @ s @ lift for s in moments.second])
    target = torch.stack([lift.T @ b for b in moments.best[size]])  # [2, r, K]

    def fit(g: Tensor, b: Tensor) -> tuple[Coded, Tensor]:
        ridge = RIDGE_CENTROIDS * g.diagonal()[1:].mean() * torch.eye(r, dtype=g.dtype, device=g.device)
        ridge[0, 0] = 1e-6 * g[0, 0]
        fitted = mean + torch.linalg.solve(g + ridge, b - g @ mean.T).T
        coded = encode(fitted.float(), code, seed=seed)
        return coded, widen(decode(to_torch(coded, lift.device)), r)

    coded, values = fit(gram.sum(0), target.sum(0))
    folds = torch.stack([fit(gram[1 - f], target[1 - f])[1] for f in (0, 1)])
    square = torch.zeros(len(table), dtype=torch.float64, device=lift.device)
    for f in (0, 1):
        c = folds[f].double()
        square += moments.best_square[size][f] - 2 * (c * target[f].T).sum(1) + ((c @ gram[f]) * c).sum(1)
    error = (square / sum(moments.count)).clamp(min=1e-12).sqrt()
    return Centroids(coded, values, folds, error)


def widen(values: Tensor, columns: int) -> Tensor:
    """[n, columns], zeros where a code has no columns."""
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


@dataclass(frozen=True, eq=False)
class Layer:
    """One row code of the cascade, as coded: what it adds and how far the score is from the truth after it."""

    coded: Coded  # [slots, columns]
    values: Tensor  # [slots, columns] float32, decoded
    error: Tensor  # [slots] float64


def fit_layers(coordinates: Coordinates, centroids: Tensor, table: np.ndarray, codes: Sequence[str], seed: int = 0) -> list[Layer]:
    """Code the rows, each code what the ones before it (and the row's centroid) have left."""
    r, size = coordinates.lift.shape[1], table.shape[1]
    tokens = torch.from_numpy(table.reshape(-1).astype(np.int64)).to(coordinates.rows.device)
    filled = tokens >= 0
    target = centroids.repeat_interleave(size, 0)
    missing = torch.where(filled[:, None], coordinates.rows[tokens.clamp(min=0)] - target, torch.zeros_like(target))
    lost = torch.where(filled, coordinates.lost[tokens.clamp(min=0)], torch.zeros_like(coordinates.lost[:1]))
    del target
    layers = []
    for i, code in enumerate(codes):
        coded = encode(missing, code, seed=seed + i)
        values = decode(to_torch(coded, missing.device))
        missing = missing - widen(values, r)
        layers.append(Layer(coded, values, errors(coordinates, missing, lost)))
    return layers


def coded_errors(error: Tensor) -> tuple[np.ndarray, float, Tensor]:
    """Errors in one logarithmic byte each: the bytes [n] uint8, the unit, and the values as read back [n] float64."""
    floor = max(float(error.max()) * 2.0 ** (-255 / ERROR_STEPS), float(error.min()))
    unit = float(np.float32(floor))
    steps = ((error / unit).log2() * ERROR_STEPS).round().clamp(0, 255)
    return steps.to(torch.uint8).cpu().numpy(), unit, unit * torch.exp2(steps / ERROR_STEPS)
