"""The tasks of lm-evaluation-harness: by name where there is a network, or its prompts and measures over documents in a local file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.tasks import TaskManager

from flashhead_edge.errors import SettingsError, first_line
from flashhead_edge.evaluation.run import read_text

SEED = 1234  # of which examples stand before a question: the harness's own
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Asked:
    """A task as it was asked for."""

    name: str  # the harness's name of a task, a group or a tag
    file: Path | None  # its documents; None: where the harness fetches them from


@dataclass(frozen=True, eq=False)
class Ready:
    """A task with its documents."""

    asked: Asked
    tasks: tuple[Any, ...]  # the harness's `Task` objects: one, or those of a group
    digest: str | None  # SHA-256 of the local file


def parse(text: str) -> Asked:
    """`NAME` or `NAME=FILE`."""
    name, sign, file = text.partition("=")
    if not name or (sign and not file):
        raise SettingsError(f"task {text!r}: expected NAME or NAME=FILE, such as gsm8k or gsm8k=questions.jsonl; write it so")
    return Asked(name, Path(file) if sign else None)


def load(asked: list[Asked], shots: int | None = None) -> list[Ready]:
    """Find the tasks and their documents. Files are read, and all names looked up, before anything is fetched.

    Args:
        shots: worked examples before each question. None is the task's own number, and none with a local file; there the first `shots`
            documents are the examples, and are not asked. Tasks that score whole texts have none.
    Raises:
        SettingsError: an unknown task, a file that does not fit it, documents that cannot be fetched, or a task that a head cannot answer
            here: it runs code, or shows pictures.
    """
    read = [None if a.file is None else documents(a.name, a.file) for a in asked]
    manager = TaskManager()
    for a in asked:
        if a.name not in manager.task_index:
            raise SettingsError(
                f"task {a.name}: lm-evaluation-harness has no task of that name, expected one that `lm-eval ls tasks` lists; check its spelling"
            )
        if a.file is not None and a.name not in manager.all_subtasks:
            raise SettingsError(f"task {a.name}: it is a group of tasks, expected a single one for the documents of {a.file}; name one of the group")
    return [Ready(a, tasks_of(manager, a, None if r is None else r[0], shots), None if r is None else r[1]) for a, r in zip(asked, read)]


def tasks_of(manager: TaskManager, asked: Asked, rows: list[dict[str, Any]] | None, shots: int | None) -> tuple[Any, ...]:
    """The harness's objects of one task asked for, each with its documents."""
    spec: Any = asked.name
    if rows is not None:
        kept = shots or 0
        if len(rows) <= kept:
            raise SettingsError(f"{asked.file}: {len(rows)} documents found, expected more than the {kept} that are examples; give a longer file")
        given = {"custom_dataset": local(rows[:kept], rows[kept:]), "num_fewshot": kept, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
        spec = {"group": f"{asked.name} of {asked.file}", "task": [{"task": asked.name, **given}]}  # a group's entry is how the harness overrides a task
    try:
        found = tuple(manager.load([spec])["tasks"].values())
        if rows is not None:
            for doc in found[0].eval_docs:
                words(found[0], doc)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, TemplateError) as error:  # of data sets and templates
        raise SettingsError(f"task {asked.name}: {reason(asked, error)}") from error
    if rows is not None and shots and found[0].OUTPUT_TYPE == "loglikelihood_rolling":
        return tasks_of(manager, asked, rows, 0)  # whole texts are scored, before which nothing stands
    for task in found:
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows pictures or sounds"
            raise SettingsError(f"task {asked.name}: it {what}, expected one of text alone; choose another task")
        if rows is None and shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return found


def reason(asked: Asked, error: Exception) -> str:
    """Why a task's documents cannot be had, and what to do."""
    if asked.file is None:
        return f"its documents cannot be fetched ({first_line(error)}), expected a network or a local file; give --task {asked.name}=FILE"
    return f"the documents of {asked.file} do not fit ({first_line(error)}), expected the fields of the task's own data set; correct the file"


def words(task: Any, doc: Any) -> None:
    """Make what a task asks about a document: it raises, in one of many ways, where a field is missing."""
    task.doc_to_text(doc)
    task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        task.doc_to_choice(doc)


def local(shots: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Callable[..., Any]:
    """What a task calls for its data set: `rows` in every split that may be asked, the examples in `train`."""

    def made(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(shots or rows if split == "train" else rows) for split in SPLITS})

    return made


def documents(task: str, file: Path) -> tuple[list[dict[str, Any]], str]:
    """The documents in a local file, and its SHA-256.

    Args:
        task: by which plain text is cut into documents (`TEXTS`).
        file: JSON lines, each an object with the fields of the task's data set; or plain text.
    """
    content, digest = read_text(file)
    if file.suffix == ".jsonl":
        return json_lines(file, content), digest
    if task not in TEXTS:
        raise SettingsError(f"{file}: plain text is known for {', '.join(sorted(TEXTS))} alone, expected JSON lines for {task}; write them to a .jsonl file")
    rows = TEXTS[task](content)
    if not rows:
        raise SettingsError(f"{file}: no document of {task} found, expected {SHAPES[task]}; write the file so, or as JSON lines")
    return rows, digest


def json_lines(file: Path, content: str) -> list[dict[str, Any]]:
    """One object a line; empty lines are left out."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{file}: line {number} is not JSON ({error.msg}), expected one object a line; correct it") from error
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise SettingsError(f"{file}: line {number} is {found}, expected an object{f' with {sorted(rows[0])}' if rows else ''}; correct it")
        rows.append(row)
    return rows


def questions(content: str) -> list[dict[str, Any]]:
    """GSM8K as text: blocks of `Question: ...` and `Answer: ...`, empty lines between them."""
    found = re.findall(r"^Question: (.*?)\nAnswer: (.*?)(?=\n\s*\nQuestion: |\s*\Z)", content, re.DOTALL | re.MULTILINE)
    return [{"question": q.strip(), "answer": a.strip()} for q, a in found]


def articles(content: str) -> list[dict[str, Any]]:
    """WikiText as it is published: an article begins at a line ` = Title = `."""
    starts = [m.start() for m in re.finditer(r"^ ?= [^=\n].*[^=\s] = ?$", content, re.MULTILINE)]
    bounds = zip([0, *starts], [*starts, len(content)])
    return [{"page": page} for page in (content[a:b] for a, b in bounds) if page.strip()]


TEXTS: dict[str, Callable[[str], list[dict[str, Any]]]] = {"gsm8k": questions, "wikitext": articles}
SHAPES = {"gsm8k": "blocks of `Question: ...` and `Answer: ...`", "wikitext": "text"}
