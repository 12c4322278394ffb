"""Models and their bodies, for the whole session: each is made once, however many tests ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a family, as `save_body` writes it."""
    from small_bodies import save_body

    @lru_cache
    def make(family: str) -> Path:
        return save_body(tmp_path_factory.mktemp(family), family)

    return make


@pytest.fixture(scope="session")
def built(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Its body on disk, and what `build_body` returned; its tensors stay in the folder beside it."""
    import onnx_ir as ir
    from small_bodies import warm_builder

    from flashhead_edge.export.body import Body, build_body

    @lru_cache
    def make(family: str, precision: str, group: int) -> tuple[Path, Body]:
        work = tmp_path_factory.mktemp(f"{family}-{precision}-{group}-")
        with warm_builder():
            body = build_body(model_folder(family), work, precision=precision, group=group)
        ir.save(body.model, work / "body.onnx", external_data="body.onnx.data")
        return work / "body.onnx", body

    # a cache takes a default and the same value said aloud for two things
    return lambda family, precision="fp32", group=32: make(family, precision, group)
