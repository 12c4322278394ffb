"""Time the decode step of the torch-free CUDA backend over made models, on this machine's GPU; numpy alone.

python scripts/cuda_step.py OUT.json [--rows 1,4] [--precision bfloat16] [--no-overlap] [--plain] [--context 4096] [SHAPE ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from flashhead_edge.bench.cuda import CONTEXT, bench_cuda


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="*")
    parser.add_argument("--rows", default="1")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--plain", action="store_true", help="the program as it is, without fused nodes")
    parser.add_argument("--context", type=int, default=CONTEXT)
    given = parser.parse_args()
    rows, records = [int(n) for n in given.rows.split(",")], []

    def took(record: dict[str, Any]) -> None:
        """Keep what there is: a run may be cut short."""
        records.append(record)
        given.out.write_text(json.dumps({"records": records}, indent=1) + "\n", encoding="utf-8")
        alone, left = (", ".join(f"{kind} {f['microseconds']}" for kind, f in record[part].items()) for part in ("alone", "without"))
        print(f"{record['model']}, {record['rows']} rows: greedy {record['greedy']}, {record['tokens_per_second']:.0f} tokens/s")
        print(f"  drawn {record['drawn']}, four steps a graph {record['four_a_graph']}")
        print(f"  alone: {alone}\n  without: {left}")
        print(
            f"  opened in {record['opening_seconds']:.1f} s, {record['compiled']} of {record['kernels']} kernels compiled in "
            f"{record['compiling_seconds']:.1f} s, {record['graph_nodes']} nodes, {record['device_bytes']:,} bytes, overlap {record['overlap']}, "
            f"tokens {record['tokens'][:6]}",
            flush=True,
        )

    def progress(text: str, share: float | None) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="flashhead-cuda-") as work:
        overlap = False if given.no_overlap else None
        bench_cuda(Path(work), given.shapes, rows, given.precision, overlap, not given.plain, given.context, progress, took)


if __name__ == "__main__":
    main()
