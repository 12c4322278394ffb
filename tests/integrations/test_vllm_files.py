"""Where the vLLM plugin finds a checkpoint's index: a folder, or a hub's cache at the revision that vLLM was given. vLLM itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashhead_edge.integrations.vllm.files import checkpoint_folder

REVISIONS = {"main": "1" * 40, "v2": "2" * 40}


def config(model: str, revision: str | None = None, download_dir: str | None = None) -> Any:
    """What the plugin looks at of vLLM's VllmConfig."""
    return SimpleNamespace(model_config=SimpleNamespace(model=model, revision=revision, hf_token=None), load_config=SimpleNamespace(download_dir=download_dir))


def test_a_folder_is_its_own(tmp_path: Path) -> None:
    assert checkpoint_folder(config(str(tmp_path))) == tmp_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub's cache as huggingface_hub lays it out, with two revisions whose index lies in folders of different names."""
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    for name, commit in REVISIONS.items():
        (repository / "refs" / name).write_text(commit)
        snapshot = repository / "snapshots" / commit
        assets = "flash_head_assets" if name == "main" else "assets_of_v2"
        (snapshot / assets).mkdir(parents=True)
        (snapshot / assets / "index.safetensors").write_text(name)
        (snapshot / "config.json").write_text(json.dumps({"flash_head_cache_dir": assets}))
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["main", "v2", None])
def test_a_hub_name_is_read_at_its_revision_from_the_folder_of_downloads(cache: Path, revision: str | None) -> None:
    found = checkpoint_folder(config("someone/model", revision, str(cache)))
    assert found.name == REVISIONS[revision or "main"]
    (index,) = found.glob("*/index.safetensors")
    assert index.read_text() == (revision or "main")


def test_a_name_that_is_nowhere_is_the_hubs_own_error(cache: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(LocalEntryNotFoundError):
        checkpoint_folder(config("someone/other", None, str(cache)))
