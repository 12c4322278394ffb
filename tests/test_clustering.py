"""Equal-size clustering: every shape, hostile rows, reproducibility, and how good the clusters are."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch

from flashhead_edge import clustering
from flashhead_edge.bench.clustering import made_rows
from flashhead_edge.clustering import Clusters, cluster
from flashhead_edge.errors import CheckpointError, SettingsError


def rows_of(n_rows: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    return made_rows(n_rows, d, torch.float32, seed)


def check(found: Clusters, rows: torch.Tensor, cluster_size: int) -> None:
    """Every promise about shapes, dtypes, slots and centroids."""
    n_rows, d = rows.shape
    n_clusters = -(-n_rows // cluster_size)
    table = found.token_table
    assert table.shape == (n_clusters, cluster_size) and table.dtype == np.int32
    assert found.assignments.shape == (n_rows,) and found.assignments.dtype == np.int64
    assert found.centroids.shape == (n_clusters, d) and found.centroids.dtype == np.float32
    assert np.array_equal(np.sort(table[table >= 0]), np.arange(n_rows))
    assert ((table >= 0).sum(1) >= 1).all()
    for members in table:
        count = int((members >= 0).sum())
        assert (members[count:] == -1).all() and (np.diff(members[:count]) > 0).all()
    clusters, slots = np.nonzero(table >= 0)
    assert np.array_equal(found.assignments[table[clusters, slots]], clusters)
    sums = torch.zeros(n_clusters, d, dtype=torch.float64).index_add_(0, torch.from_numpy(found.assignments), rows.double())
    counts = np.bincount(found.assignments, minlength=n_clusters)
    largest = rows.double().abs().max().item()
    assert np.allclose(found.centroids, sums.numpy() / counts[:, None], rtol=0, atol=cluster_size * 2**-24 * largest)


def objective_of(found: Clusters, rows: torch.Tensor, spherical: bool) -> float:
    """The objective by its definition, in float64."""
    rows = rows.double()
    owner = torch.from_numpy(found.assignments)
    n_clusters = len(found.token_table)
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=1, eps=1e-300)
    sums = torch.zeros(n_clusters, rows.shape[1], dtype=torch.float64).index_add_(0, owner, rows)
    if spherical:
        return (rows * torch.nn.functional.normalize(sums, dim=1)[owner]).sum(1).mean().item()
    means = sums / torch.bincount(owner, minlength=n_clusters)[:, None]
    return (rows - means[owner]).square().sum(1).mean().item()


@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 16, 17, 31, 97, 256, 1000, 1031])
@pytest.mark.parametrize("cluster_size", [1, 2, 3, 16, 64])
def test_any_number_of_rows_and_any_size(n_rows: int, cluster_size: int, spherical: bool) -> None:
    rows = rows_of(n_rows)
    found = cluster(rows, cluster_size, spherical=spherical, iterations=6)
    check(found, rows, cluster_size)
    assert found.objective == pytest.approx(objective_of(found, rows, spherical), abs=1e-4)
    assert found.objective == (max if spherical else min)(found.history)


@pytest.mark.parametrize("n_rows", [50_257, 65_536])
def test_the_vocabularies_of_the_issue(n_rows: int) -> None:
    rows = made_rows(n_rows, 8, torch.float16, 0)
    check(cluster(rows, 16, iterations=2), rows, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_every_dtype(dtype: torch.dtype) -> None:
    rows = rows_of(500).to(dtype)
    before = rows.clone()
    check(cluster(rows, 16, iterations=5), rows, 16)
    assert torch.equal(rows, before)


HOSTILE = {
    "all equal": lambda: torch.ones(333, 8),
    "all zero": lambda: torch.zeros(333, 8),
    "zeros, and more than a cluster of them": lambda: torch.cat([torch.zeros(40, 8), rows_of(293, 8)]),
    "fewer distinct rows than clusters": lambda: rows_of(3, 8).repeat(111, 1),
    "equal up to rounding": lambda: torch.ones(2000, 8) + 1e-7 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)),
    "one direction, two signs": lambda: torch.tensor([[1.0], [-1.0]]).repeat(100, 8),
    "one column": lambda: torch.linspace(-1, 1, 333)[:, None],
    "zero and minus zero": lambda: torch.tensor([[0.0, 1.0], [-0.0, 1.0]]).repeat(50, 1),
    "lengths near the ends of float32": lambda: rows_of(333, 8) * torch.tensor([1e-37, 1.0, 1e37]).repeat(111)[:, None],
    "one far row": lambda: torch.cat([rows_of(332, 8), torch.full((1, 8), 1e6)]),
}


@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows(name: str, spherical: bool) -> None:
    rows = HOSTILE[name]()
    found = cluster(rows, 16, spherical=spherical, iterations=6)
    check(found, rows, 16)
    assert np.isfinite(found.history).all()
    wanted = objective_of(found, rows, spherical)
    assert found.objective == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_identical_rows_fill_clusters_of_their_own() -> None:
    rows = rows_of(400, 8)
    rows[torch.randperm(400, generator=torch.Generator().manual_seed(1))[:50]] = rows[7].clone()
    same = (rows == rows[7]).all(1).numpy()
    found = cluster(rows, 16, iterations=5)
    pure = [bool(same[m].all()) for m in found.token_table if (m >= 0).all()]
    assert sum(pure) == same.sum() // 16


def test_zero_and_minus_zero_are_identical() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0]]).repeat(4, 1)
    assert clustering._fill_with_identical(rows, 8)[1] == 1


def test_rows_that_only_share_a_hash_are_not_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashes equal: the comparison of the rows themselves decides."""
    monkeypatch.setattr(clustering.torch, "randint", lambda *a, **k: torch.zeros(8, dtype=torch.int64))
    rows = rows_of(100, 8)
    owner, filled = clustering._fill_with_identical(rows.clone(), 4)
    groups = [np.flatnonzero(owner.numpy() == k) for k in range(filled)]
    assert all((rows[g] == rows[g[0]]).all() for g in groups)


