"""Writes the kept checkpoint of format version 1, `v1/`, and what it must answer, `v1.json`.

Run once, when version 1 was settled: python tests/checkpoint/kept/make_v1.py. It is never written again: the test
reads the files as they are, so that a reader that no longer understands version 1 is noticed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]

from flashhead_edge.checkpoint import PublishedClusters, open_source, read_head, write_checkpoint  # noqa: E402
from flashhead_edge.coding import decode, encode, to_torch  # noqa: E402
from flashhead_edge.index import Gate, HeadIndex, Stage  # noqa: E402
from flashhead_edge.reference import step, torch_head  # noqa: E402

V, D, K, SIZE = 37, 8, 10, 4
CODES = ("product2", "bits3", "int4/4", "int8/8", "float16")  # one stage for each kind of code


def hidden_states() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(11).normal(size=(16, D)).astype(np.float32))


def main() -> None:
    generator = np.random.default_rng(1)
    config = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(generator.normal(size=tuple(parameter.shape)) * 0.5))
    folder = HERE / "source"
    model.save_pretrained(folder)
    source = open_source(folder)
    head = read_head(source)
    rows = head.weight.float()
    table = np.where(np.arange(K * SIZE) < V, np.arange(K * SIZE), -1).astype(np.int32).reshape(K, SIZE)
    slots = torch.zeros(K * SIZE, D)
    slots[torch.from_numpy(table.reshape(-1) >= 0)] = rows
    mean = generator.normal(size=D).astype(np.float32) * np.float32(0.1)
    basis = torch.linalg.qr(torch.from_numpy(generator.normal(size=(D, D)).astype(np.float32))).Q[:, :6]
    rotation = encode(basis, "int8/6")
    used = decode(to_torch(rotation))
    truth = torch.cat([slots @ torch.from_numpy(mean)[:, None], slots @ used], 1)
    count = torch.from_numpy((table >= 0).sum(1).astype(np.float32))[:, None]
    means = slots.view(K, SIZE, D).sum(1) / count
    centroids = encode(torch.cat([means @ torch.from_numpy(mean)[:, None], means @ used], 1), "int8/7")

    def gate(n: int, margin: float, cap: int) -> Gate:
        return Gate(generator.integers(0, 24, n).astype(np.uint8), 0.25, margin, cap)

    done, stages = decode(to_torch(centroids)).repeat_interleave(SIZE, 0), []
    for i, code in enumerate(CODES):
        residual = encode(truth - done, code)
        done[:, : residual.columns] += decode(to_torch(residual))
        stages.append(Stage(residual, gate(K * SIZE, 4.0 + i, 30 - 2 * i)))
    index = HeadIndex(
        vocab_size=V, hidden_size=D, token_table=table, centroids=centroids, probe=gate(K, np.inf, 8), stages=tuple(stages),
        always_scored=np.array([2, 30], np.int32), mean=mean, rotation=rotation, tail_scale=0.9, tail_offset=-1.5,
        fingerprint=head.fingerprint, summary={"head": "fitted", "target_agreement": 0.995}, state_power=0.5,
    )  # fmt: skip
    published = PublishedClusters(means.numpy(), np.arange(V) // SIZE, 3)
    write_checkpoint(source, HERE / "v1", index, published)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    found = step(torch_head(index, head.weight), hidden_states())
    answer = {"tokens": found.token.tolist(), "counts": found.counts.tolist(), "fingerprint": head.fingerprint, "n_probes": 3}
    (HERE / "v1.json").write_text(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
