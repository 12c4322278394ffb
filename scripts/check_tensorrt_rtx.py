"""Parse and build ONNX files with TensorRT-RTX, which needs no GPU for it: what a current TensorRT parser and builder accept.

    pip install tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116    # Linux x86-64, CPython 3.10 to 3.12
    python scripts/check_tensorrt_rtx.py OUT/body.onnx OUT/head.onnx

The network is strongly typed: every precision is what the file says. Exit code 1 where a file is refused.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from flashhead_edge.errors import EngineError
from flashhead_edge.export.tensorrt.builder import build_engine
from flashhead_edge.export.tensorrt.versions import load

# Sizes of named dimensions in the optimization profile: least, usual, most. Consistent: past + sequence = total.
SIZES = {"batch_size": (1, 1, 2), "sequence_length": (1, 1, 64), "past_sequence_length": (0, 63, 64), "total_sequence_length": (1, 64, 128)}
OTHER = (1, 1, 8)


def main(paths: list[str]) -> int:
    trt, failed = load("tensorrt_rtx"), 0
    with tempfile.TemporaryDirectory() as out:
        for path in paths:
            try:
                engine = build_engine(trt, Path(path), Path(out) / "model.engine", [defaultdict(lambda: OTHER, SIZES)])
                print(f"{path}: built in {engine.seconds:.1f} s, {engine.bytes / 1e6:.1f} MB")
            except EngineError as error:
                failed += 1
                print(f"{path}: refused ({error})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
