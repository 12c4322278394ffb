"""Where a checkpoint's index lies: the folder that vLLM was pointed at, or the same revision in the same cache of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_edge.checkpoint.assets import ASSETS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def checkpoint_folder(config: VllmConfig) -> Path:
    """The folder with the checkpoint's config.json and index."""
    name = config.model_config.model
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    def fetch(wanted: list[str]) -> Path:
        model = config.model_config
        token = getattr(model, "hf_token", None)
        return Path(snapshot_download(name, revision=model.revision, cache_dir=config.load_config.download_dir, token=token, allow_patterns=wanted))

    assets = json.loads((fetch(["config.json"]) / "config.json").read_text(encoding="utf-8")).get("flash_head_cache_dir", ASSETS)
    return fetch(["config.json", f"{assets}/*"])
