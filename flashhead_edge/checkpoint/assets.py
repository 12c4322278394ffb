"""A head index on disk: our own files, and the two-file layout of released checkpoints. numpy only.

docs/checkpoints.md is the page on the format; FORMAT_VERSION of index.py its version.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.checkpoint.tensors import read_array, read_arrays, read_header
from flashhead_edge.checkpoint.vocabulary import returnable_tokens
from flashhead_edge.codes import Coded
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import FORMAT_VERSION, Gate, HeadIndex, Stage, default_probes

if TYPE_CHECKING:
    from flashhead_edge.checkpoint.weights import HeadWeights

ASSETS = "flash_head_assets"
INDEX_FILE = "index.safetensors"
CLUSTERS_FILE = "clustering_cache.safetensors"
CLUSTERS_CONFIG = "clustering_config.json"
CODED = ("data", "scale", "widths", "steps", "group_ends", "codebook")
AGAIN = "run flashhead convert again, or restore the file"


@dataclass(frozen=True, eq=False)
class PublishedClusters:
    """What the published method needs on the same head."""

    centroids: np.ndarray  # [K, d] float32, member means, not of unit length
    assignments: np.ndarray  # [V] int64, cluster of each token
    n_probes: int  # clusters that the published method opens

    def __post_init__(self) -> None:
        def want(ok: bool, what: str, found: object, expected: object) -> None:
            if not ok:
                raise CheckpointError(f"published clusters: {what} is {found}, expected {expected}; {AGAIN}")

        c, a = self.centroids, self.assignments
        want(c.dtype == np.float32 and c.ndim == 2 and c.size > 0, "centroids", f"{c.dtype} {list(c.shape)}", "float32 [K, d]")
        want(bool(np.isfinite(c).all()), "centroids", "not finite", "finite values")
        want(a.dtype == np.int64 and a.ndim == 1 and a.size > 0, "cluster_assignments", f"{a.dtype} {list(a.shape)}", "int64 [V]")
        want(bool(a.min() >= 0 and a.max() < len(c)), "cluster_assignments", f"{a.min()} to {a.max()}", f"0 to {len(c) - 1}")
        want(1 <= self.n_probes <= len(c), "n_probes", self.n_probes, f"1 to {len(c)}")


def index_arrays(index: HeadIndex) -> dict[str, np.ndarray]:
    """The arrays of index.safetensors."""
    arrays: dict[str, np.ndarray] = {"token_table": index.token_table, "always_scored": index.always_scored}

    def coded(name: str, code: Coded) -> None:
        arrays.update({f"{name}.{field}": getattr(code, field) for field in CODED if getattr(code, field) is not None})

    coded("centroids", index.centroids)
    arrays["probe.error"] = index.probe.error
    for i, stage in enumerate(index.stages, 1):
        coded(f"stage.{i}", stage.rows)
        arrays[f"stage.{i}.error"] = stage.gate.error
    if index.mean is not None and index.rotation is not None:
        arrays["mean"] = index.mean
        coded("rotation", index.rotation)
    gates = _gates(index)
    arrays["units"] = np.array([g.unit for g in gates], np.float64)
    arrays["margins"] = np.array([g.margin for g in gates], np.float64)
    arrays["caps"] = np.array([g.cap for g in gates], np.int64)
    return arrays


def index_settings(index: HeadIndex, data: Iterable[bytes]) -> dict[str, Any]:
    """The `flash_head` object of config.json.

    Args:
        data: the bytes of index.safetensors, for their hash.
    """
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)

    def code(coded: Coded) -> dict[str, Any]:
        return {"kind": coded.kind, "columns": coded.columns}

    def gate(g: Gate) -> dict[str, Any]:  # JSON has no infinity: null keeps everything up to the cap
        return {"margin": None if math.isinf(g.margin) else float(g.margin), "cap": int(g.cap)}

    return {
        "format_version": FORMAT_VERSION,
        "vocab_size": int(index.vocab_size),
        "hidden_size": int(index.hidden_size),
        "n_clusters": index.n_clusters,
        "cluster_size": index.cluster_size,
        "fingerprint": index.fingerprint,
        "index_sha256": digest.hexdigest(),
        "rotation": None if index.rotation is None else code(index.rotation),
        "probe": code(index.centroids) | gate(index.probe),
        "stages": [code(s.rows) | gate(s.gate) for s in index.stages],
        "tail": {"scale": float(index.tail_scale), "offset": float(index.tail_offset)},
        "state_power": float(index.state_power),
        "summary": index.summary,
    }


def _gates(index: HeadIndex) -> list[Gate]:
    return [index.probe, *(s.gate for s in index.stages)]


def asset_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where a checkpoint's assets lie.

    Raises:
        CheckpointError: the folder is no FlashHead checkpoint.
    """
    named = config.get("flash_head_cache_dir")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{folder}: config.json has no flash_head_cache_dir, expected a FlashHead checkpoint; make one with flashhead convert")
    return folder / named  # an absolute path stays as it is


