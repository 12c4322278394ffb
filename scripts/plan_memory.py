"""What `flashhead plan` predicts for an ONNX export beside the memory that a process really takes: python scripts/plan_memory.py EXPORT.

Each row is a process of its own that opens the export, reads real text (examples/text) up to the context, and makes 16 greedy steps.
Real is the process's largest resident size (VmHWM), its mapped weights and its libraries included.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from flashhead_edge.jetson import open_engine
from flashhead_edge.jetson.plan import MIB
from flashhead_edge.jetson.plan_sources import onnx_need

TEXTS = Path(__file__).resolve().parent.parent / "examples/text"
STEPS = 16


def run(folder: Path, context: int, native: bool) -> int:
    """Bytes that this process took at most."""
    engine = open_engine(folder, native=native)
    assert engine.tokenizer is not None
    # tokens of real text, again and again where it is shorter than the context
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(TEXTS.iterdir()))
    ids = engine.tokenizer(text)["input_ids"]
    ids = (ids * (context // len(ids) + 1))[: context - STEPS]
    body = engine.body()
    hidden = body.feed(ids)
    for _ in range(STEPS):
        hidden = body.feed([int(engine.step(hidden).token[0])])
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) << 10  # type: ignore[index]


def main() -> None:
    if len(sys.argv) == 4:
        print(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "native"))
        return
    folder = Path(sys.argv[1])
    print("operators   context   predicted MiB   real MiB   predicted / real")
    for kind, parts in (("native", ("body_native", "head_native")), ("standard", ("body", "head"))):
        for context in (256, 1024, 2048, 4096, 8192):
            need = onnx_need(folder, parts)
            if need.limit is not None and context > need.limit:
                continue
            command = [sys.executable, __file__, str(folder), str(context), kind]
            real = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            print(f"{kind:<9} {context:>9,} {need.total(context) / MIB:>15.0f} {real / MIB:>10.0f} {need.total(context) / real:>18.2f}", flush=True)


if __name__ == "__main__":
    main()
