"""flashhead plan"""

from __future__ import annotations

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person, write_json


@click.command(short_help="Say whether a model fits, and how much text it can hold.")
@click.argument("model")
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Positions.  [default: 4,096, or what the model was made or exported for]")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Texts at once.  [default: 1, or what the model was exported for]")
@click.option(
    "--memory", metavar="8GB|BOARD", help="Plan for that much free memory, or for a board (orin-nano-8gb, agx-orin-64gb, ...).  [default: this machine]"
)
@click.option("--backend", type=click.Choice(["auto", "cuda"]), default="auto", show_default=True, help="Plan a checkpoint for our kernels alone: cuda.")
@json_option
@common_options
def plan(model: str, context: int | None, batch: int | None, memory: str | None, backend: str, as_json: bool) -> None:
    """Say what MODEL needs, part by part, against the memory that is free. MODEL is a checkpoint, a .gguf file or an export; only headers are read."""
    with answer_only() as stdout:
        from flashhead_edge.jetson.plan import plan as predict

        document = predict(model, context=context, batch=batch, memory=memory, backend=backend)
        if as_json:
            write_json(document, stdout)
        else:
            from flashhead_edge.report.board import show_plan

            show_plan(document, person(stdout, as_json))
