"""Time the decode step of the torch-free CUDA backend over made models, on this machine's GPU; numpy alone.

python scripts/cuda_step.py OUT.json [--rows 1,4] [--precision bfloat16] [--no-overlap] [SHAPE ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from flashhead_edge.bench.cuda import bench_cuda


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="*")
    parser.add_argument("--rows", default="1")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--no-overlap", action="store_true")
    given = parser.parse_args()
    rows = [int(n) for n in given.rows.split(",")]
    with tempfile.TemporaryDirectory(prefix="flashhead-cuda-") as work:
        records = bench_cuda(
            Path(work), given.shapes, rows, given.precision, False if given.no_overlap else None, lambda text, _: print(text, file=sys.stderr, flush=True)
        )  # fmt: skip
    given.out.write_text(json.dumps({"records": records}, indent=1) + "\n", encoding="utf-8")
    for r in records:
        alone = ", ".join(f"{kind} {f['microseconds']}" for kind, f in r["alone"].items())
        print(
            f"{r['model']}, {r['rows']} rows: {r['greedy']['microseconds']} us {r['greedy']['spread']}, {r['tokens_per_second']:.0f} tokens/s; alone: {alone}"
        )


if __name__ == "__main__":
    main()
