"""Time decode steps of a real vLLM engine on a GPU: dense, the published method, FlashHead, switched inside one engine.

    flashhead bench vllm
    flashhead bench vllm --shape Llama-3.2-1B --batch 1 --json

GPU time of a step is read from a trace and split into the head, the sampler and the rest; host time of the head's call
from the host's clock outside of the trace; tokens a second over whole runs, the heads in turn, so that a slow stretch of
the host hits all of them. Without a checkpoint the models are made: real shapes with vLLM's dummy weights, heads of random
codes whose margins open as many clusters as a real one does. Text means nothing there and is not looked at.
"""

from __future__ import annotations

import bisect
import collections
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from flashhead_edge.bench.provenance import commit
from flashhead_edge.cases import FEW_CODES, SHAPES, case_of, made_index
from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.progress import Progress, silent

HEADS = ("dense", "published", "flash, logits", "flash")  # the last gives greedy tokens alone where the runner takes them
BATCHES = (1, 16, 64)
TOKENS, ROUNDS, TRACED = 256, 5, 48  # tokens of a timed run; rounds, after one that is dropped; tokens of a traced run
PROMPT = 32
BODIES: dict[str, dict[str, Any]] = {  # what a made model's configuration says of its linear layers' weights
    "bf16": {},
    "w4a16": {
        "quantization_config": {
            **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}
            },
        }
    },
}
MARK = "flashhead_bench_"  # names of spans in a trace begin so
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' configuration class, and what differs from its defaults
    "Llama-3.2-1B": ("LlamaConfig", {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192}),
    "Llama-3.2-3B": ("LlamaConfig", {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192}),
    "Qwen3-1.7B": ("Qwen3Config", {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144}),
    "Gemma-3-270M": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048, "query_pre_attn_scalar": 256},
    ),
}


def bench_vllm(
    shapes: Sequence[str], runners: Sequence[str], batches: Sequence[int], bodies: Sequence[str], command: str, progress: Progress = silent
) -> dict[str, Any]:
    """Time made models in vLLM, each in a process of its own.

    Args:
        shapes: names in CONFIGS, none is all of them; runners: v1 or v2, vLLM's two model runners, none is both.
        bodies: names in BODIES, none is bf16.
    Raises:
        SettingsError: a name is not known. DeviceError: vLLM is not installed, or an engine failed.
    """
    for found, known in ((shapes, tuple(CONFIGS)), (runners, ("v1", "v2")), (bodies, tuple(BODIES))):
        for name in found:
            if name not in known:
                raise SettingsError(f"bench vllm: {name} is not known, expected one of {', '.join(known)}; name one of them")
    if importlib.util.find_spec("vllm") is None:
        raise DeviceError("bench vllm: vLLM is not installed, expected it beside a GPU; pip install vllm")
    if not has_gpu():
        raise DeviceError("bench vllm: no NVIDIA GPU was found, expected one that torch can use; run it on a machine with a GPU")
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="flashhead-bench-") as work:
        for name, body in itertools.product(shapes or CONFIGS, bodies or ("bf16",)):
            progress(f"{name}, {body}: making the model", None)
            folder = made_checkpoint(Path(work) / f"{name}-{body}", name, body)
            for runner in runners or ("v2", "v1"):
                progress(f"{name}, {body}: vLLM, runner {runner}", None)
                records += _in_a_process(folder, {"name": name, "body": body, "batches": list(batches or BATCHES), "command": command}, runner)
    return {"records": records}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def made_checkpoint(folder: Path, name: str, body: str) -> Path:
    """A FlashHead checkpoint without weights: for `--load-format dummy`."""
    import transformers

    from flashhead_edge.checkpoint.assets import ASSETS, index_arrays
    from flashhead_edge.checkpoint.write import write_index

    kind, settings = CONFIGS[name]
    vocab_size, hidden_size = SHAPES[name]
    common = {"vocab_size": vocab_size, "hidden_size": hidden_size, "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16"}
    config = getattr(transformers, kind)(**settings, **common).to_dict()
    config["architectures"] = ["FlashHead" + {"LlamaConfig": "Llama", "Qwen3Config": "Qwen3", "Gemma3TextConfig": "Gemma3"}[kind] + "ForCausalLM"]
    config |= {"flash_head_cache_dir": ASSETS, **BODIES[body]}
    (folder / ASSETS).mkdir(parents=True)
    index = made_index(case_of(name, FEW_CODES))
    write_index(folder, config, index, index_arrays(index))
    return folder


