"""A decode step of vLLM beside one of the CUDA backend, on one GPU in one run: the shape of Llama-3.2-1B in W4A16, groups of 128, one text.

    python scripts/vllm_against_cuda.py OUT

vLLM runs a model of its own dummy weights (compressed-tensors, pack-quantized, which it gives to its Marlin kernels) with its defaults: CUDA graphs, its
compiler, the newer runner; the engine is in this process, so that a profiler sees the device. Its head is dense in 16 bits, as that format leaves it. GPU time
a step is the sum of the durations of all that ran on the device, of a long text less a short one, over the tokens between them. Ours is
`scripts/cuda_figures.py`: the step's graph, replayed, and tokens a second of a text that the host reads. What a dummy weight says is not looked at.

OUT is a folder; OUT/vllm.json has the figures, and stdout the last word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAME, CACHED, SHORT, LONG, RUNS = "Llama-3.2-1B", 512, 16, 144, 5
CONTEXT = 1024
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "silu", "torch_dtype": "float16",
    "bos_token_id": 128_000, "eos_token_id": 128_001,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "input_activations": None, "output_activations": None,
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False, "actorder": None},
            }
        },
    },
}  # fmt: skip


def device_microseconds(profile: Any) -> float:
    """Of all kernels and copies on the device, the sum of their durations."""
    return sum(event.device_time_total for event in profile.events() if event.device_type.name == "CUDA")


def vllm_figures() -> dict[str, Any]:
    import torch
    import vllm

    with tempfile.TemporaryDirectory(prefix="flashhead-vllm-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
        began = time.perf_counter()
        engine = vllm.LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="float16", max_model_len=CONTEXT, seed=0, enable_prefix_caching=False)
        started = time.perf_counter() - began
        prompt = {"prompt_token_ids": [1000 + 7 * at % 100_000 for at in range(CACHED)]}

        def generate(tokens: int) -> float:
            settings = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            began = time.perf_counter()
            done = engine.generate([prompt], settings, use_tqdm=False)
            seconds = time.perf_counter() - began
            assert len(done[0].outputs[0].token_ids) == tokens
            return seconds

        generate(SHORT), generate(LONG)  # what is made at first is not counted
        walls = sorted((generate(LONG) - generate(SHORT)) / (LONG - SHORT) for _ in range(RUNS))
        traced = {}
        for tokens in (SHORT, LONG):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                generate(tokens)
                torch.cuda.synchronize()
            traced[tokens] = profile
        kernels: dict[str, float] = {}
        for sign, tokens in ((-1, SHORT), (1, LONG)):
            for event in traced[tokens].events():
                if event.device_time_total:
                    kernels[event.name] = kernels.get(event.name, 0.0) + sign * event.device_time_total / (LONG - SHORT)
        most = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])
        gpu = (device_microseconds(traced[LONG]) - device_microseconds(traced[SHORT])) / (LONG - SHORT)
    return {
        "version": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(), "start_seconds": round(started, 1),
        "gpu_us_a_step": round(gpu, 1), "tokens_per_second": round(1 / walls[len(walls) // 2], 1),
        "tokens_per_second_spread": [round(1 / walls[-1], 1), round(1 / walls[0], 1)],
        "kernels_us_a_step": {name[:100]: round(us, 1) for name, us in most.items()},
    }  # fmt: skip


def main() -> None:
    if sys.argv[2:] == ["vllm"]:
        Path(sys.argv[1]).write_text(json.dumps({"vllm": vllm_figures()}, indent=1) + "\n", encoding="utf-8")
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, figures = Path(sys.argv[1]), Path(__file__).with_name("cuda_figures.py")
    out.mkdir(parents=True, exist_ok=True)
    # In a process of its own: vLLM keeps nearly all of the device's memory as long as its process lives.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, __file__, str(out / "vllm.json"), "vllm"], env=environment, check=True, stdout=sys.stderr)
    found = json.loads((out / "vllm.json").read_text(encoding="utf-8"))
    for part in ("steps", "idle"):
        subprocess.run([sys.executable, str(figures), str(out), part, NAME], check=True, stdout=sys.stderr)
    steps = json.loads((out / "steps.json").read_text(encoding="utf-8"))["records"]
    step = next(r for r in steps if r["batch"] == 1 and r["head"] == "FlashHead")
    text = json.loads((out / "idle.json").read_text(encoding="utf-8"))["records"][0]
    found["ours"] = {"gpu_us_a_step": round(step["microseconds"], 1), "spread": step["spread"], "tokens_per_second": text["tokens_per_second"]}
    found["of_vllm"] = round(step["microseconds"] / found["vllm"]["gpu_us_a_step"], 3)
    (out / "vllm.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
