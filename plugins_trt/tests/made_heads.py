"""Folders with made heads for drive_v3: a file of weights, the FlashHead plugin's fields, states, and the tokens of the PyTorch reference.

python plugins_trt/tests/made_heads.py OUT [--multiprocessors 132 --shared-kib 227]   (an H100; where torch sees a GPU that one)

A folder a case: weights.safetensors; fields.bin, as plugins/fields.h lays them out; hidden.bin [N, d]; tokens.bin int32 [N].
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch

from flashhead_edge.bench.head import with_shares
from flashhead_edge.cases import CASES, Case, made_index, made_rows, made_states
from flashhead_edge.kernels.packing import STATIC_SHARED, pack, plans, words_of
from flashhead_edge.reference import torch_head

MADE = {  # case: type, logit scale, soft-cap, greatest batch
    "fitted": (torch.float16, 1.0, 0.0, 4),
    "bits alone, caps hit": (torch.bfloat16, 0.5, 30.0, 32),
    "published": (torch.float16, 1.0, 0.0, 5),
}
STATES = 32


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return f"{value:016x}"


def write_weights(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> tuple[dict[str, str], str]:
    """A safetensors file; each tensor's place in it as a field of a plugin, and the file's fingerprint."""
    header, at = {}, 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    path.write_bytes(head + b"".join(data for _, _, data in tensors.values()))
    places = {name: f"{len(head) + header[name]['data_offsets'][0]} {len(tensors[name][2])}" for name in tensors}
    return places, fnv(head)


def to_bytes(fields: dict[str, int | float | str | list[int]]) -> bytes:
    """Fields as plugins/fields.h lays them out."""
    out = b""
    for name, value in fields.items():
        if isinstance(value, str):
            kind, count, data = 2, len(value.encode()), value.encode()
        elif isinstance(value, float):
            kind, count, data = 1, 1, struct.pack("<f", value)
        else:
            whole = value if isinstance(value, list) else [value]
            kind, count, data = 0, len(whole), np.array(whole, "<i4").tobytes()
        out += struct.pack("<3I", kind, len(name), count) + name.encode() + data
    return struct.pack("<4I", 0x4C504846, 2, 16 + len(out), len(fields)) + out


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def make(case: Case, folder: Path, multiprocessors: int, shared_bytes: int) -> None:
    dtype, scale, softcap, most = MADE[case.name]
    weight = torch.from_numpy(made_rows(case)).to(dtype)
    hidden = torch.from_numpy(made_states(case, STATES)).to(dtype)
    index = with_shares(made_index(case), weight, hidden[:16], case.shares)
    packed = pack(index)
    words = [words_of(p) for p in plans(packed, multiprocessors, shared_bytes, most)]
    folder.mkdir(parents=True, exist_ok=True)
    kind = "F16" if dtype == torch.float16 else "BF16"
    tensors = {"embedding": (kind, tuple(weight.shape), raw(weight)), "head.image": ("U8", (packed.image.size,), packed.image.tobytes())}
    places, fingerprint = write_weights(folder / "weights.safetensors", tensors)
    fields = {
        "rows": places["embedding"], "image": places["head.image"], "bias": "", "bf16": int(dtype == torch.bfloat16),
        "vocab": index.vocab_size, "hidden": index.hidden_size, "candidates": packed.layout.candidates, "stages": len(index.stages),
        "logits": 1, "sampling": 1, "logit_scale": scale, "softcap": softcap,
        "plans": [w for plan in words for w in plan], "plan_words": len(words[0]), "max_rows": most,
        "file": "weights.safetensors", "folder": str(folder.resolve()), "fingerprint": fingerprint,
    }  # fmt: skip
    (folder / "fields.bin").write_bytes(to_bytes(fields))
    (folder / "hidden.bin").write_bytes(raw(hidden))
    (folder / "tokens.bin").write_bytes(torch_head(index, weight).step(hidden).token.numpy().astype("<i4").tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--shared-kib", type=int, default=227)
    options = parser.parse_args()
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        options.multiprocessors, options.shared_kib = found.multi_processor_count, found.shared_memory_per_block_optin >> 10
    for made in CASES:
        if made.name in MADE:
            make(made, options.out / made.name.replace(", ", "-").replace(" ", "-"), options.multiprocessors, (options.shared_kib << 10) - STATIC_SHARED)
            print(made.name)
