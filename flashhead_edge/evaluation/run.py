"""The evaluation of a checkpoint on texts: one model load, one document. torch is loaded inside the functions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.costs import dense_bytes
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation.measures import (
    Contender,
    Dense,
    Evaluation,
    HeadContender,
    Measured,
    as_json,
    free_running,
    head_kind,
    join,
    measure_all,
    summarise,
)
from flashhead_edge.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_TOKENS = 64  # of a prompt cut from the text
PROMPT_EVERY, MOST_PROMPTS = 500, 8  # positions; prompts of a text
NEW_TOKENS = 128  # of greedy text after it


@dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens."""

    name: str
    digest: str  # SHA-256 of the file
    ids: list[int]


def evaluate_checkpoint(
    folder: str | Path,
    texts: Sequence[str | Path],
    positions: int = 8000,
    progress: Progress = silent,
    *,
    rivals: bool = True,
    prompts: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure the head in a checkpoint on texts, beside its rivals.

    Args:
        folder: a FlashHead checkpoint.
        texts: UTF-8 files; of each the first `positions` tokens count, read in windows of 512.
        rivals: measure the dense int8 and int4 heads and the published method as well.
        prompts: prompts cut from each text, from which greedy text runs freely; 0 for none. Unless told, one for each
            500 positions, at most 8.
        device: where the model computes: a GPU if there is one, unless told.
        command: the command line, for the record.
    Returns:
        One JSON document: the record of all texts together with `rivals`, a list of the same; under `texts` the same
        for each text; under `summary` the lowest agreement and the mean share of the dense head's bytes.
    Raises:
        CheckpointError: the folder holds no FlashHead checkpoint, or a damaged one.
        SettingsError: a setting is out of range, or a text is missing, empty or not UTF-8.
    """
    prompts = min(MOST_PROMPTS, -(-positions // PROMPT_EVERY)) if prompts is None else prompts
    if positions < 1 or prompts < 0:
        raise SettingsError(f"evaluation: {positions} positions and {prompts} prompts, expected at least 1 and 0; call again with other values")
    if not texts:
        raise SettingsError("evaluation: no text given, expected at least one; give a text file (--text FILE)")
    contents = [read_text(Path(text)) for text in texts]
    import torch

    from flashhead_edge.capture import WINDOW
    from flashhead_edge.checkpoint import chosen_device, load_model, load_tokenizer, open_source, read_head, read_index

    source = open_source(folder, trust_remote_code=trust_remote_code)
    progress("loading the head", None)
    stored = read_head(source)
    index = read_index(source.folder, stored)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    read = [Text(Path(t).name, digest, _tokens(tokenizer, content, positions, t)) for t, (content, digest) in zip(texts, contents)]
    progress("loading the model", None)
    device = chosen_device(device)
    model: Any = load_model(source, device=device, trust_remote_code=trust_remote_code)
    module = model.get_output_embeddings()
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    stored = replace(stored, weight=weight, bias=bias)  # the matrix that was read is let go: one copy in memory
    judge, contenders = _contenders(source.folder, stored, index, rivals, progress)

    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    dense = dense_bytes(index.vocab_size, index.hidden_size)
    parts: list[list[Measured]] = []
    records, running = [], []
    for i, text in enumerate(read):
        measured, free = _one_text(model, text, judge, contenders, positions, prompts, stored, within(progress, text.name, i, len(read)))
        evaluations = [replace(summarise(c, m, dense, text_of), free_running=f) for c, m, f in zip(contenders, measured, free)]
        parts.append(measured)
        running.append(free)
        records.append({"text": text.name, "sha256": text.digest, **_with_rivals(evaluations)})
    pooled = [replace(summarise(c, join(list(m)), dense, text_of), free_running=_pool(list(f))) for c, m, f in zip(contenders, zip(*parts), zip(*running))]
    ran = {
        "backend": "torch",
        "backend_version": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }
    record = untimed_record(source.name, (index.vocab_size, index.hidden_size), WINDOW, head_kind(index), ran, command)
    return {
        **record,
        "precision": body_precision(source.config),
        **_with_rivals(pooled),
        "summary": summary(records, index.summary),
        "texts": records,
        "calibration": index.summary,
    }


def body_precision(config: Mapping[str, Any]) -> str:
    """What a model's linear layers are stored in: how they were quantised, or their type; float32 where config.json does not say."""
    stored = str((config.get("quantization_config") or {}).get("quant_method") or config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(stored, stored)


def untimed_record(model: str, shape: tuple[int, int], context: int, head: str, ran: dict[str, Any], command: str | None) -> dict[str, Any]:
    """What every measurement says of itself, of one that times nothing.

    Args:
        ran: backend, its version, device, threads.
    """
    said = {"model": model, "shape": list(shape), "real_weights": None, "batch": 1, "context": context, "head": head}
    absent = dict.fromkeys(("microseconds", "tokens_per_second", "speedup_over_dense", "spread", "commit"))
    return {**said, **ran, **absent, "command": command}


def summary(records: Sequence[dict[str, Any]], calibration: dict[str, Any]) -> dict[str, Any]:
    """What several texts come to: the lowest agreement counts, not the mean."""
    lowest = min(records, key=lambda r: (r["top1_agreement"], r["text"]))
    return {
        "texts": len(records),
        "target_agreement": calibration.get("target_agreement"),
        "lowest_agreement": lowest["top1_agreement"],
        "lowest_agreement_interval": lowest["top1_agreement_interval"],
        "lowest_agreement_text": lowest["text"],
        "mean_agreement": float(np.mean([r["top1_agreement"] for r in records])),
        "mean_bytes_share": float(np.mean([r["bytes_share"] for r in records])),
    }


def _contenders(folder: Path, head: Any, index: Any, rivals: bool, progress: Progress) -> tuple[Dense, list[Contender]]:
    """The judge, and the head of the checkpoint before its rivals."""
    from flashhead_edge.reference import torch_head
    from flashhead_edge.rivals import DenseHead, rivals_of

    own = HeadContender(head_kind(index), torch_head(index, head.weight, head.bias), 2 * index.hidden_size)
    others = rivals_of(folder, head, head.weight, head.bias, progress) if rivals else []
    return DenseHead(head.weight, head.bias, index.vocab_size), [own, *others]


def _one_text(
    model: Any, text: Text, judge: Dense, contenders: list[Contender], positions: int, prompts: int, head: Any, progress: Progress
) -> tuple[list[Measured], list[dict[str, Any] | None]]:
    """Every contender on one text: position by position, and running freely."""
    import torch

    from flashhead_edge.capture import capture_ids

    device = model.get_output_embeddings().weight.device
    ids = torch.tensor(text.ids, dtype=torch.int64)
    hidden = capture_ids(model, ids[:positions], progress=lambda message, share: progress("reading the text", 0.25 * (share or 0))).to(device)
    free: list[dict[str, Any] | None] = [None] * len(contenders)
    cut = cut_prompts(ids[:positions], prompts)
    if cut is not None:
        states, tokens = dense_text(model, judge, cut, NEW_TOKENS, lambda message, share: progress(message, 0.25 + 0.15 * (share or 0)))
        free = [free_running(c, states, tokens) for c in contenders]
    targets = np.full(len(hidden), -1)
    following = text.ids[1 : positions + 1]
    targets[: len(following)] = following
    measured = measure_all(
        contenders,
        hidden,
        targets,
        judge,
        vocab_size=head.vocab_size,
        scale=head.scale,
        softcap=head.softcap,
        progress=lambda m, s: progress(m, 0.4 + 0.6 * (s or 0)),
    )
    return measured, free


def cut_prompts(ids: Tensor, k: int) -> Tensor | None:
    """At most `k` prompts of equal length from all over a text, [k, n], or None where there is none to cut."""
    length = min(PROMPT_TOKENS, len(ids))
    k = min(k, len(ids) // length) if length else 0
    return ids[: k * (len(ids) // k)].view(k, -1)[:, :length].contiguous() if k else None


def dense_text(model: Any, judge: Dense, prompts: Tensor, new_tokens: int, progress: Progress = silent) -> tuple[Tensor, np.ndarray]:
    """The dense head's greedy text after prompts [k, n], end tokens not heeded.

    Returns:
        The states that its tokens come from, [k * new_tokens, d], and the tokens, [k, new_tokens] int64.
    """
    import torch
    from transformers import DynamicCache

    from flashhead_edge.capture import recording
    from flashhead_edge.checkpoint import cache_arguments

    device = model.get_output_embeddings().weight.device
    states, tokens, ids = [], [], prompts.to(device)
    cached = cache_arguments(model, DynamicCache(config=model.config))
    with torch.inference_mode(), recording(model, compute=False) as seen:
        for i in range(new_tokens):
            model(input_ids=ids, **cached)
            hidden = seen.pop().reshape(len(prompts), ids.shape[1], -1)[:, -1].float()
            token = judge.tokens(hidden)
            states.append(hidden)
            tokens.append(token)
            ids = torch.from_numpy(token)[:, None].to(device)
            progress("running greedy text", (i + 1) / new_tokens)
    return torch.stack(states, 1).flatten(0, 1), np.stack(tokens, 1)


def _pool(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Free-running text of all texts together; the median is that of the texts' medians."""
    some = [p for p in parts if p is not None]
    if not some:
        return None
    weights = [p["prompts"] for p in some]
    return {
        "prompts": sum(weights),
        "tokens": some[0]["tokens"],
        "mean": float(np.average([p["mean"] for p in some], weights=weights)),
        "median": float(np.median([p["median"] for p in some])),
        "whole": float(np.average([p["whole"] for p in some], weights=weights)),
    }


def _with_rivals(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    return {**as_json(evaluations[0]), "rivals": [as_json(e) for e in evaluations[1:]]}


def within(progress: Progress, name: str, i: int, n: int) -> Progress:
    """The progress of the i-th of n texts."""

    def inner(message: str, share: float | None = None) -> None:
        progress(f"{name}: {message}", (i + (share or 0.0)) / n)

    return inner


def read_text(path: Path) -> tuple[str, str]:
    """A text file and its SHA-256."""
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no such file"
        raise SettingsError(f"evaluation text {path}: {found}, expected a text file; check the path")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"evaluation text {path}: byte {error.start} is not UTF-8, expected UTF-8 text; convert the file") from error
    if not text.strip():
        raise SettingsError(f"evaluation text {path}: it is empty, expected text; give another one")
    return text, hashlib.sha256(data).hexdigest()


def _tokens(tokenizer: Any, content: str, positions: int, name: str | Path) -> list[int]:
    """The first tokens of a text, one more than there are positions where it has them: the last position's target."""
    ids = [int(i) for i in tokenizer(content, add_special_tokens=False, verbose=False).input_ids[: positions + 1]]
    if not ids:
        raise SettingsError(f"evaluation text {name}: no tokens found, expected at least one; give a file with text in it")
    return ids
