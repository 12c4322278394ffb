"""Equal-size clustering of a head's rows, in torch (CPU and GPU by the same code).

Every cluster has `cluster_size` slots and K = ceil(V / cluster_size), so a cluster is one block of memory of one size.
An iteration scores rows against centroids, assigns all rows at once under the capacities, and moves the centroids:

- The assignment is an auction: a row bids for its best cluster by what it would lose with its second best, a cluster
  keeps its highest bidders, and its price is the lowest bid that it keeps. So a row that has a good second choice
  gives way, whatever its number.
- A row is scored against its own cluster without itself. In a cluster of 16 a row is a good part of its own centroid,
  and with that part counted nearly every row stays where it started. The part comes back over the last iterations.
- One iteration in four looks at all clusters (2 V K d operations); the others at each row's nearest few, which cost
  a small part of that and are where most of the gain is made.
- Identical rows (unused tokens often are) fill whole clusters of their own first.

Source: auction algorithm, Bertsekas, Annals of Operations Research 1988; spherical k-means, Dhillon and Modha, Machine
Learning 2001; the row left out of its own centroid, Hartigan's exchange rule, 1975.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.errors import CheckpointError, SettingsError

ITERATIONS = 24
SEARCH_EVERY = 4  # after the first, one iteration in so many looks at all clusters
LISTED = 32  # nearest clusters kept by a search of all
NEAREST = 8  # nearest clusters looked at by the iterations between
LISTED_OPEN = 64  # nearest clusters with room that a row may bid for when its list is full
ROUNDS = 30  # rounds of one auction
STEP = 0.02  # least raise of a bid, as a share of the mean spread of a row's values
LEAST_STEP = 1e-6
BLOCK = 1 << 21  # numbers in one block of work: 8 MiB, which the memory allocator reuses (larger ones cost a page fault each time)
GPU_BLOCK = 1 << 27

OnIteration = Callable[[int, int, float, float], None]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Rows in clusters of one size. numpy only."""

    token_table: np.ndarray  # [K, cluster_size] int32: row numbers, ascending, then -1 for empty slots
    assignments: np.ndarray  # [V] int64: the cluster of each row
    centroids: np.ndarray  # [K, d] float32: mean of the members as passed, not of unit length
    objective: float  # spherical: mean cosine of a row and its centroid; Euclidean: mean squared distance to it
    history: tuple[float, ...]  # objective after each iteration; `objective` is the best of them


