"""How faithful FlashHead is inside a real vLLM engine: beside the dense head of the same engine, on prompts from texts.

    python scripts/vllm_faithful.py CHECKPOINT TEXT...

Prints one JSON document. A share of steps is counted along the dense head's text up to the first token that differs: there
both heads saw the same tokens. Constrained requests go as a server answers them, by the dense head, and once more by FlashHead
alone ("without exact_for"), where log-probabilities are compared as well. `reference` compares, on hidden states
that reached the head, the kernel's token with that of the reference in torch and counts those that differ (tests/vllm_engine holds them to a bound).
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the head is switched in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}}},
        "required": ["name", "age", "tags"],
    }
)
CHOICES = ["yes", "no", "perhaps", "certainly not", "it depends"]
ALLOWED = [*range(30, 60), *range(1_000, 1_200), *range(20_000, 20_100)]  # some hundred tokens that nobody chose with care


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=64, help="prompts in all, from even places of the texts")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--score-all-rows", action="store_true", help="every row by the row code, not only those of open clusters")
    parser.add_argument("--states", type=int, default=2_000, help="hidden states that are compared with the reference")
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from flashhead_edge.integrations.vllm.method import find_head
    from flashhead_edge.integrations.vllm.requests import ASKED
    from flashhead_edge.reference import torch_head

    gpu = torch.cuda.is_available()
    options = {"gpu_memory_utilization": 0.3} if gpu else {"enforce_eager": True}
    settings = {"flashhead": {"crossover": "never", "score_all_rows": args.score_all_rows}}
    llm = LLM(args.checkpoint, dtype="auto" if gpu else "float32", max_model_len=2_048, additional_config=settings, enable_prefix_caching=False, **options)
    layer = llm.apply_model(find_head)[0]
    method = layer.quant_method
    prompts = cut(args.texts, args.prompts)

    def run(params, dense):
        method.dense_from = method.tokens_dense_from = 1 if dense else None
        found = llm.generate(prompts, params, use_tqdm=False)
        method.dense_from = method.tokens_dense_from = None
        return [f.outputs[0] for f in found]

    asked = ASKED[method.engine]  # whichever of vLLM's runners it is of
    given = asked.exact_for

    def beside(exact_for=given, logprobs=None, **options):
        params = SamplingParams(temperature=0.0, logprobs=logprobs, max_tokens=args.tokens, **options)
        same = steps = 0
        errors, lengths = [], []
        asked.exact_for = exact_for
        answers = run(params, False)
        asked.exact_for = given
        for a, b in zip(answers, run(params, True)):
            length = first_difference(a.token_ids, b.token_ids)
            lengths.append(length)
            same, steps = same + length, steps + length + (length < min(len(a.token_ids), len(b.token_ids)))
            for i in range(length if logprobs is not None else 0):
                x, y = a.logprobs[i][a.token_ids[i]].logprob, b.logprobs[i][a.token_ids[i]].logprob
                if math.isfinite(x) and math.isfinite(y):  # -inf: of a token that a mask leaves alone
                    errors.append(abs(x - y))
        errors.sort()
        out = {"steps": steps, "equal": same, "share": round(same / steps, 5), "same_text_tokens": round(statistics.mean(lengths), 1)}
        return (
            out
            if logprobs is None
            else out | {"logprob_error_mean": round(statistics.mean(errors), 5), "logprob_error_p99": round(errors[int(0.99 * len(errors))], 5)}
        )

    report = {"vllm": __import__("vllm").__version__, "device": torch.cuda.get_device_name() if gpu else "cpu", "runner": type(runner_of(llm)).__module__}
    report["greedy"] = beside()
    report["with log-probabilities"] = beside(logprobs=1)
    kinds = {
        "schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
        "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[A-Z][a-z]{2,9} [0-9]{1,4}(, [a-z]{3,12}){3,8}")},
        "choice": {"structured_outputs": StructuredOutputsParams(choice=CHOICES)},
        "allowed": {"allowed_token_ids": ALLOWED},
    }
    report |= {name: beside(**options) for name, options in kinds.items()}
    report["without exact_for"] = {name: beside((), 1, **options) for name, options in {"greedy": {}, **kinds}.items()}

    captured, before = [], method.logits
    method.logits = lambda x: captured.append(x.detach().clone()) or before(x)
    while sum(map(len, captured)) < args.states:
        llm.generate(prompts, SamplingParams(temperature=1.0, max_tokens=args.tokens, seed=len(captured)), use_tqdm=False)
    method.logits = before
    states = torch.cat(captured)[: args.states]
    with torch.inference_mode():
        logits = torch.cat([method.apply(layer, part) for part in states.split(32)])
        alone = torch.cat([method.apply(layer, state[None]).argmax(1) for state in states])
        dense = torch.cat([method.dense.apply(layer, part).float() for part in states.split(32)])[:, : method.index.vocab_size]
        want = [torch_head(method.index, layer.weight).step(part).token for part in states.split(128)]
    token, want = logits.argmax(1), torch.cat(want)
    p, q = (x[:, : method.index.vocab_size].double().softmax(1) for x in (logits, dense))
    report["reference"] = {
        "states": len(states),
        "other_token": int((token != want).sum()),
        "other_token_alone_than_among_others": int((token != alone).sum()),
        "token_of_dense_bf16": round(float((token == dense.argmax(1)).float().mean()), 5),
        "total_variation": round(float((p - q).abs().sum(1).mean() / 2), 4),
    }
    report["counts"] = method.counts()
    json.dump(report, sys.stdout, indent=1)


def cut(texts: list[Path], many: int) -> list[str]:
    """Prompts of some 300 characters from even places of the texts."""
    out = []
    for i in range(many):
        text = texts[i % len(texts)].read_text(encoding="utf-8", errors="ignore")
        at = (i // len(texts)) * max(1, (len(text) - 300) // max(1, many // len(texts)))
        out.append(text[at : at + 300])
    return out


def first_difference(a, b) -> int:
    """Tokens that two texts share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def runner_of(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.model_runner


if __name__ == "__main__":
    main()
