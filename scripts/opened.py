"""Print what a checkpoint's head opens and scores on texts, as `cases.Settings` keeps it for made heads.

    python scripts/opened.py FOLDER TEXT... [--positions 2000]

One JSON document on stdout: codes, caps, and mean and percentiles of the slots opened and of those that each code's gate
lets through, over all texts together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def measure(folder: str, texts: list[Path], positions: int) -> dict[str, Any]:
    """Codes, caps and counts of a head; counts in slots of a step."""
    import numpy as np
    import torch

    from flashhead_edge.capture import capture_text
    from flashhead_edge.generation import load_engine

    engine = load_engine(folder, "cpu")
    index, counts = engine.head.index, []
    for path in texts:
        states = capture_text(engine.model, engine.tokenizer, path.name, path.read_text(encoding="utf-8"), positions).states
        with torch.no_grad():
            counts += [engine.head.step(part.float()).counts for part in states.split(128)]
        print(f"{path.name}: {len(states)} positions", file=sys.stderr)
    found = torch.cat(counts).numpy()
    found = np.concatenate([found[:, :1] * index.cluster_size, found[:, 2:]], 1)  # slots opened, then what each gate lets through
    plan = index.summary.get("plan", {})
    percentiles = (1, 10, 25, 50, 75, 90, 99)
    return {
        "centroids": plan.get("centroids"),
        "rows": plan.get("codes"),
        "cluster_size": index.cluster_size,
        "coordinates": None if index.rotation is None else index.rotation.columns,
        "vocab_size": index.vocab_size,
        "positions": len(found),
        "caps": [index.probe.cap * index.cluster_size, *(stage.gate.cap for stage in index.stages)],
        "mean": found.mean(0).tolist(),
        **{f"p{p}": np.percentile(found, p, axis=0).tolist() for p in percentiles},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what a head opens and scores on texts.")
    parser.add_argument("folder")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--positions", type=int, default=2000, help="of each text")
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.texts, options.positions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
