"""Whether a checkpoint answers with FlashHead as it does with its dense head: tasks of lm-evaluation-harness, and texts.

The tasks are the harness's, answered twice over one model of which nothing but the head changes (`quality_lm`). Texts are
measured by `evaluation`: agreement text by text, and how long greedy text that runs freely stays the dense head's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_edge.bench.as_records import machine
from flashhead_edge.bench.provenance import commit, processor
from flashhead_edge.bench.quality_records import records_of
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation import evaluate_checkpoint
from flashhead_edge.evaluation.run import body_precision, read_text, within
from flashhead_edge.progress import Progress, silent
from flashhead_edge.records.form import document

if TYPE_CHECKING:
    from flashhead_edge.bench.quality_lm import HeadLM
    from flashhead_edge.bench.quality_tasks import Ready
    from flashhead_edge.checkpoint import Source

PROMPTS, POSITIONS = 8, 8000
NEW_TOKENS = 256  # of an answer at most, where a task does not say: the harness's own number


def bench_quality(
    folder: str | Path,
    tasks: Sequence[str] = (),
    texts: Sequence[str | Path] = (),
    command: str | None = None,
    progress: Progress = silent,
    *,
    limit: int | None = None,
    shots: int | None = None,
    prompts: int = PROMPTS,
    positions: int = POSITIONS,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare both heads of a checkpoint on tasks and on texts.

    Args:
        folder: a FlashHead checkpoint.
        tasks: of lm-evaluation-harness: NAME where there is a network, NAME=FILE with documents from a file (`quality_tasks`).
        texts: UTF-8 files.
        command: the command line, for the record.
        limit: items asked of each task at most; None is all.
        shots: worked examples before each question; None is the task's own number, none with documents from a file.
        prompts: prompts cut from each text, after which 128 tokens run freely.
        positions: positions measured of each text at most.
        device: where the model computes: a GPU if there is one, unless told.
    Returns:
        One JSON document. `tasks`: a list, one a task as it was asked for: `task`, `file`, `sha256`, `harness`; `parts`, one for each task of a
        group (`quality_compare.compare_task`); `scored`, the tokens whose probability was asked (`quality_compare.scored`); `steps`, the share
        of the steps of the dense head's texts at which FlashHead names the same token. `texts`: the document of
        `evaluation.evaluate_checkpoint`, or None. `benchmark`: all of it as a file of records.
    Raises:
        CheckpointError: the folder holds no FlashHead checkpoint, or a damaged one.
        SettingsError: a task, a text or a number is out of range.
    """
    if not tasks and not texts:
        raise SettingsError("bench quality: no task and no text given, expected at least one; add --task NAME or --text FILE")
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("prompts", prompts, 0), ("positions", positions, 1)):
        if value is not None and value < least:
            raise SettingsError(f"bench quality: {name} is {value}, expected {least} or more; call again with another value")
    for text in texts:  # one that is not there is said before a task has run for an hour
        read_text(Path(text))
    from flashhead_edge.checkpoint import chosen_device, open_source, read_head, read_index
    from flashhead_edge.evaluation.measures import head_kind

    progress("looking at the checkpoint", None)
    device = chosen_device(device)
    source = open_source(folder, trust_remote_code=trust_remote_code)
    index = read_index(source.folder, read_head(source))
    parts = 2 if tasks and texts else 1
    answered: list[dict[str, Any]] = []
    if tasks:
        answered = _tasks(source, tasks, limit, shots, within(progress, "tasks", 0, parts), device)
    measured = None
    if texts:
        inner = within(progress, "texts", parts - 1, parts)
        measured = evaluate_checkpoint(
            folder, texts, positions, inner, rivals=False, prompts=prompts, device=device, trust_remote_code=trust_remote_code, command=command
        )
    found = {"tasks": answered, "texts": measured}
    about = {
        "model": source.name,
        "shape": [index.vocab_size, index.hidden_size],
        "real_weights": True,
        "head": "FlashHead" if head_kind(index) == "fitted" else head_kind(index),
        "target_agreement": index.summary.get("target_agreement"),
        "calibrated_agreement": index.summary.get("top1_agreement"),
        "settings": {"limit": limit},
        "precision": body_precision(source.config),
        **machine(device.startswith("cuda")),
        **computing(device),
        "seeds": [],
        "commit": commit(),
        "command": command,
    }
    moment = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**found, "benchmark": document(records_of(found, about, moment))}