@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
def test_planted_clusters_are_found(spherical: bool) -> None:
    """64 far groups of 16: each must be one cluster, whatever rows the centroids start from."""
    random = torch.Generator().manual_seed(3)
    centres = torch.randn(64, 32, generator=random)
    rows = centres.repeat_interleave(16, 0) + 0.1 * torch.randn(1024, 32, generator=random)
    shuffle = torch.randperm(1024, generator=random)
    found = cluster(rows[shuffle], 16, spherical=spherical)
    truth = (shuffle // 16).numpy()
    pure = [len(set(truth[m])) == 1 for m in found.token_table]
    assert np.mean(pure) >= 0.9


@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
def test_objective_is_within_two_percent_of_ten_times_the_iterations(spherical: bool) -> None:
    rows = made_rows(800, 24, torch.float32, 0)
    short = cluster(rows, 16, spherical=spherical)
    long = cluster(rows, 16, spherical=spherical, iterations=10 * clustering.ITERATIONS)
    assert short.objective == pytest.approx(long.objective, rel=0.02)


def test_better_than_nearest_first_assignment_with_the_row_in_its_centroid() -> None:
    """What the plain way reaches: sort all pairs by cosine, take them while there is room, 24 times."""
    rows = torch.nn.functional.normalize(made_rows(800, 24, torch.float32, 0), dim=1)
    centroids = rows[torch.randperm(800, generator=torch.Generator().manual_seed(0))[:50]]
    best = 0.0
    for _ in range(24):
        owner = np.full(800, -1)
        room = np.full(50, 16)
        for pair in (rows @ centroids.T).flatten().argsort(descending=True, stable=True).tolist():
            row, k = divmod(pair, 50)
            if owner[row] < 0 and room[k]:
                owner[row] = k
                room[k] -= 1
        sums = torch.zeros(50, 24).index_add_(0, torch.from_numpy(owner), rows)
        best = max(best, sums.norm(dim=1).sum().item() / 800)
        centroids = torch.nn.functional.normalize(sums, dim=1)
    assert cluster(rows, 16).objective > 1.01 * best


def test_same_seed_same_clusters_with_and_without_progress() -> None:
    rows = rows_of(2000)
    calls: list[tuple[int, int, float, float]] = []
    first = cluster(rows, 16, seed=5, iterations=7, progress=lambda *call: calls.append(call))
    torch.rand(3)
    second = cluster(rows, 16, seed=5, iterations=7)
    other = cluster(rows, 16, seed=6, iterations=7)
    assert np.array_equal(first.token_table, second.token_table) and first.history == second.history
    assert not np.array_equal(first.token_table, other.token_table)
    assert [c[:2] for c in calls] == [(n, 7) for n in range(1, 8)]
    assert tuple(c[2] for c in calls) == first.history
    assert all(c[3] >= 1 for c in calls)


def test_torch_s_own_random_state_and_threads_stay() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        cluster(rows_of(300), 16, iterations=3)
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_progress_can_stop_the_run() -> None:
    def stop(*_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster(rows_of(300), 16, progress=stop)


def test_values_order_clusters_as_squared_distances_do() -> None:
    random = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(50, 8, generator=random), 3 * torch.randn(20, 8, generator=random)
    distances = torch.cdist(points.double(), centroids.double()).square()
    wanted, order = distances.sort(dim=1)
    values, choices = clustering._search(points, centroids, 6, spherical=False)
    assert torch.equal(choices, order[:, :6])
    back = points.double().square().sum(1, keepdim=True) - 2 * values  # |p|^2 - 2 (p.c - |c|^2 / 2)
    assert torch.allclose(back, wanted[:, :6], rtol=0, atol=1e-3)
    assert torch.allclose(clustering._values(points, centroids, choices, spherical=False), values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
def test_own_value_leaves_the_row_out_of_its_centroid(spherical: bool) -> None:
    points = torch.nn.functional.normalize(rows_of(40, 8), dim=1)
    members = clustering._Members(points, torch.arange(40) % 5, 5, 8, spherical)
    found = members.own_values(1.0)
    for row in range(40):
        others = points[[r for r in range(row % 5, 40, 5) if r != row]].mean(0)
        wanted = points[row] @ others / others.norm() if spherical else points[row] @ others - 0.5 * others @ others
        assert found[row].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_rows_that_no_score_tells_apart_are_placed_in_a_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 rows of one value for every cluster: the lists hold 64 of 250 clusters, the rest of the rows fill up what is left."""
    auctions = []
    auction = clustering._auction
    monkeypatch.setattr(clustering, "_auction", lambda *a: (auctions.append(1), auction(*a))[1])
    owner = torch.full((4000,), -1)
    clustering._place_rest(torch.ones(4000, 4), torch.ones(250, 4), owner, torch.full((250,), 16), True)
    assert (torch.bincount(owner, minlength=250) == 16).all()
    assert len(auctions) == 1


def test_auction_is_near_the_best_assignment() -> None:
    """Against all 5,040 assignments of 7 rows to 7 places: at most 7 raises of a bid below the best."""
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.rand(7, 7, generator=random)
        choices = torch.arange(7).repeat(7, 1)
        owner = clustering._auction(values, choices, torch.ones(7, dtype=torch.int64))
        assert sorted(owner.tolist()) == list(range(7))
        best = max(values[range(7), list(p)].sum().item() for p in permutations(range(7)))
        raise_of_a_bid = clustering.STEP * (values.amax(1) - values.amin(1)).mean().item()
        assert values[range(7), owner].sum().item() >= best - 7 * raise_of_a_bid - 1e-5


def test_auction_keeps_to_unequal_capacities_and_lists() -> None:
    random = torch.Generator().manual_seed(0)
    values, choices = torch.rand(300, 40, generator=random).topk(5, dim=1)
    capacity = torch.randint(1, 9, (40,), generator=random)
    owner = clustering._auction(values, choices, capacity)
    placed = owner >= 0
    assert (torch.bincount(owner[placed], minlength=40) <= capacity).all()
    assert (choices[placed] == owner[placed, None]).any(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spherical", [True, False])
def test_rows_that_are_not_finite_are_refused(value: float, spherical: bool) -> None:
    rows = rows_of(50)
    rows[13, 2] = rows[40, 3] = value
    text = r"^row 13 of the rows to cluster holds NaN or an infinity \(2 of 50 rows do\), expected finite numbers; restore the head's weight file$"
    with pytest.raises(CheckpointError, match=text):
        cluster(rows, 16, spherical=spherical)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (torch.ones(4), r"\[4\] float32"),
        (torch.ones(0, 4), r"\[0, 4\] float32"),
        (torch.ones(4, 0), r"\[4, 0\] float32"),
        (torch.ones(4, 4).int(), r"\[4, 4\] int32"),
    ],
)
def test_rows_of_a_wrong_shape_or_dtype_are_refused(rows: torch.Tensor, found: str) -> None:
    with pytest.raises(SettingsError, match=f"^rows to cluster are {found}, expected .*; pass the head's weight$"):
        cluster(rows, 16)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingsError, match="^cluster_size is 0, expected at least 1; choose a larger number$"):
        cluster(rows_of(4), 0)
    with pytest.raises(SettingsError, match="^iterations is -1, expected at least 1; choose a larger number$"):
        cluster(rows_of(4), 2, iterations=-1)


@pytest.mark.gpu
def test_gpu_by_the_same_code() -> None:
    rows = made_rows(5000, 64, torch.float16, 0)
    here, there = cluster(rows, 16), cluster(rows.cuda(), 16)
    again = cluster(rows.cuda(), 16)
    check(there, rows, 16)
    assert there.objective == pytest.approx(here.objective, rel=0.005)
    assert np.array_equal(there.token_table, again.token_table)


@pytest.mark.slow
def test_the_shape_of_smollm2() -> None:
    rows = made_rows(49_152, 576, torch.float16, 0)
    found = cluster(rows, 16)
    check(found, rows.float(), 16)
    assert found.token_table.shape == (3072, 16)
    assert found.objective > found.history[0] > 0.7


def test_bench_prints_one_json_document() -> None:
    words = ["--shape", "300x8", "--size", "16", "--iterations", "2", "--compare", "--json"]
    done = subprocess.run([sys.executable, "-m", "flashhead_edge.bench.clustering", *words], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert record["shape"] == [300, 8] and record["clusters"] == 19 and record["ten_times"]["iterations"] == 20
    assert record["ratio_to_ten_times"] == record["objective"] / record["ten_times"]["objective"]
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 0 and record["imbalance"] >= 1
    assert "iteration 2 of 2" in done.stderr


def test_bench_refuses_a_bad_shape_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "flashhead_edge.bench.clustering", "--shape", "300"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "SettingsError: --shape is '300', expected rows and columns such as 49152x576; give two numbers of at least 1\n"
