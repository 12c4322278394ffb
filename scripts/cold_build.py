"""Time a cold NVRTC build of the kernels that one model needs, on one core. No GPU needed; `pip install 'flashhead-edge[cuda]'`.

    taskset -c 0 python scripts/cold_build.py [--architecture sm_90]

The kernels are those of a Llama with heads of 64 in bfloat16 and groups of 128: the head step, the draw, W4A16 decode and prefill with
repacking, attention, rotary write, RMSNorm, gated product. A line each goes to stderr, one JSON document to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

WHOLE = ("head_step.cu", "decode.cu")
INSTANCES = (
    ("w4a16.cu", "fh::w4a16_decode<fh::Bf16, 128, false, 2>"),
    ("w4a16.cu", "fh::w4a16_prefill<fh::Bf16, 128, false, 64>"),
    ("w4a16.cu", "fh::w4a16_prefill<fh::Bf16, 128, false, 128>"),
    ("w4a16.cu", "fh::w4a16_repack_codes"),
    ("w4a16.cu", "fh::w4a16_repack_groups<unsigned short>"),
    ("attention.cu", "fh::attention_decode<fh::Bf16, 64, true>"),
    ("attention.cu", "fh::attention_rope_write<fh::Bf16>"),
    ("elementwise.cu", "fh::rms_norm<fh::Bf16>"),
    ("elementwise.cu", "fh::gated_product<fh::Bf16, false>"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time a cold NVRTC build of one model's kernels.")
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        from flashhead_edge.kernels.build import compiled, instantiated

        for source, instance in [*((s, "") for s in WHOLE), *INSTANCES]:
            begun = time.perf_counter()
            if instance:
                instantiated(source, instance, options.architecture)
            else:
                compiled(source, options.architecture)
            seconds[instance or source] = round(time.perf_counter() - begun, 2)
            print(f"{seconds[instance or source]:6.2f} s  {instance or source}", file=sys.stderr)
    print(json.dumps({"architecture": options.architecture, "seconds": seconds, "total": round(sum(seconds.values()), 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
