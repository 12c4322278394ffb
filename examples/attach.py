"""transformers' own generate, with the fast head.

    python examples/attach.py CHECKPOINT [PROMPT]

CHECKPOINT is a folder that `flashhead convert` wrote.
"""

from __future__ import annotations

import sys

import flashhead_edge


def main(folder: str, prompt: str = "Three things that float: ") -> str:
    from flashhead_edge.checkpoint import load_model, load_tokenizer

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    head = flashhead_edge.load_head(folder).attach(model)
    fast = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    head.detach()
    dense = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    same = "the same text as the dense head" if fast.tolist() == dense.tolist() else "a text that parts from the dense head's"
    return f"{tokenizer.decode(fast[0], skip_special_tokens=True)}\n({same})"


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python examples/attach.py CHECKPOINT [PROMPT]")
    print(main(*sys.argv[1:]))
