"""The head of a model: its matrix, read alone, without the rest of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.source import Source, open_source, weight_map
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.checkpoint.vocabulary import returnable_tokens
from flashhead_edge.errors import CheckpointError, UnsupportedModelError

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight", "tok_embeddings.weight")
EXACT = ("output.weight", "decoder.weight", "head.weight")  # heads in some families, but other things deeper inside
PACKED = ("weight_packed", "qweight", "scales", "weight_scale", "weight.absmax")
ELSEWHERE = ("visual", "vision", "audio", "talker", "mtp", "position", "token_type", "encoder.")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = 8192  # rows looked at together


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The head's matrix as stored, and what happens around it."""

    weight: Tensor  # [rows, d] as stored: bfloat16, float16 or float32; padding rows kept
    bias: Tensor | None  # [rows]
    vocab_size: int  # tokens that can be returned: those that the tokenizer names, at most `rows`
    name: str  # the tensor's name in the file
    tied: bool  # the matrix is the input embedding
    scale: float  # logits are multiplied by this after the head; 1 in most families
    softcap: float | None  # then softcap * tanh(x / softcap)
    fingerprint: str


def fingerprint(weight: Tensor, bias: Tensor | None = None) -> str:
    """A name for the head: SHA-256 of shape, dtype and bytes of the matrix [rows, d], and of the bias if there is one."""
    digest = hashlib.sha256()
    for part in (weight,) if bias is None else (weight, bias):
        digest.update(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}".encode())
        for block in part.detach().split(BLOCK):  # a block of a matrix on a GPU at a time on the host
            digest.update(memoryview(block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return f"sha256:{digest.hexdigest()}"


def read_head(source: Source | str | Path) -> HeadWeights:
    """Read the head's matrix alone.

    Raises:
        CheckpointError: the matrix is missing, quantised, not finite, or its file is damaged.
        UnsupportedModelError: the model has no head that can be replaced.
    """
    source = open_source(source)
    scale, softcap = families.logit_rule(source.config, source.name)
    if source.gguf is not None:
        from flashhead_edge.checkpoint import gguf

        weight, bias, tied, named = gguf.read_head(source.gguf)
        name, vocab_size = "lm_head.weight", min(len(weight), named)
    else:
        files = weight_map(source.folder)
        name, tied = head_name(files, source)
        head_entry(source)
        weight = _read(files[name], name)
        # a tied head has no bias of its own name's module: it keeps lm_head.bias
        bias_name = "lm_head.bias" if tied else name.removesuffix("weight") + "bias"
        bias = _read(files[bias_name], bias_name) if bias_name in files else None
        vocab_size = 0
    if bias is not None and bias.shape != weight.shape[:1]:
        raise CheckpointError(f"{source.name}: the head's bias is {list(bias.shape)}, expected {list(weight.shape[:1])}; fetch the model again")
    _check_finite(weight, f"{source.name}: {name}")
    if bias is not None:
        _check_finite(bias[:, None], f"{source.name}: the bias of {name}")
    vocab_size = vocab_size or returnable_tokens(source.folder, source.config, len(weight))
    return HeadWeights(weight, bias, vocab_size, name, tied, scale, softcap, fingerprint(weight, bias))


def head_entry(source: Source) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Name, dtype and shape of the head's matrix in a folder, from the file's header alone.

    Raises:
        CheckpointError: it is quantised, or no matrix.
    """
    files = weight_map(source.folder)
    name, _ = head_name(files, source)
    entry = read_header(files[name])[name]
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or len(entry.shape) != 2:
        raise CheckpointError(
            f"{source.name}: {name} is {entry.dtype} {list(entry.shape)}, expected an unquantised matrix [V, d] in F32, F16 or BF16; "
            "use a checkpoint whose head is not quantised"
        )
    return name, dtype, entry.shape


def head_name(names: Iterable[str], source: Source) -> tuple[str, bool]:
    """The name of the head's matrix, and whether it is the input embedding.

    Raises:
        CheckpointError: the head is quantised.
        UnsupportedModelError: there is no head.
    """
    names = [n for n in names if not any(part in n for part in ELSEWHERE)]

    def shortest(endings: tuple[str, ...]) -> str | None:
        found = [n for e in endings for n in names if n == e or n.endswith("." + e)]
        return min(found, key=lambda n: (n.count("."), n)) if found else None

    packed = shortest(tuple(f"{h.removesuffix('weight')}{p}" for h in HEADS for p in PACKED))
    if packed is not None:
        raise CheckpointError(
            f"{source.name}: the head is quantised ({packed}), expected lm_head.weight in 16 or 32 bits; use a checkpoint whose head is not quantised"
        )
    head = shortest(HEADS) or next((n for n in EXACT if n in names), None)
    if head is not None:
        return head, False
    tie = source.config.get("tie_word_embeddings", families.text_config(source.config).get("tie_word_embeddings"))
    embedding = shortest(EMBEDDINGS)
    if embedding is None or tie is False:
        found = "neither lm_head.weight nor an embedding"
        if embedding is not None:
            found = f"no lm_head.weight, and config.json says that {embedding} is not tied to it"
        raise UnsupportedModelError(f"{source.name}: {found}, expected an output head; choose another model")
    return embedding, True


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read ({error}); fetch the model again") from error


def _check_finite(matrix: Tensor, what: str) -> None:
    for first in range(0, len(matrix), BLOCK):
        bad = ~torch.isfinite(matrix[first : first + BLOCK]).all(1)
        if bool(bad.any()):
            row = first + int(bad.nonzero()[0])
            raise CheckpointError(f"{what} has NaN or infinite values (first in row {row}), expected finite numbers; fetch the model again")
