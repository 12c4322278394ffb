"""Whether a checkpoint answers with FlashHead as it does with its dense head: tasks of lm-evaluation-harness, and texts.

The tasks are the harness's, answered twice over one model of which nothing but the head changes (`quality_lm`). Texts are
measured by `evaluation`: agreement text by text, and how long greedy text that runs freely stays the dense head's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation import evaluate_checkpoint
from flashhead_edge.evaluation.run import untimed_record, within
from flashhead_edge.progress import Progress, silent

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
        One JSON document: `tasks`, one record a task as it was asked for, with `parts` where it is a group; `texts`, the
        document of `evaluation.evaluate_checkpoint`, or None.
    Raises:
        CheckpointError: the folder holds no FlashHead checkpoint, or a damaged one.
        SettingsError: a task, a text or a number is out of range.
    """
    if not tasks and not texts:
        raise SettingsError("bench quality: no task and no text given, expected at least one; add --task NAME or --text FILE")
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("prompts", prompts, 0), ("positions", positions, 1)):
        if value is not None and value < least:
            raise SettingsError(f"bench quality: {name} is {value}, expected {least} or more; call again with another value")
    parts = 2 if tasks and texts else 1
    answered = _tasks(folder, tasks, limit, shots, within(progress, "tasks", 0, parts), device, trust_remote_code, command) if tasks else []
    measured = None
    if texts:
        inner = within(progress, "texts", parts - 1, parts)
        measured = evaluate_checkpoint(
            folder, texts, positions, inner, rivals=False, prompts=prompts, device=device, trust_remote_code=trust_remote_code, command=command
        )
    return {"tasks": answered, "texts": measured}


def _tasks(
    folder: str | Path, names: Sequence[str], limit: int | None, shots: int | None, progress: Progress, device: str | None, remote: bool, command: str | None
) -> list[dict[str, Any]]:
    """One record a task."""
    with quiet():
        progress("loading lm-evaluation-harness", None)
        from flashhead_edge.bench import quality_tasks

        ready = quality_tasks.load([quality_tasks.parse(name) for name in names], shots)
        progress("loading the model", None)
        lm, common = _opened(folder, device, remote, command)
        return [{**common, **_one(lm, task, limit, within(progress, task.asked.name, i, len(ready)))} for i, task in enumerate(ready)]


def _opened(folder: str | Path, device: str | None, remote: bool, command: str | None) -> tuple[Any, dict[str, Any]]:
    """The model with both heads, and what every record says of it."""
    import torch

    from flashhead_edge.bench.quality_lm import HeadLM
    from flashhead_edge.checkpoint import chosen_device, load_model, load_tokenizer, open_source, read_head, read_index
    from flashhead_edge.evaluation.measures import HeadContender, head_kind
    from flashhead_edge.integrations.hf import FlashHead, bias_of, output_head
    from flashhead_edge.reference import torch_head
    from flashhead_edge.rivals import DenseHead

    source = open_source(folder, trust_remote_code=remote)
    stored = read_head(source)
    index = read_index(source.folder, stored)
    tokenizer = load_tokenizer(source, trust_remote_code=remote)
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"{folder}: the tokenizer has no end token, expected one, where the harness ends texts; give it one in tokenizer_config.json")
    device = chosen_device(device)
    model = load_model(source, device=device, trust_remote_code=remote)
    module: Any = output_head(model)
    weight, bias = module.weight.detach(), bias_of(module)
    kind, flash = head_kind(index), FlashHead(index, folder=source.folder, device=device)
    contender = HeadContender(kind, torch_head(index, weight, bias), 2 * index.hidden_size)
    lm = HeadLM(model, tokenizer, flash, DenseHead(weight, bias, index.vocab_size), contender, stored.scale, stored.softcap)
    ran = {
        "backend": "torch",
        "backend_version": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }
    return lm, untimed_record(source.name, (index.vocab_size, index.hidden_size), lm.max_length, kind, ran, command)


def _one(lm: Any, ready: Any, limit: int | None, progress: Progress) -> dict[str, Any]:
    """One task as it was asked for, answered with both heads."""
    import lm_eval

    from flashhead_edge.bench.quality_compare import compare_task, scored, share
    from flashhead_edge.bench.quality_lm import HEADS, Kept

    lm.kept, runs = Kept(), []
    for task in ready.tasks:
        check_room(task, lm.max_length)
    for side, head in enumerate(HEADS):
        lm.side, lm.progress = side, within(progress, head, side, len(HEADS))
        # the answers are kept from the first run, bootstrapped errors would only take time
        runs.append(lm_eval.simple_evaluate(model=lm, tasks=list(ready.tasks), limit=limit, bootstrap_iters=0, log_samples=True))
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
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(before)
