"""Compare the head kernel with the reference on a model's own hidden states, on an NVIDIA GPU.

    python scripts/real_states.py FOLDER TEXT... [--states 100000] [--dtype float16]

Hidden states are captured from the texts, as evenly as their lengths allow, and each is decoded by the kernel and by
the reference in float64. One JSON document on stdout: states, those with another token (each with both tokens and their exact logits' gap),
with other counts, and those that a cap cut. Exit code 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

PART = 512


def captured(folder: str, texts: list[Path], wanted: int) -> tuple[Any, Any]:
    """The folder's head source and hidden states [n, d] float16."""
    import torch

    from flashhead_edge.capture import capture_text
    from flashhead_edge.checkpoint import load_model, load_tokenizer, open_source

    source = open_source(folder)
    model, tokenizer = load_model(source, device="cuda"), load_tokenizer(source)
    states: list[Any] = []
    for left, path in zip(range(len(texts), 0, -1), sorted(texts, key=lambda path: path.stat().st_size), strict=True):  # the shortest first
        share = -(-(wanted - sum(map(len, states))) // left)
        states.append(capture_text(model, tokenizer, path.name, path.read_text(encoding="utf-8", errors="ignore"), share).states)
        print(f"{path.name}: {len(states[-1])} states", file=sys.stderr)
    return source, torch.cat(states)


def compare(folder: str, texts: list[Path], wanted: int, dtype: str) -> dict[str, Any]:
    import torch

    from flashhead_edge.checkpoint import read_head, read_index
    from flashhead_edge.kernels.head import cuda_head
    from flashhead_edge.reference import exact_logits, torch_head

    source, states = captured(folder, texts, wanted)
    if len(states) < wanted:
        sys.exit(f"real_states: the texts have {len(states)} positions, expected {wanted}; name more texts, or fewer --states")
    rows = read_head(source)
    weight = rows.weight[: rows.vocab_size].to("cuda", getattr(torch, dtype))
    bias = None if rows.bias is None else rows.bias[: rows.vocab_size].to(weight)
    index = read_index(source.folder, rows)
    head, reference = cuda_head(index, weight, bias), torch_head(index, weight, bias)
    found: dict[str, Any] = {"states": len(states), "other_counts": 0, "capped": 0, "other_tokens": []}
    begun = time.perf_counter()
    for start in range(0, len(states), PART):
        hidden = states[start : start + PART].to("cuda", weight.dtype)
        step, want = head.step(hidden), reference.step(hidden)
        found["other_counts"] += int((step.counts != want.counts).any(1).sum())
        found["capped"] += int(want.capped.sum())
        for i in (step.token != want.token).nonzero()[:, 0].tolist():
            pair = torch.stack([step.token[i], want.token[i]])
            logits = exact_logits(weight, bias, hidden[i : i + 1].double(), pair)[0].double()
            found["other_tokens"].append({"state": start + i, "kernel": int(pair[0]), "reference": int(pair[1]), "gap": float(logits[1] - logits[0])})
    return {"device": torch.cuda.get_device_name(), "dtype": dtype, **found, "seconds": round(time.perf_counter() - begun, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the head kernel with the reference on a model's own hidden states.")
    parser.add_argument("folder")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="of the exact rows")
    options = parser.parse_args()
    for path in (Path(options.folder), *options.texts):
        if not path.exists():
            sys.exit(f"real_states: {path} is not there, expected a checkpoint's folder and texts; name others")
    import torch

    if not torch.cuda.is_available():
        sys.exit("real_states: no NVIDIA GPU was found, expected one that torch can use; run it on a machine with a GPU")
    found = compare(options.folder, options.texts, options.states, options.dtype)
    print(json.dumps(found))
    return int(bool(found["other_tokens"]))


if __name__ == "__main__":
    sys.exit(main())