def _in_a_process(folder: Path, task: dict[str, Any], runner: str) -> list[dict[str, Any]]:
    result = folder.with_name(f"{folder.name}.{runner}.json")
    task |= {"folder": str(folder), "result": str(result)}
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    done = subprocess.run([sys.executable, "-m", "flashhead_edge.bench.vllm", json.dumps(task)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"bench vllm: the engine of {task['name']} ended with code {done.returncode}, expected 0; its last lines:\n" + "\n".join(
            (done.stdout + done.stderr).splitlines()[-30:]))  # fmt: skip
    return json.loads(result.read_text())


def measure(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of one engine: the heads in turn, at each batch."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        task["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        gpu_memory_utilization=0.6,  # the heads that are timed need memory beside the engine's
        seed=0,
        worker_extension_cls="flashhead_edge.bench.vllm_worker.BenchWorker",
    )
    random = np.random.default_rng(1)

    def call(name: str, *args: Any) -> Any:
        return llm.collective_rpc(name, args=args)[0]

    def generate(batch: int, tokens: int) -> float:
        vocab_size = about["shape"][0]
        prompts = [{"prompt_token_ids": random.integers(1_000, vocab_size - 1_000, PROMPT).tolist()} for _ in range(batch)]
        began = perf_counter()
        found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False), use_tqdm=False)  # type: ignore[arg-type]
        seconds = perf_counter() - began
        if any(len(f.outputs[0].token_ids) != tokens for f in found):
            raise DeviceError(f"bench vllm: an answer is shorter than {tokens} tokens, expected all of them; report this")
        return seconds

    about = call("bench_capture")
    generate(16, 16)
    crossovers = call("bench_prepare")
    records = []
    for batch in task["batches"]:
        seconds: dict[str, list[float]] = {head: [] for head in HEADS}
        for turn in range(ROUNDS + 1):
            for head in HEADS:
                call("bench_mode", head)
                took = generate(batch, TOKENS)
                if turn:
                    seconds[head].append(took)
        for head in HEADS:
            call("bench_mode", head)
            before = call("bench_counts")
            call("bench_host", True)
            generate(batch, TOKENS)
            host = call("bench_host", False)
            after = call("bench_counts")
            trace = Path(task["result"]).with_suffix(".trace")
            call("bench_profile", None)
            generate(batch, TRACED)
            call("bench_profile", str(trace))
            gpu = read_trace(trace)
            trace.unlink()
            rate = [batch * TOKENS / s for s in seconds[head]]
            counted = head.removesuffix(", logits")
            steps = None if head == "dense" else [b - a for a, b in zip(before[counted], after[counted])]
            records.append(
                {
                    **{"model": task["name"], "shape": about["shape"], "real_weights": False, "batch": batch, "context": PROMPT, "head": head},
                    **{
                        "settings": {"runner": about["runner"], "body": task["body"], "crossovers": crossovers},
                        "backend": "vllm",
                        "backend_version": version(),
                        "device": about["device"],
                    },
                    **{"tokens_per_second": statistics.median(rate), "tokens_per_second_spread": [min(rate), max(rate)]},
                    **{"gpu_microseconds": gpu, "host_microseconds": {k: 1e6 * statistics.median(v) for k, v in host.items()}},
                    **{"counts": None if steps is None else [round(n / max(1, steps[0]), 1) for n in steps[1:]]},
                    **{"commit": commit(), "command": task["command"]},
                }
            )
    return records


def version() -> str:
    import vllm

    return str(vllm.__version__)


def read_trace(path: Path) -> dict[str, float]:
    """Microseconds of GPU time of a decode step, median over steps: `total`, and of it what the head and the sampler launched; `launches` of the head."""
    spans: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    launched: dict[int, float] = {}
    work: list[tuple[float, float, int]] = []
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("ph") != "X":
            continue
        kind, start = event.get("cat", ""), event["ts"]
        if kind == "user_annotation" and event["name"].startswith(MARK):
            spans[event["name"].removeprefix(MARK)].append((start, start + event["dur"]))
        elif kind in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
            launched[event["args"]["correlation"]] = start
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append((start, event["dur"], event["args"].get("correlation", -1)))
    for found in spans.values():
        found.sort()
    steps = [start for start, _ in spans["step"]]

    def inside(name: str, moment: float) -> bool:
        at = bisect.bisect_right(spans[name], (moment, float("inf"))) - 1
        return at >= 0 and moment < spans[name][at][1]

    sums = [collections.defaultdict[str, float](float) for _ in steps]
    ended = 0.0  # launches that overlap share their time: the earlier one has it
    for start, duration, correlation in sorted(work):
        busy = max(0.0, start + duration - max(start, ended))
        ended = max(ended, start + duration)
        step = bisect.bisect_right(steps, launched.get(correlation, -1.0)) - 1
        if step < 0:
            continue
        sums[step]["total"] += busy
        for name in ("head", "sampler"):
            if inside(name, launched[correlation]):
                sums[step][name] += busy
                sums[step][f"{name} launches"] += 1
    kept = sums[4:-3]  # without the prompt's step and the ends
    names = ("total", "head", "sampler", "head launches", "sampler launches")
    return {name: statistics.median(s[name] for s in kept) for name in names}


def main() -> None:
    task = json.loads(sys.argv[1])
    Path(task["result"]).write_text(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