def read_index(folder: str | Path, head: HeadWeights | None = None) -> HeadIndex:
    """Read a checkpoint's index: our own, or of a released two-file checkpoint the published head.

    Args:
        head: the head that it will work on; its fingerprint and size are checked.
    Raises:
        CheckpointError: a file is missing or damaged, an array breaks a rule, or the index belongs to another head.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    assets = asset_folder(folder, config)
    if "flash_head" in config:
        if not isinstance(config["flash_head"], dict):
            raise CheckpointError(f"{folder / 'config.json'}: flash_head is {config['flash_head']!r}, expected an object; {AGAIN}")
        index = _read_ours(assets / INDEX_FILE, config["flash_head"])
    else:
        index = published_index(read_published(folder), folder, config, head)
    if head is not None and index.fingerprint != head.fingerprint:
        raise CheckpointError(
            f"{folder}: the index was made for the head {index.fingerprint[:19]}..., found {head.fingerprint[:19]}...; run flashhead convert on this model"
        )
    if head is not None and (index.vocab_size > len(head.weight) or index.hidden_size != head.weight.shape[1]):
        raise CheckpointError(
            f"{folder}: the head is {list(head.weight.shape)}, expected [{index.vocab_size}, {index.hidden_size}], for which the index was made; {AGAIN}"
        )
    return index


def _read_ours(path: Path, settings: Mapping[str, Any]) -> HeadIndex:
    """Our own index from its file and the `flash_head` object of config.json."""
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        step = "install a newer flashhead-edge" if isinstance(version, int) and version > FORMAT_VERSION else AGAIN
        raise CheckpointError(f"{path.parent}: format version {version}, expected {FORMAT_VERSION}, which this flashhead-edge reads; {step}")
    arrays = read_arrays(path)

    def take(name: str, dtype: type, ndim: int) -> np.ndarray:
        array = arrays.pop(name, None)
        if array is None or array.dtype != dtype or array.ndim != ndim:
            found = "absent" if array is None else f"{array.dtype} {list(array.shape)}"
            raise CheckpointError(f"{path}: {name} is {found}, expected {np.dtype(dtype)} with {ndim} axes; {AGAIN}")
        return array

    def coded(name: str, setting: Mapping[str, Any]) -> Coded:
        data, *others = (arrays.pop(f"{name}.{field}", None) for field in CODED)
        if data is None:
            raise CheckpointError(f"{path}: {name}.data is absent, expected uint8 [n, bytes]; {AGAIN}")
        try:
            return Coded(kind=setting["kind"], columns=int(setting["columns"]), data=data, **dict(zip(CODED[1:], others)))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    try:
        rotation, stages, summary = settings["rotation"], settings["stages"], settings["summary"]
        units, margins, caps = take("units", np.float64, 1), take("margins", np.float64, 1), take("caps", np.int64, 1)
        said = [settings["probe"], *stages]
        for name, values, found in (
            ("margins", margins, [math.inf if s["margin"] is None else s["margin"] for s in said]),
            ("caps", caps, [s["cap"] for s in said]),
        ):
            if values.tolist() != found:
                raise CheckpointError(f"{path}: {name} are {values.tolist()}, expected {found} as config.json says; {AGAIN}")
        if units.shape != margins.shape:
            raise CheckpointError(f"{path}: units is {list(units.shape)}, expected {list(margins.shape)}; {AGAIN}")

        def gate(i: int, name: str) -> Gate:
            return Gate(take(f"{name}.error", np.uint8, 1), float(units[i]), float(margins[i]), int(caps[i]))

        table = take("token_table", np.int32, 2)
        want = [settings["n_clusters"], settings["cluster_size"]]
        if list(table.shape) != want:
            raise CheckpointError(f"{path}: token_table is {list(table.shape)}, expected {want} as config.json says; {AGAIN}")
        index = HeadIndex(
            vocab_size=int(settings["vocab_size"]),
            hidden_size=int(settings["hidden_size"]),
            token_table=table,
            centroids=coded("centroids", settings["probe"]),
            probe=gate(0, "probe"),
            stages=tuple(Stage(coded(f"stage.{i}", s), gate(i, f"stage.{i}")) for i, s in enumerate(stages, 1)),
            always_scored=take("always_scored", np.int32, 1),
            mean=None if rotation is None else take("mean", np.float32, 1),
            rotation=None if rotation is None else coded("rotation", rotation),
            tail_scale=float(settings["tail"]["scale"]),
            tail_offset=float(settings["tail"]["offset"]),
            fingerprint=str(settings["fingerprint"]),
            summary=summary,
            state_power=float(settings["state_power"]),
        )
        stated = str(settings["index_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.parent.parent / 'config.json'}: the object flash_head does not have the expected form ({error!r}); {AGAIN}") from error
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    if arrays:
        raise CheckpointError(f"{path}: {', '.join(sorted(arrays))} found, expected only the arrays of format version {FORMAT_VERSION}; {AGAIN}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != stated:
        raise CheckpointError(f"{path}: a value has changed, expected the SHA-256 that config.json names; {AGAIN}")
    return index


def read_published(folder: str | Path) -> PublishedClusters:
    """The clusters that the published method uses, of our checkpoints and of released ones.

    Raises:
        CheckpointError: a file is missing or damaged, or a shape or dtype is wrong.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    path = asset_folder(folder, config) / CLUSTERS_FILE
    header = read_header(path)
    for name in ("centroids", "cluster_assignments"):
        if name not in header:
            raise CheckpointError(f"{path}: {name} is absent, expected centroids and cluster_assignments; {AGAIN}")
    centroids = read_array(path, "centroids", header["centroids"])
    assignments = read_array(path, "cluster_assignments", header["cluster_assignments"])
    if centroids.ndim == 4 and centroids.shape[:2] == (1, 1):
        centroids = centroids[0, 0]
    hidden = families.text_config(config).get("hidden_size") or families.text_config(config).get("n_embd")
    if not np.issubdtype(centroids.dtype, np.floating) or centroids.ndim != 2 or (isinstance(hidden, int) and centroids.shape[0] != hidden):
        found = f"{centroids.dtype} {list(header['centroids'].shape)}"
        raise CheckpointError(f"{path}: centroids is {found}, expected floats [{hidden or 'd'}, K] or [1, 1, {hidden or 'd'}, K]; {AGAIN}")
    if not np.issubdtype(assignments.dtype, np.integer) or assignments.ndim != 1:
        raise CheckpointError(f"{path}: cluster_assignments is {assignments.dtype} {list(assignments.shape)}, expected integers [V]; {AGAIN}")
    n_probes = config.get("n_probes") or default_probes(centroids.shape[1])
    if not isinstance(n_probes, int):
        raise CheckpointError(f"{folder / 'config.json'}: n_probes is {n_probes!r}, expected a whole number; restore the file")
    try:
        return PublishedClusters(np.ascontiguousarray(centroids.T, np.float32), assignments.astype(np.int64), n_probes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def published_index(clusters: PublishedClusters, folder: Path, config: dict[str, Any], head: HeadWeights | None = None) -> HeadIndex:
    """The published head as an index: unit centroids, the best `n_probes` clusters, exact rows.

    Raises:
        CheckpointError: a cluster is empty or larger than ceil(V / K), or a special token is out of range.
    """
    where = folder / ASSETS / CLUSTERS_FILE
    k, d = clusters.centroids.shape
    rows = clusters.assignments.size
    counts = np.bincount(clusters.assignments, minlength=k)
    size = -(-rows // k)
    if counts.max() > size or counts.min() == 0:
        raise CheckpointError(
            f"{where}: the clusters hold {counts.min()} to {counts.max()} tokens, expected {size} in each (fewer only where {rows} tokens "
            f"do not fill {k} clusters); use a checkpoint with equal clusters"
        )
    V = head.vocab_size if head is not None else returnable_tokens(folder, config, rows)
    V = min(V, rows)
    order = np.argsort(clusters.assignments[:V], kind="stable")  # ids ascend within a cluster; padding is in none
    home = clusters.assignments[:V][order]
    table = np.full((k, size), -1, np.int32)
    table[home, np.arange(V) - np.searchsorted(home, home)] = order
    length = np.linalg.norm(clusters.centroids, axis=1, keepdims=True)
    unit = (clusters.centroids / np.maximum(length, 1e-12)).astype(np.float16)
    special = config.get("flash_head_special_token_ids") or []
    try:
        always = np.unique(np.atleast_1d(np.array(special, np.int32)))
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: flash_head_special_token_ids is {special!r}, expected token ids; restore the file") from error
    if always.size and (always[0] < 0 or always[-1] >= V):
        found = f"{always[0]} to {always[-1]}"
        raise CheckpointError(f"{folder / 'config.json'}: flash_head_special_token_ids has {found}, expected ids below {V}; restore the file")
    return HeadIndex(
        vocab_size=V,
        hidden_size=d,
        token_table=table,
        centroids=Coded("float16", d, unit.view(np.uint8).reshape(k, 2 * d)),
        probe=Gate(np.zeros(k, np.uint8), 1.0, math.inf, clusters.n_probes),
        stages=(),
        always_scored=always,
        mean=None,
        rotation=None,
        tail_scale=float(length.mean()),  # cosine times length: the mean logit of a cluster's members
        tail_offset=0.0,
        fingerprint="" if head is None else head.fingerprint,
        summary={"head": "published"},
    )


def to_json(value: Any) -> str:
    """JSON as we write it: indented, numpy numbers and arrays as plain ones.

    Raises:
        CheckpointError: a value that JSON does not have.
    """

    def plain(item: Any) -> Any:
        if isinstance(item, (np.generic, np.ndarray)):
            return item.tolist()
        raise TypeError(f"{type(item).__name__} {item!r}")

    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: a setting cannot be written as JSON ({error}), expected numbers, texts, lists and objects; correct the summary"
        ) from error