def computing(device: str) -> dict[str, Any]:
    """Where torch computes, as records name it."""
    import torch

    return {
        "backend": "torch",
        "backend_version": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
    }


def _tasks(source: Source, names: Sequence[str], limit: int | None, shots: int | None, progress: Progress, device: str) -> list[dict[str, Any]]:
    """What both heads answered, task by task."""
    with quiet():
        progress("loading lm-evaluation-harness", None)
        from flashhead_edge.bench import quality_tasks

        ready = quality_tasks.load([quality_tasks.parse(name) for name in names], shots)
        progress("loading the model", None)
        lm = opened(source, device)
        return [one_task(lm, task, limit, within(progress, task.asked.name, i, len(ready))) for i, task in enumerate(ready)]


def opened(source: Source, device: str) -> HeadLM:
    """The model with both heads.

    Raises:
        SettingsError: the tokenizer has no end token.
    """
    from flashhead_edge.bench.quality_lm import HeadLM
    from flashhead_edge.checkpoint import load_model, load_tokenizer, read_head, read_index
    from flashhead_edge.evaluation.measures import HeadContender, head_kind
    from flashhead_edge.integrations.hf import FlashHead, bias_of, output_head
    from flashhead_edge.reference import torch_head
    from flashhead_edge.rivals import DenseHead

    stored = read_head(source)
    index = read_index(source.folder, stored)
    tokenizer = load_tokenizer(source, trust_remote_code=source.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"{source.name}: the tokenizer has no end token, expected one, where the harness ends texts; name one in tokenizer_config.json")
    model = load_model(source, device=device, trust_remote_code=source.trust_remote_code)
    module: Any = output_head(model)
    weight, bias = module.weight.detach(), bias_of(module)
    contender = HeadContender(head_kind(index), torch_head(index, weight, bias), 2 * index.hidden_size)
    flash = FlashHead(index, folder=source.folder, device=device)
    return HeadLM(model, tokenizer, flash, DenseHead(weight, bias, index.vocab_size), contender, stored.scale, stored.softcap)


def one_task(lm: HeadLM, ready: Ready, limit: int | None, progress: Progress) -> dict[str, Any]:
    """One task as it was asked for, answered with both heads."""
    import lm_eval

    from flashhead_edge.bench.quality_compare import compare_task, scored, share
    from flashhead_edge.bench.quality_lm import HEADS, Kept

    lm.kept, runs = Kept(), []
    for task in ready.tasks:
        check_room(task, lm.max_length)
    for side, head in enumerate(HEADS):
        lm.side, lm.progress = side, within(progress, head, side, len(HEADS))
        # errors by bootstrap would only take time: the interval of a share is Wilson's
        runs.append(lm_eval.evaluate(lm, {"tasks": {t.task_name: t for t in ready.tasks}}, limit=limit, bootstrap_iters=0, log_samples=True))
    dense, flash = runs
    parts = []
    for task in ready.tasks:
        name = task.task_name
        found = compare_task(task.OUTPUT_TYPE, dense["results"][name], flash["results"][name], (dense["samples"][name], flash["samples"][name]))
        parts.append({"task": name, "version": dense["versions"].get(name), "shots": dense["n-shot"].get(name), **found})
    tally = lm.kept.tally
    return {
        "task": ready.asked.name,
        "file": None if ready.asked.file is None else ready.asked.file.name,
        "sha256": ready.digest,
        "harness": lm_eval.__version__,
        "parts": parts,
        "scored": scored(tally.measured),
        "steps": share(tally.same, tally.steps) if tally.steps else None,
    }


def check_room(task: Any, context: int) -> None:
    """Refuse a task whose answers alone are longer than the model's context."""
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", NEW_TOKENS) if task.OUTPUT_TYPE == "generate_until" else 0
    if wanted >= context:
        raise SettingsError(
            f"task {task.task_name}: answers of up to {wanted:,} tokens, expected fewer than the model's context of {context:,}; choose another task"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness and its data sets without their logs and bars: what matters of them is in the document."""
    import datasets

    harness, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    before = harness.level
    harness.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        harness.setLevel(before)
        if not bars:
            datasets.enable_progress_bars()
