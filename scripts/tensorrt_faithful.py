"""How faithful an engine is, on the states that reach its head: first on the GPU without torch, then beside torch on any machine.

    python scripts/tensorrt_faithful.py run FOLDER TEXT STATES.npz [--positions 2000]      teacher-forced, a token at a time; and 512 tokens of free text
    python scripts/tensorrt_faithful.py compare CHECKPOINT STATES.npz --body PORTABLE      PORTABLE: flashhead export onnx --dialect portable, in float32

`compare` prints one JSON document. On the same hidden states the head's token must be the reference's; where it is not, the gap of the two logits
stands beside what two float32 sums in different orders can differ by. Where the whole engine's token is not that of the same 4-bit weights in float32,
the two tokens' gap there is at most what the states differ by, times the difference of their rows: the bound. The original model, before its body was
coded in 4 bits, is counted beside.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

FREE = 512  # tokens of free-running text
PROMPT = 64


def run(args: argparse.Namespace) -> None:
    from flashhead_edge.jetson import open_engine

    engine = open_engine(args.folder, "tensorrt", plugin=args.plugin)
    ids = engine.tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"]
    backend, limit = engine.backend, engine.context_length
    hidden, tokens, counts = [], [], []
    for start in range(0, args.positions, limit):
        body = backend.body()
        for token in ids[start : min(start + limit, args.positions)]:
            state = body.feed([token])
            step = engine.step(state)
            hidden.append(state[0]), tokens.append(step.token[0]), counts.append(step.counts[0])
    body = backend.body()
    free = list(ids[:PROMPT])
    state = body.feed(free)
    for _ in range(FREE):
        free.append(int(engine.step(state).token[0]))
        state = body.feed(free[-1:])
    np.savez_compressed(
        args.states, ids=np.array(ids[: args.positions]), hidden=np.array(hidden, np.float16), token=np.array(tokens), counts=np.array(counts), limit=limit,
        free=np.array(free),
    )  # fmt: skip
    print(json.dumps({"positions": len(tokens), **backend.about, "captures": backend.captures}))
    backend.close()


def compare(args: argparse.Namespace) -> None:
    import torch

    from flashhead_edge.checkpoint import read_head, read_index
    from flashhead_edge.checkpoint.source import open_source
    from flashhead_edge.generation import load_engine
    from flashhead_edge.jetson import open_engine
    from flashhead_edge.reference import torch_head

    found = np.load(args.states)
    source = open_source(args.checkpoint)
    weights = read_head(source)
    weight = weights.weight.half().float()
    head = torch_head(read_index(args.checkpoint, weights), weights.weight.half(), None)
    hidden = torch.from_numpy(found["hidden"].astype(np.float32))
    want, token = head.step(hidden).token.numpy(), found["token"]
    other = np.flatnonzero(want != token)
    bound = 2.0**-23 * hidden.shape[1] * hidden.abs().sum(1) * weight.abs().max()  # of two float32 sums in different orders
    ties = []
    for i in other:
        pair = (hidden[i].double() @ weight[[want[i], token[i]]].double().T).tolist()
        ties.append({"position": int(i), "reference": int(want[i]), "engine": int(token[i]), "gap": pair[0] - pair[1], "bound": float(bound[i])})
    ids, limit = found["ids"], int(found["limit"])
    parts = [ids[start : start + limit].tolist() for start in range(0, len(ids), limit)]
    with torch.no_grad():
        original = load_engine(args.checkpoint, "cpu").model
        whole = torch.cat([original(torch.tensor([p])).logits[0].float() for p in parts])
    same = open_engine(args.body)  # in float32, of the same codes
    states = np.concatenate([same.body().states(p) for p in parts])
    logits = torch.from_numpy(states) @ weight.T
    best, of_original = logits.argmax(1).numpy(), whole.argmax(1).numpy()
    differ = np.flatnonzero(best != token)
    gaps = [float(logits[i, best[i]] - logits[i, token[i]]) for i in differ]
    moved = torch.from_numpy(np.abs(states - found["hidden"].astype(np.float32)))
    bounds = [float(moved[i] @ (weight[best[i]] - weight[token[i]]).abs()) for i in differ]
    body, prompt, free = same.body(), found["free"][:PROMPT].tolist(), 0
    state = body.feed(prompt)
    for wanted in found["free"][PROMPT:]:
        chosen = int((torch.from_numpy(state) @ weight.T).argmax())
        if chosen != wanted:
            break
        free += 1
        state = body.feed([chosen])
    result = {"positions": len(token), "head_equal": int((want == token).sum()), "head_ties": ties}
    result |= {"float32_equal": int((best == token).sum()), "largest_gap": max(gaps, default=0.0), "mean_gap": float(np.mean(gaps)) if gaps else 0.0}
    result |= {"gaps_within_their_bounds": sum(g <= b for g, b in zip(gaps, bounds)), "largest_bound": max(bounds, default=0.0)}
    result |= {"original_equal": int((of_original == token).sum()), "original_and_float32": int((of_original == best).sum())}
    print(json.dumps(result | {"identical_free_tokens": free, "of": FREE}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    first = verbs.add_parser("run")
    first.add_argument("folder", type=Path)
    first.add_argument("text", type=Path)
    first.add_argument("states", type=Path)
    first.add_argument("--positions", type=int, default=2000)
    first.add_argument("--plugin", type=Path)
    first.set_defaults(call=run)
    second = verbs.add_parser("compare")
    second.add_argument("checkpoint")
    second.add_argument("states", type=Path)
    second.add_argument("--body", type=Path, required=True, help="the checkpoint's export by flashhead export onnx --dialect portable")
    second.set_defaults(call=compare)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    sys.exit(main())
