"""What FlashHead costs a vLLM engine in memory: KV blocks at equal gpu_memory_utilization, and anonymous host memory while loading.

    python scripts/vllm_memory.py CHECKPOINT [--utilization 0.3] [--load-format dummy]

Starts the same checkpoint with the plugin off and on, each in a process of its own, and prints one JSON document. Linux and a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

SPARE = 16_000_000  # bytes beyond the index that may be missing from the cache
MARK = "RESULT "


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(checkpoint: str, enabled: bool, utilization: float, load_format: str) -> dict:
    """Load once; the peak is sampled every 5 ms from before vLLM builds the model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM

    torch.zeros(1, device="cuda")  # the driver's own memory is no one's difference
    seen, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    llm = LLM(
        checkpoint, gpu_memory_utilization=utilization, max_model_len=1024, enforce_eager=True, load_format=load_format,
        skip_tokenizer_init=True, additional_config={"flashhead": {"enabled": enabled}},
    )  # fmt: skip
    done.set()
    watcher.join()
    config = llm.llm_engine.vllm_config
    text = config.model_config.hf_text_config
    size = 2 * config.model_config.get_head_size() * text.num_key_value_heads * text.num_hidden_layers * config.cache_config.block_size * 2
    found = {"enabled": enabled, "blocks": config.cache_config.num_gpu_blocks, "block_bytes": size, "host_growth": max(seen) - seen[0]}
    if enabled:
        from flashhead_edge.integrations.vllm.method import find_head

        layer = llm.apply_model(find_head)[0]
        found["image_bytes"] = layer.flashhead_image.numel()
        found["workspace_bytes"] = layer.flashhead_workspace.numel()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--utilization", type=float, default=0.3)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--enabled", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.enabled is not None:
        print(f"\n{MARK}{json.dumps(measure(args.checkpoint, bool(args.enabled), args.utilization, args.load_format))}")
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("vllm_memory: no NVIDIA GPU was found, expected one that torch can use; run it on a machine with a GPU")
    found = []
    for enabled in (0, 1):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--enabled", str(enabled)], capture_output=True, text=True, check=False)
        lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            sys.exit(done.stdout + done.stderr)
        found.append(json.loads(lines[0]))
    dense, flash = found
    lost = (dense["blocks"] - flash["blocks"]) * dense["block_bytes"]
    found = {"dense": dense, "flash": flash, "cache_bytes_lost": lost, "cache_bytes_allowed": flash["image_bytes"] + SPARE}
    print(json.dumps(found | {"host_growth_above_dense": flash["host_growth"] - dense["host_growth"]}, indent=1))


if __name__ == "__main__":
    main()
