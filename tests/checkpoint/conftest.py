"""Folders that the checkpoint tests share; none of them writes into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import save_checkpoint, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 with 131 rows, of which its tokenizer names 127."""
    return save_model(tmp_path_factory.mktemp("source") / "small-llama")


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FlashHead checkpoint of it."""
    return save_checkpoint(model_folder, tmp_path_factory.mktemp("written") / "checkpoint")
