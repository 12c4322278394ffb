"""JSON files of a model folder. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashhead_edge.errors import CheckpointError


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        CheckpointError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise CheckpointError(f"{path.parent}: no such folder, expected a model folder or a FlashHead checkpoint; check the path") from error
        raise CheckpointError(f"{path}: the file is missing; restore it or fetch the model again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be read as JSON ({error}); restore it or fetch the model again") from error
