"""The format: what is written reads back identically, released files read, and each rule has a test that breaks it."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import NAMED, clusters_of, save_model
from small_heads import everything_open, few_probes, gate

from flashhead_edge.checkpoint import PublishedClusters, open_source, read_head, read_index, read_published, write_checkpoint
from flashhead_edge.checkpoint.tensors import pack_arrays, read_arrays
from flashhead_edge.codes import Coded
from flashhead_edge.coding import encode
from flashhead_edge.errors import CheckpointError
from flashhead_edge.index import Gate, HeadIndex, Stage
from flashhead_edge.reference import dense_tokens, torch_head

INDEX = Path("flash_head_assets/index.safetensors")
CLUSTERS = Path("flash_head_assets/clustering_cache.safetensors")


def same(a: object, b: object) -> bool:
    """Equal to the bit: dataclasses by their fields, arrays by dtype, shape and bytes."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (HeadIndex, Gate, Stage, Coded)):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def rich_index(weight: torch.Tensor, fingerprint: str, V: int = NAMED) -> HeadIndex:
    """An index that uses every kind of code and every setting, each with a value of its own."""
    index = everything_open(weight, cascade=True, vocab_size=V, fingerprint=fingerprint)
    generator = np.random.default_rng(5)
    wide = torch.from_numpy(generator.normal(size=(index.slots, 17)).astype(np.float32))
    rows = [encode(wide, code) for code in ("product3", "bits4", "int4/8", "int8/64", "float16")]

    def some(n: int, margin: float, cap: int) -> Gate:
        return Gate(generator.integers(0, 256, n).astype(np.uint8), 0.1 + 1 / 3, margin, cap)

    return replace(
        index,
        probe=some(index.n_clusters, 2.0 / 3.0, 5),
        centroids=encode(wide[: index.n_clusters], "int3/8"),
        stages=tuple(Stage(r, some(index.slots, m, 7 + i)) for i, (r, m) in enumerate(zip(rows, (math.inf, 0.0, 1e-300, math.pi, 3.5)))),
        tail_scale=0.1,
        tail_offset=-1 / 7,
        state_power=0.3,
        summary={"head": "fitted", "texts": [{"name": "Zählen", "sha256": "ab"}], "numbers": [1, 2.5, None, True], "share": 0.1 + 0.2},
    )


def write(folder: Path, out: Path, index: HeadIndex) -> Path:
    source = open_source(folder)
    write_checkpoint(source, out, index, clusters_of(read_head(source).weight, index.vocab_size))
    return out


@pytest.mark.parametrize("kind", ["rich", "open", "published"])
def test_round_trip_is_identical(kind: str, model_folder: Path, tmp_path: Path) -> None:
    head = read_head(model_folder)
    index = {
        "rich": lambda: rich_index(head.weight, head.fingerprint),
        "open": lambda: everything_open(head.weight, vocab_size=NAMED, fingerprint=head.fingerprint),
        "published": lambda: few_probes(head.weight, 3, vocab_size=NAMED, fingerprint=head.fingerprint),
    }[kind]()
    out = write(model_folder, tmp_path / "out", index)
    again = read_head(out)
    assert again.fingerprint == head.fingerprint and again.vocab_size == NAMED
    got = read_index(out, again)
    assert same(got, index)
    assert not same(replace(got, tail_offset=0.5), index)  # the comparison can fail
    clusters, want = read_published(out), clusters_of(head.weight, NAMED)
    assert same(clusters.centroids, want.centroids) and same(clusters.assignments, want.assignments) and clusters.n_probes == want.n_probes


def test_every_field_is_stored() -> None:
    """A field that index.py gains must be written too: then extend assets.py, this list and rich_index."""
    assert {f.name for f in fields(HeadIndex)} == {
        "vocab_size", "hidden_size", "token_table", "centroids", "probe", "stages", "always_scored", "mean", "rotation", "tail_scale",
        "tail_offset", "fingerprint", "summary", "state_power",
    }  # fmt: skip
    assert {f.name for f in fields(Gate)} == {"error", "unit", "margin", "cap"}


