"""Where a checkpoint's index lies: the folder that vLLM was pointed at, or the same revision in the same cache of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def checkpoint_folder(config: VllmConfig) -> Path:
    """The folder with the checkpoint's config.json and index."""
    name = config.model_config.model
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "flash_head_assets/*"]
    return Path(snapshot_download(name, revision=config.model_config.revision, cache_dir=config.load_config.download_dir, allow_patterns=wanted))
