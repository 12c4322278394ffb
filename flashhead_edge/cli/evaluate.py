"""flashhead evaluate"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from flashhead_edge.cli.common import Settings, answer_only, check_page, common_options, folder_argument, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Measure how faithful a head is and what it reads.")
@folder_argument
@click.option("--text", "texts", multiple=True, required=True, metavar="FILE", help="Text to measure on. Repeatable.")
@click.option("--positions", type=click.IntRange(min=1), default=8000, show_default=True, help="Positions measured of each text at most.")
@click.option("--no-rivals", "alone", is_flag=True, help="Leave out the other heads: this one alone, in a third of the time.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained report with plots to this file.")
@click.option("--torch-device", metavar="NAME", help="Where the model of a checkpoint runs.  [default: a GPU if there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of an export.  [default: one for each core]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along.")
@json_option
@common_options
@click.pass_obj
def evaluate(
    settings: Settings,
    out: Path,
    texts: tuple[str, ...],
    positions: int,
    alone: bool,
    html: Path | None,
    torch_device: str | None,
    threads: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure the head of OUT against the dense head on each text: of a checkpoint beside other heads, of an export alone, without torch."""
    check_page(html, "--html")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.jetson.folder import is_exported
            from flashhead_edge.report.html import write_html
            from flashhead_edge.report.tables import show_evaluation

            if is_exported(out):
                from flashhead_edge.jetson.evaluation import evaluate_export

                result = evaluate_export(out, texts, positions, progress, threads=threads, command=command)
            else:
                from flashhead_edge.evaluation import evaluate_checkpoint

                result = evaluate_checkpoint(
                    out, texts, positions, progress, rivals=not alone, device=torch_device, trust_remote_code=trust_remote_code, command=command
                )
        show_evaluation(result, person(stdout, as_json))
        if as_json:
            write_json(with_records("evaluate", result, command), stdout)
        if html is not None:
            write_html(result, html)
            click.echo(f"report: {html}", err=True)
