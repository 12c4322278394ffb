"""flashhead bench quality"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from flashhead_edge.cli.common import Settings, answer_only, common_options, folder_argument, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Compare the answers of a checkpoint's two heads: tasks of lm-evaluation-harness, texts.")
@folder_argument
@click.option("--task", "tasks", multiple=True, metavar="NAME[=FILE]", help="Task of lm-evaluation-harness; its documents from FILE, or fetched. Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), help="Items asked of each task at most.  [default: all]")
@click.option("--shots", type=click.IntRange(min=0), help="Worked examples before each question.  [default: the task's own; with FILE none]")
@click.option("--text", "texts", multiple=True, metavar="FILE", help="Text to measure agreement and free-running equality on. Repeatable.")
@click.option("--prompts", type=click.IntRange(min=0), default=8, show_default=True, help="Prompts cut from each text, for 128 tokens that run freely.")
@click.option("--positions", type=click.IntRange(min=1), default=8000, show_default=True, help="Positions measured of each text at most.")
@click.option("--torch-device", metavar="NAME", help="Where the model runs.  [default: a GPU if there is one]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along.")
@json_option
@common_options
@click.pass_obj
def quality(
    settings: Settings,
    out: Path,
    tasks: tuple[str, ...],
    limit: int | None,
    shots: int | None,
    texts: tuple[str, ...],
    prompts: int,
    positions: int,
    torch_device: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Answer tasks with the dense head of OUT and with FlashHead, and count equal answers.

    A task's FILE holds JSON lines with the fields of its data set; gsm8k and wikitext may be plain text. With --shots its first documents
    are the examples. What is compared is one head with the other, not the model with the truth.
    """
    if not tasks and not texts:
        raise click.UsageError("nothing to measure: give --task NAME or --text FILE.")
    command = shlex.join(["flashhead", *settings.arguments])
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars, read when tqdm is loaded: our own progress is shown
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.bench.quality import bench_quality
            from flashhead_edge.report.quality import show_quality

            document = bench_quality(
                out,
                tasks,
                texts,
                command,
                progress,
                limit=limit,
                shots=shots,
                prompts=prompts,
                positions=positions,
                device=torch_device,
                trust_remote_code=trust_remote_code,
            )
        show_quality(document, person(stdout, as_json))
        if as_json:
            write_json(document, stdout)