def cluster(
    rows: Tensor,
    cluster_size: int,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    spherical: bool = True,
    progress: OnIteration | None = None,
) -> Clusters:
    """Put rows into ceil(V / cluster_size) clusters of one size.

    Equal inputs and seed give equal clusters on one machine. Beside `rows` it holds one float32 copy of them (two for
    a moment where many rows are identical) and about 0.5 GB.

    Args:
        rows: [V, d] float16, bfloat16 or float32 on any device, where the work is then done; already in the metric wanted.
        cluster_size: slots of a cluster, at least 1. Fewer than cluster_size slots stay empty in all.
        iterations: assignments of all rows, at least 1; the best one is returned, not the last.
        seed: chooses the rows that the centroids start from.
        spherical: cluster directions (rows and centroids of unit length) by cosine; else by squared distance.
        progress: called after each iteration with its number (from 1), `iterations`, the objective, and the imbalance:
            rows whose nearest centroid is the most wanted one, over cluster_size, at the last search of all clusters.
    Raises:
        SettingsError: a shape, dtype or setting is out of range.
        CheckpointError: a row holds NaN or an infinity.
    """
    _check(rows, cluster_size, iterations)
    n_rows = len(rows)
    n_clusters = -(-n_rows // cluster_size)
    with torch.no_grad():
        points, scale = _prepare(rows, spherical)
        owner, filled = _fill_with_identical(points, cluster_size)
        rest = (owner < 0).nonzero().squeeze(1)
        # A unit row lies on the centroid of its copies: cosine 1, distance 0. A zero row has no cosine.
        settled = float(((owner >= 0) & (points.norm(dim=1) > 0.5)).sum()) if spherical else 0.0
        points = points[rest] if filled else points

        def whole(objective: float) -> float:
            return scale * (settled + objective * len(rest)) / n_rows

        def report(iteration: int, objective: float, imbalance: float) -> None:
            if progress is not None:
                progress(iteration, iterations, whole(objective), imbalance)

        if n_clusters - filled > 1:
            owner[rest], history = _iterate(points, n_clusters - filled, cluster_size, iterations, seed, spherical, report)
        else:
            owner[rest] = 0
            history = [_Members(points, owner[rest], n_clusters - filled, cluster_size, spherical).objective]
            report(iterations, history[0], 1.0)
        owner[rest] += filled
        table = _table(owner, n_clusters, cluster_size)
        return Clusters(
            token_table=table.to(torch.int32).cpu().numpy(),
            assignments=owner.cpu().numpy(),
            centroids=_means(rows, table).cpu().numpy(),
            objective=whole(max(history) if spherical else min(history)),
            history=tuple(whole(h) for h in history),
        )


def _check(rows: Tensor, cluster_size: int, iterations: int) -> None:
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        found = f"{list(rows.shape)} {str(rows.dtype).removeprefix('torch.')}"
        raise SettingsError(f"rows to cluster are {found}, expected [V, d] float16, bfloat16 or float32 with V and d at least 1; pass the head's weight")
    for name, value in (("cluster_size", cluster_size), ("iterations", iterations)):
        if value < 1:
            raise SettingsError(f"{name} is {value}, expected at least 1; choose a larger number")


def _prepare(rows: Tensor, spherical: bool) -> tuple[Tensor, float]:
    """A float32 copy, [V, d], of unit rows, or divided by the root mean square length (then that, squared, comes with it)."""
    points = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    squares = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    step = _step(rows, rows.shape[1])
    for i in range(0, len(rows), step):
        block = rows[i : i + step].float()
        largest = block.abs().amax(1, keepdim=True)  # the length of a row near the range of float32 would overflow
        unit = block / torch.where(largest > 0, largest, 1)
        length = unit.norm(dim=1, keepdim=True)
        points[i : i + step] = unit / length.clamp(min=1) if spherical else block
        squares[i : i + step] = (length.double() * largest.double()).square().squeeze(1)
    bad = (~squares.isfinite()).nonzero()
    if len(bad):
        raise CheckpointError(
            f"row {int(bad[0])} of the rows to cluster holds NaN or an infinity ({len(bad)} of {len(rows)} rows do), "
            "expected finite numbers; restore the head's weight file"
        )
    if spherical:
        return points, 1.0
    mean_square = float(squares.mean())
    if mean_square > 0:
        points *= mean_square**-0.5
    return points, mean_square


def _fill_with_identical(points: Tensor, cluster_size: int) -> tuple[Tensor, int]:
    """Put identical rows into whole clusters, as many as they fill: no better place exists, and no score tells them apart.

    Returns:
        The cluster of each row, [V] int64, -1 where not placed, and the number of clusters filled.
    """
    n_rows, d = points.shape
    device = points.device
    weights = torch.randint(-(1 << 62), 1 << 62, (d,), generator=torch.Generator().manual_seed(0)).to(device)
    hashes = torch.empty(n_rows, dtype=torch.int64, device=device)
    step = _step(points, d)
    for i in range(0, n_rows, step):
        bits = (points[i : i + step] + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are equal
        hashes[i : i + step] = (bits * weights).sum(1)
    order = torch.argsort(hashes, stable=True)
    _, group = torch.unique_consecutive(hashes[order], return_inverse=True)
    starts = _starts(group, int(group[-1]) + 1)
    place = torch.arange(n_rows, device=device) - starts[group]
    first = order[starts[group]]
    equal = torch.ones(n_rows, dtype=torch.bool, device=device)
    copies = (place > 0).nonzero().squeeze(1)
    for i in range(0, len(copies), step):
        at = copies[i : i + step]
        equal[at] = (points[order[at]] == points[first[at]]).all(1)
    order, group = order[equal], group[equal]  # a row that only shares the hash stays out
    starts = _starts(group, int(group[-1]) + 1)
    place = torch.arange(len(group), device=device) - starts[group]
    whole = torch.bincount(group) // cluster_size  # clusters that each group fills
    inside = place < whole[group] * cluster_size
    base = whole.cumsum(0) - whole
    owner = torch.full((n_rows,), -1, dtype=torch.int64, device=device)
    owner[order[inside]] = (base[group] + place // cluster_size)[inside]
    return owner, int(whole.sum())


def _step(on: Tensor, numbers: int) -> int:
    """How many items of so many numbers make a block of work on the tensor's device."""
    return max(1, (BLOCK if on.device.type == "cpu" else GPU_BLOCK) // numbers)


def _starts(group: Tensor, n_groups: int) -> Tensor:
    """Where each group begins in a sorted list of group numbers, [n_groups] int64."""
    count = torch.bincount(group, minlength=n_groups)
    return count.cumsum(0) - count


def _iterate(
    points: Tensor, n_clusters: int, cluster_size: int, iterations: int, seed: int, spherical: bool, report: Callable[[int, float, float], None]
) -> tuple[Tensor, list[float]]:
    """Assign and move centroids `iterations` times; the best assignment, [V] int64, and the objective after each."""
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:n_clusters]
    centroids = points[start.to(points.device)]
    capacity = torch.full((n_clusters,), cluster_size, dtype=torch.int64, device=points.device)
    members: _Members | None = None
    best: Tensor | None = None
    history: list[float] = []
    for n in range(iterations):
        # 1 for the first 60 %, then down to 0: rows stop moving, and what is left is plain k-means.
        left_out = min(1.0, 2.5 * (1 - n / iterations))
        if n == 0 or n % SEARCH_EVERY == 1:
            values, choices = _search(points, centroids, min(LISTED, n_clusters), spherical)
            imbalance = int(torch.bincount(choices[:, 0]).max()) / cluster_size
            bids_for = choices
        else:
            assert members is not None  # n > 0
            bids_for = choices[:, :NEAREST].clone()
            away = (bids_for != members.owner[:, None]).all(1)
            bids_for[away, -1] = members.owner[away]
            values = _values(points, centroids, bids_for, spherical)
        if members is not None:
            own = members.own_values(left_out)[:, None]
            values = torch.where(bids_for == members.owner[:, None], own, values)
        with _one_thread(points.device):
            owner = _auction(values, bids_for, capacity)
        _place_rest(points, centroids, owner, capacity, spherical)
        members = _Members(points, owner, n_clusters, cluster_size, spherical)
        centroids = members.centroids
        history.append(members.objective)
        if best is None or members.objective == (max(history) if spherical else min(history)):
            best = owner
        report(n + 1, members.objective, imbalance)
    assert best is not None
    return best, history


class _Members:
    """What one assignment gives: centroids, the objective, and each row's value in its own cluster without itself."""

    def __init__(self, points: Tensor, owner: Tensor, n_clusters: int, cluster_size: int, spherical: bool) -> None:
        self.owner = owner
        self._spherical = spherical
        table = _table(owner, n_clusters, cluster_size)
        n_rows, d = points.shape
        sums = torch.empty(n_clusters, d, device=points.device)
        self._dots = torch.empty(n_rows, device=points.device)  # row . sum of its cluster
        step = _step(points, cluster_size * d)
        for i in range(0, n_clusters, step):
            part = table[i : i + step]
            there = part >= 0
            rows = points[part.clamp(min=0)] * there[:, :, None]
            sums[i : i + step] = rows.sum(1)
            self._dots[part[there]] = torch.bmm(rows, sums[i : i + step, :, None]).squeeze(2)[there]
        self._counts = (table >= 0).sum(1)
        self._square_sums = sums.double().square().sum(1).float()
        self._squares = torch.linalg.vector_norm(points, dim=1).square()
        lengths = self._square_sums.sqrt()
        if spherical:
            self.centroids = sums / torch.where(lengths > 0, lengths, 1)[:, None]
            self.objective = float(lengths.double().sum()) / max(n_rows, 1)
        else:
            self.centroids = sums / self._counts.clamp(min=1)[:, None]
            within = self._squares.double().sum() - (self._square_sums.double() / self._counts.clamp(min=1)).sum()
            self.objective = max(0.0, float(within)) / max(n_rows, 1)

    def own_values(self, left_out: float) -> Tensor:
        """Each row's value in its own cluster, [V], with the share `left_out` of the row taken out of the centroid."""
        dots = self._dots - left_out * self._squares
        squares = self._square_sums[self.owner] - left_out * (self._dots + dots)
        squares = squares.clamp(min=0)
        if self._spherical:
            values: Tensor = (dots / squares.sqrt().clamp(min=1e-6)).clamp(-1, 1)
        else:
            counts = (self._counts[self.owner] - left_out).clamp(min=0.5)
            values = dots / counts - 0.5 * squares / counts.square()
        return values


def _search(points: Tensor, centroids: Tensor, listed: int, spherical: bool) -> tuple[Tensor, Tensor]:
    """The `listed` best clusters of each row: values [n, listed], best first, and cluster numbers [n, listed] int64.

    A value is the cosine, or the dot product minus half the centroid's squared length: the order of the squared distances.
    """
    values = torch.empty(len(points), listed, device=points.device)
    choices = torch.empty(len(points), listed, dtype=torch.int64, device=points.device)
    halves = None if spherical else 0.5 * centroids.square().sum(1)
    step = _step(points, len(centroids))
    for i in range(0, len(points), step):
        scores = points[i : i + step] @ centroids.T
        if halves is not None:
            scores -= halves
        values[i : i + step], choices[i : i + step] = scores.topk(listed, dim=1)
    return values, choices


def _values(points: Tensor, centroids: Tensor, choices: Tensor, spherical: bool) -> Tensor:
    """The values of the clusters listed in choices [n, c], as `_search` counts them, [n, c]."""
    values = torch.empty(choices.shape, device=points.device)
    step = _step(points, choices.shape[1] * points.shape[1])
    for i in range(0, len(points), step):
        values[i : i + step] = torch.bmm(centroids[choices[i : i + step]], points[i : i + step, :, None]).squeeze(2)
    if not spherical:
        values -= 0.5 * centroids.square().sum(1)[choices]
    return values


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, let torch use one thread: for many short operations, whose threads would mostly wait for one another.

    Beside other busy processes an auction takes 0.6 s so, and 9 to 45 s with two threads (49,152 rows, 2 cores).
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)


def _auction(values: Tensor, choices: Tensor, capacity: Tensor) -> Tensor:
    """Give rows to clusters so that the sum of values is nearly the largest that the capacities allow.

    All rows without a place bid at once, for the listed cluster of the largest value minus price. Equal bids go to
    the row that has the place, then to the smaller row number. Rows that go on outbidding one another after the last
    round have no place.

    Args:
        values: [n, c] float32; choices: cluster numbers, [n, c] int64, each once in a row; capacity: [K] int64.
    Returns:
        Cluster numbers, [n] int64, -1 where the row has none; no cluster has more than its capacity.
    """
    n_clusters, device = len(capacity), values.device
    slots = int(capacity.max())
    spread = (values.amax(1) - values.amin(1)).mean()
    least = (STEP * spread).clamp(min=LEAST_STEP)
    price = torch.zeros(n_clusters, device=device)
    held = torch.full((n_clusters, slots), -1, dtype=torch.int64, device=device)
    held_bids = torch.full((n_clusters, slots), -math.inf, device=device)
    bidders = torch.arange(len(values), device=device)
    for _ in range(ROUNDS):
        if len(bidders) == 0:
            break
        net = values[bidders] - price[choices[bidders]]
        top, at = net.topk(min(2, net.shape[1]), dim=1)
        wanted = choices[bidders].gather(1, at[:, :1]).squeeze(1)
        bids = price[wanted] + (top[:, 0] - top[:, -1]) + least
        touched = torch.unique(wanted)
        kept = held[touched] >= 0
        rows = torch.cat([held[touched][kept], bidders])
        clusters = torch.cat([touched[:, None].expand(-1, slots)[kept], wanted])
        bids = torch.cat([held_bids[touched][kept], bids])
        bits = bids.view(torch.int32)
        ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of the floats, as integers
        order = torch.argsort((clusters << 32) - ascending, stable=True)  # by cluster, then by bid, highest first
        rows, clusters, bids = rows[order], clusters[order], bids[order]
        rank = torch.arange(len(rows), device=device) - _starts(clusters, n_clusters)[clusters]
        inside = rank < capacity[clusters]
        held[touched] = -1
        held[clusters[inside], rank[inside]] = rows[inside]
        held_bids[clusters[inside], rank[inside]] = bids[inside]
        last = capacity[touched] - 1
        full = held[touched, last] >= 0
        price[touched[full]] = held_bids[touched[full], last[full]]
        bidders = rows[~inside].sort().values
    owner = torch.full((len(values),), -1, dtype=torch.int64, device=device)
    there = held >= 0
    owner[held[there]] = torch.arange(n_clusters, device=device)[:, None].expand(-1, slots)[there]
    return owner


def _place_rest(points: Tensor, centroids: Tensor, owner: Tensor, capacity: Tensor, spherical: bool) -> None:
    """Give the rows without a place (owner -1, set here) to clusters with room, by auctions over their nearest of those."""
    rest = (owner < 0).nonzero().squeeze(1)
    before = math.inf
    while len(rest):
        room = capacity - torch.bincount(owner[owner >= 0], minlength=len(capacity))
        roomy = (room > 0).nonzero().squeeze(1)
        if len(rest) > 0.5 * before:  # rows that no score tells apart: any place is as good
            owner[rest] = roomy.repeat_interleave(room[roomy])[: len(rest)]
            return
        before = len(rest)
        values, choices = _search(points[rest], centroids[roomy], min(LISTED_OPEN, len(roomy)), spherical)
        with _one_thread(points.device):
            found = _auction(values, choices, room[roomy])
        placed = found >= 0
        owner[rest[placed]] = roomy[found[placed]]
        rest = rest[~placed]


def _table(owner: Tensor, n_clusters: int, cluster_size: int) -> Tensor:
    """Row numbers by cluster, [K, cluster_size] int64, ascending, then -1."""
    order = torch.argsort(owner, stable=True)
    clusters = owner[order]
    rank = torch.arange(len(owner), device=owner.device) - _starts(clusters, n_clusters)[clusters]
    table = torch.full((n_clusters, cluster_size), -1, dtype=torch.int64, device=owner.device)
    table[clusters, rank] = order
    return table


def _means(rows: Tensor, table: Tensor) -> Tensor:
    """The mean of each cluster's rows, [K, d] float32."""
    means = torch.empty(len(table), rows.shape[1], device=rows.device)
    step = _step(rows, table.shape[1] * rows.shape[1])
    for i in range(0, len(table), step):
        part = table[i : i + step]
        there = part >= 0
        shares = there / there.sum(1, keepdim=True)  # before the sum: it cannot overflow then
        means[i : i + step] = (rows[part.clamp(min=0)].float() * shares[:, :, None]).sum(1)
    return means