def test_config_has_the_keys_of_released_checkpoints(checkpoint: Path, model_folder: Path) -> None:
    config, source = (json.loads((f / "config.json").read_text()) for f in (checkpoint, model_folder))
    assert config["architectures"] == ["FlashHeadLlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["flash_head_cache_dir"] == "flash_head_assets" and "auto_map" not in config
    assert config["n_clusters"] == 16 and config["n_probes"] == 3 and config["flash_head_special_token_ids"] == [0, NAMED - 1]
    assert config["flash_head"]["probe"]["margin"] is None  # JSON has no infinity
    ours = {"architectures", "flash_head", "flash_head_cache_dir", "flash_head_special_token_ids", "n_clusters", "n_probes"}
    assert {k: v for k, v in config.items() if k not in ours} == {k: v for k, v in source.items() if k != "architectures"}
    arrays = read_arrays(checkpoint / CLUSTERS)
    assert arrays["centroids"].shape == (1, 1, 32, 16) and arrays["centroids"].dtype == np.float32
    assert arrays["cluster_assignments"].shape == (NAMED,) and arrays["cluster_assignments"].dtype == np.int64
    about = json.loads((checkpoint / "flash_head_assets/clustering_config.json").read_text())
    assert about["format"] == "safetensors" and about["enforce_equal_cluster_sizes"] is True
    assert (about["vocab_size"], about["hidden_size"], about["n_clusters"]) == (NAMED, 32, 16)


# ---- released checkpoints: two files, made by hand ----


def released(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Turn a model folder into one as it is released."""
    path = folder / "config.json"
    extra = {"architectures": ["FlashHeadLlamaForCausalLM"], "flash_head_cache_dir": "flash_head_assets", "n_clusters": 99}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra | config))
    (folder / "flash_head_assets").mkdir()
    save_file(tensors, folder / CLUSTERS)
    return folder


def clusters(head_weight: torch.Tensor, k: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [d, k] and assignments of all 131 rows, spread over the ids so that a cluster is no run of them."""
    assignments = torch.arange(131) % k
    means = torch.stack([head_weight.float()[assignments == i].mean(0) for i in range(k)], 1)
    return means.contiguous(), assignments


@pytest.mark.parametrize("four", [False, True], ids=["dK", "11dK"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_released_layout(four: bool, dtype: torch.dtype, whole: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    head = read_head(folder)
    means, assignments = clusters(head.weight)
    means = means.to(dtype)
    released(folder, {"centroids": means[None, None] if four else means, "cluster_assignments": assignments.to(whole)}, n_probes=5)
    index = read_index(folder, read_head(folder))
    assert (index.vocab_size, index.n_clusters, index.cluster_size) == (NAMED, 16, 9)  # padding is in no cluster
    assert index.probe.cap == 5 and math.isinf(index.probe.margin) and index.stages == () and index.always_scored.size == 0
    assert index.fingerprint == head.fingerprint
    assert index.token_table[3].tolist() == [3, 19, 35, 51, 67, 83, 99, 115, -1]
    raw = means.double().T
    unit = index.centroids.data.view(np.float16).astype(np.float64)
    assert np.abs(unit - (raw / raw.norm(dim=1, keepdim=True)).numpy()).max() < 2**-10  # float16 below 1
    assert same(read_published(folder).centroids, means.float().T.contiguous().numpy())
    everything = torch_head(replace(index, probe=gate(16)), head.weight)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(everything.step(hidden).token, dense_tokens(head.weight, None, hidden, NAMED))


def test_released_defaults_and_special_tokens(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    means, assignments = clusters(read_head(folder).weight, 131)
    released(folder, {"centroids": means, "cluster_assignments": assignments}, flash_head_special_token_ids=7)
    index = read_index(folder)
    assert index.probe.cap == 131 // 16 and index.always_scored.tolist() == [7] and index.cluster_size == 1 and index.fingerprint == ""


def test_older_released_model_type(tmp_path: Path) -> None:
    """`flash_head_llama` with stub files: the base model's own code reads it, nothing of theirs is run."""
    folder = save_model(tmp_path)
    means, assignments = clusters(read_head(folder).weight)
    stubs = {"AutoModelForCausalLM": "modeling_flash_head.Model"}
    released(folder, {"centroids": means, "cluster_assignments": assignments}, model_type="flash_head_llama", auto_map=stubs)
    source = open_source(folder)
    assert source.config["model_type"] == "llama" and read_head(source).vocab_size == NAMED


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        ({"centroids": None}, {}, "centroids is absent"),
        ({"cluster_assignments": None}, {}, "cluster_assignments is absent"),
        ({"centroids": torch.zeros(16, 32)}, {}, r"centroids is float32 \[16, 32\], expected floats \[32, K\] or \[1, 1, 32, K\]"),
        ({"centroids": torch.zeros(1, 32, 16)}, {}, r"centroids is float32 \[1, 32, 16\], expected floats"),
        ({"centroids": torch.zeros(2, 1, 32, 16)}, {}, "expected floats"),
        ({"centroids": torch.zeros(32, 16, dtype=torch.int32)}, {}, r"centroids is int32 \[32, 16\], expected floats"),
        ({"centroids": torch.full((32, 16), float("nan"))}, {}, "centroids is not finite"),
        ({"centroids": torch.zeros(32, 15)}, {}, "cluster_assignments is 0 to 15, expected 0 to 14"),
        ({"cluster_assignments": torch.arange(131).float() % 16}, {}, r"cluster_assignments is float32 \[131\], expected integers"),
        ({"cluster_assignments": (torch.arange(131) % 16)[None]}, {}, r"cluster_assignments is int64 \[1, 131\], expected integers"),
        ({"cluster_assignments": torch.arange(131) % 16 - 1}, {}, "cluster_assignments is -1 to 14"),
        ({"cluster_assignments": torch.arange(131) % 15}, {}, "the clusters hold 0 to 9 tokens, expected 9 in each"),
        ({"cluster_assignments": (torch.arange(131) % 16).clamp(max=14)}, {}, "the clusters hold 0 to 16 tokens"),
        ({"cluster_assignments": torch.cat([torch.zeros(2).long(), torch.arange(129) % 16])}, {}, "the clusters hold 8 to 11 tokens, expected 9 in each"),
        ({}, {"n_probes": 17}, "n_probes is 17, expected 1 to 16"),
        ({}, {"n_probes": "many"}, "n_probes is 'many', expected a whole number"),
        ({}, {"flash_head_special_token_ids": [130]}, "flash_head_special_token_ids has 130 to 130, expected ids below 127"),
        ({}, {"flash_head_special_token_ids": [-1, 3]}, "flash_head_special_token_ids has -1 to 3"),
        ({}, {"flash_head_special_token_ids": "eos"}, "flash_head_special_token_ids is 'eos', expected token ids"),
        ({}, {"flash_head_cache_dir": None}, "config.json has no flash_head_cache_dir, expected a FlashHead checkpoint"),
        ({}, {"flash_head_cache_dir": "elsewhere"}, r"elsewhere/clustering_cache\.safetensors: the file is missing"),
    ],
)
def test_damaged_released_files(tensors: dict, config: dict, sentence: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    means, assignments = clusters(read_head(folder).weight)
    stored = {"centroids": means, "cluster_assignments": assignments} | tensors
    released(folder, {k: v.contiguous() for k, v in stored.items() if v is not None}, **config)
    with pytest.raises(CheckpointError, match=sentence):
        read_index(folder)


# ---- our own file: each array broken in dtype, in shape, and left out ----


@pytest.fixture(scope="module")
def rich(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    head = read_head(model_folder)
    return write(model_folder, tmp_path_factory.mktemp("rich") / "out", rich_index(head.weight, head.fingerprint))


NAMES = sorted(
    ["token_table", "always_scored", "mean", "units", "margins", "caps", "probe.error", "centroids.data", "centroids.scale", "centroids.widths"]
    + ["rotation.data", "rotation.scale", "rotation.widths"]
    + ["stage.1.data", "stage.1.group_ends", "stage.1.codebook", "stage.1.widths", "stage.1.steps", "stage.1.error"]
    + ["stage.2.data", "stage.2.scale", "stage.2.widths", "stage.2.steps", "stage.2.error"]
    + [f"stage.{i}.{part}" for i in (3, 4) for part in ("data", "scale", "widths", "error")]
    + ["stage.5.data", "stage.5.error"]
)


def damaged(rich: Path, out: Path, change: dict[str, np.ndarray | None]) -> Path:
    """A copy with arrays changed or left out, and the file's hash set right so that only the rule itself can catch it."""
    import hashlib

    shutil.copytree(rich, out)
    data = b"".join(pack_arrays({k: v for k, v in (read_arrays(out / INDEX) | change).items() if v is not None}))
    (out / INDEX).write_bytes(data)
    config = json.loads((out / "config.json").read_text())
    config["flash_head"]["index_sha256"] = hashlib.sha256(data).hexdigest()
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_list_of_arrays_is_whole(rich: Path) -> None:
    assert sorted(read_arrays(rich / INDEX)) == NAMES


@pytest.mark.parametrize("how", ["dtype", "longer", "axis", "absent"])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_array(name: str, how: str, rich: Path, tmp_path: Path) -> None:
    array = read_arrays(rich / INDEX)[name]
    broken = {
        "dtype": lambda: array.astype(np.float64 if array.dtype != np.float64 else np.float32),
        "longer": lambda: np.concatenate([array, array[-1:]]),
        "axis": lambda: array[None],
        "absent": lambda: None,
    }[how]()
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}\S*index\.safetensors: .*; (run flashhead convert again|convert the model again)"):
        read_index(damaged(rich, tmp_path / "out", {name: broken}))


def test_array_that_nobody_asked_for(rich: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extra found, expected only the arrays of format version 1"):
        read_index(damaged(rich, tmp_path / "out", {"extra": np.zeros(1, np.uint8)}))


def test_token_in_two_clusters(rich: Path, tmp_path: Path) -> None:
    table = read_arrays(rich / INDEX)["token_table"].copy()
    table[0, 0] = 5
    with pytest.raises(CheckpointError, match=r"token_table is 127 tokens, expected each id 0 to 126 exactly once"):
        read_index(damaged(rich, tmp_path / "out", {"token_table": table}))


def test_changed_value(rich: Path, tmp_path: Path) -> None:
    """One bit of a row code is no rule's business: the hash catches it."""
    out = Path(shutil.copytree(rich, tmp_path / "out"))
    data = bytearray((out / INDEX).read_bytes())
    data[-1] ^= 1
    (out / INDEX).write_bytes(data)
    with pytest.raises(CheckpointError, match="a value has changed, expected the SHA-256 that config.json names"):
        read_index(out)


def test_truncated_index(rich: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(rich, tmp_path / "out"))
    (out / INDEX).write_bytes((out / INDEX).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"index\.safetensors: the file has [\d,]+ bytes, expected"):
        read_index(out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format version 2, expected 1, which this flashhead-edge reads; install a newer flashhead-edge"),
        ({"format_version": None}, "format version None, expected 1, which this flashhead-edge reads; run flashhead convert again"),
        ({"stages": []}, r"margins are \[.*\], expected .* as config\.json says"),
        ({"n_clusters": 3072}, r"token_table is \[16, 8\], expected \[3072, 8\] as config\.json says"),
        ({"vocab_size": 128}, "token_table is 127 tokens, expected each id 0 to 127 exactly once"),
        ({"hidden_size": 33}, r"mean is float32 \[32\], expected float32 \[33\]"),
        ({"tail": None}, "the object flash_head does not have the expected form"),
        ({"summary": "gone", "probe": {}}, "the object flash_head does not have the expected form"),
        ({"state_power": 2.0}, "state_power is 2.0, expected 0 to 1"),
        ({"rotation": None, "state_power": 0.0}, "mean, rotation.data, rotation.scale, rotation.widths found"),
    ],
)
def test_settings_that_do_not_fit(change: dict, sentence: str, rich: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(rich, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    config["flash_head"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence):
        read_index(out)


@pytest.mark.parametrize("found", [None, [], "fitted"])
def test_settings_that_are_no_object_are_not_taken_for_a_released_checkpoint(found: object, rich: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rich, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text()) | {"flash_head": found}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="flash_head is .*, expected an object"):
        read_index(folder)


def test_index_of_another_head(rich: Path, tmp_path: Path) -> None:
    other = read_head(save_model(tmp_path, seed=1))
    with pytest.raises(CheckpointError, match=r"the index was made for the head sha256:\w{12}\.\.\., found sha256:\w{12}\.\.\.; run flashhead convert"):
        read_index(rich, other)


def test_summary_that_json_cannot_hold(model_folder: Path, tmp_path: Path) -> None:
    head = read_head(model_folder)
    index = replace(everything_open(head.weight, vocab_size=NAMED, fingerprint=head.fingerprint), summary={"agreement": math.nan})
    with pytest.raises(CheckpointError, match="a setting cannot be written as JSON"):
        write(model_folder, tmp_path / "out", index)
    assert list(tmp_path.iterdir()) == []
    numbers = {"a": np.float32(0.5), "b": np.int64(3), "c": np.arange(2)}
    write(model_folder, tmp_path / "out", replace(index, summary=numbers))
    assert read_index(tmp_path / "out").summary == {"a": 0.5, "b": 3, "c": [0, 1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"centroids": np.zeros((4, 8), np.float64)}, r"centroids is float64 \[4, 8\], expected float32 \[K, d\]"),
        ({"assignments": np.zeros(9, np.int32)}, r"cluster_assignments is int32 \[9\], expected int64 \[V\]"),
        ({"assignments": np.full(9, 4)}, "cluster_assignments is 4 to 4, expected 0 to 3"),
        ({"n_probes": 0}, "n_probes is 0, expected 1 to 4"),
    ],
)
def test_published_clusters_check_themselves(change: dict, sentence: str) -> None:
    fine = {"centroids": np.zeros((4, 8), np.float32), "assignments": np.arange(9) % 4, "n_probes": 2}
    PublishedClusters(**fine)
    with pytest.raises(CheckpointError, match=sentence):
        PublishedClusters(**(fine | change))


def test_reading_needs_no_torch(rich: Path) -> None:
    """jetson reads an index with numpy alone."""
    import subprocess
    import sys

    code = f"import sys; from flashhead_edge.checkpoint import read_index, read_published; read_index({str(rich)!r}); read_published({str(rich)!r}); "
    done = subprocess.run([sys.executable, "-c", code + "print({'torch', 'transformers'} & set(sys.modules))"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
