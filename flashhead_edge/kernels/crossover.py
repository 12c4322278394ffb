"""From which batch on the dense head is faster: measured by `flashhead bench head OUT --store`, kept for a device, a shape and a head.

It is never measured when a head is loaded, so that a run repeats. A file holds one figure and what it was read from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from flashhead_edge.errors import SettingsError
from flashhead_edge.index import HeadIndex
from flashhead_edge.kernels.build import cache_folder

FORMAT = 2
KINDS = ("tokens", "logits")  # steps that give greedy tokens alone, and those that give full-width logits


def head_fingerprint(index: HeadIndex) -> str:
    """What a step's cost depends on: the head's weights by their fingerprint, codes, margins and caps; 16 hexadecimal digits."""
    gates = [index.probe, *(s.gate for s in index.stages)]
    codes = [(s.rows.kind, s.rows.data.shape[1]) for s in index.stages]
    facts = (index.fingerprint, index.token_table.shape, index.state_power, codes, [(g.unit, g.margin, g.cap) for g in gates])
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def crossover_file(device: str, index: HeadIndex, dtype: str) -> Path:
    """Where the crossover of a head on a device is kept: in the user's cache folder, beside the kernels."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return cache_folder().parent / "crossover" / f"{name}-{index.vocab_size}x{index.hidden_size}-{dtype}-{head_fingerprint(index)}.json"


def store_crossover(
    device: str, index: HeadIndex, dtype: str, crossovers: dict[str, int | None], measured: dict[str, list[dict[str, Any]]], command: str
) -> Path:
    """Keep a head's crossovers, whole or not at all.

    Args:
        device: the GPU's name; dtype: of the rows, ``bfloat16`` or ``float16``.
        crossovers: of each of KINDS the smallest batch at which the dense head is faster; None: none that was measured.
        measured: what these were read from, `batch` and microseconds `dense` and `flash`.
    Returns:
        The file.
    """
    path = crossover_file(device, index, dtype)
    document = {
        "format": FORMAT, "device": device, "shape": [index.vocab_size, index.hidden_size], "dtype": dtype, "head": head_fingerprint(index),
        "crossovers": crossovers, "measured": measured, "command": command,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def stored_crossover(device: str, index: HeadIndex, dtype: str) -> dict[str, Any] | None:
    """What `store_crossover` kept for this device, shape and head; None where nothing is.

    Raises:
        SettingsError: the file is damaged.
    """
    path = crossover_file(device, index, dtype)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SettingsError(
            f"crossover {path}: not JSON ({error}), expected what flashhead bench head --store writes; delete the file and run that again"
        ) from error
    found = document.get("crossovers") if isinstance(document, dict) and document.get("format") == FORMAT else None
    for kind in KINDS:
        batch = found.get(kind, "absent") if isinstance(found, dict) else "absent"
        if not (batch is None or (isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1)):
            raise SettingsError(
                f"crossover {path}: that of {kind} is {batch!r}, expected a batch of 1 or more, or null, in format {FORMAT}; "
                "delete the file and run flashhead bench head --store again"
            )
    return document
