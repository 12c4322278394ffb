"""One vLLM engine in a process of its own: reads a task as JSON on stdin, writes what it said as JSON on a line of stdout that begins with MARK.

Task: `options` of `vllm.LLM`, `prompts` (token ids), `tokens` of an answer,
`dense` (once more by the dense head, switched in the engine), `lora` (an adapter's folder), `save` (a folder for vLLM's sharded state),
`reload` (a folder of weights, then once more),
`sleep` (its levels: after each the engine wakes and answers once more).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MARK = "RESULT "  # the line of the answer begins so
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    task = json.loads(sys.stdin.read())
    several = "tensor_parallel_size" in task["options"]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(several))  # in this process, so that the head can be switched
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    task["options"].setdefault("disable_log_stats", "speculative_config" not in task["options"])
    if torch.cuda.is_available():  # a small share of a card, and none of it measured: several of these run side by side
        task["options"] = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 256 << 20} | task["options"]
    llm = LLM(
        **{
            "dtype": "auto" if torch.cuda.is_available() else "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "skip_tokenizer_init": not task.get("embed"),
            "enable_prefix_caching": False,
        }
        | task["options"]
    )
    if task.get("embed"):
        width = len(llm.encode([{"prompt_token_ids": ids} for ids in task["prompts"]], pooling_task="embed", use_tqdm=False)[0].outputs.data)
        sys.stdout.write(f"\n{MARK}{json.dumps({'width': width})}\n")
        return
    params = SamplingParams(temperature=0.0, max_tokens=task["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    lora = LoRARequest("adapter", 1, task["lora"]) if task.get("lora") else None

    def answers() -> list[list[int]]:
        return [list(map(int, o.outputs[0].token_ids)) for o in llm.generate(prompts, params, use_tqdm=False, lora_request=lora)]

    result: dict[str, Any] = {"tokens": answers()}
    if "speculative_config" in task["options"]:
        counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        result["drafted"], result["accepted"] = (int(counted[f"vllm:spec_decode_num_{what}_tokens"]) for what in ("draft", "accepted"))
    if task.get("save"):
        llm.collective_rpc("save_sharded_state", kwargs={"path": task["save"]})
    if task.get("reload"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": task["reload"]})
        result["reloaded"] = answers()
    result["awake"] = []
    for level in task.get("sleep", ()):
        llm.sleep(level)
        if level == 2:  # the weights are gone: they are read again into the same memory
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        else:
            llm.wake_up()
        result["awake"].append(answers())
    if task.get("dense"):
        from flashhead_edge.integrations.vllm.method import FlashHeadMethod, find_head

        method = llm.apply_model(lambda model: find_head(model).quant_method)[0]
        assert isinstance(method, FlashHeadMethod), type(method)
        result["counts"] = method.counts()
        method.dense_from = method.tokens_dense_from = 1
        result["dense"] = answers()
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
