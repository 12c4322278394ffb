"""flashhead export: a checkpoint in another form"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.group(short_help="Write a checkpoint in another form.")
@common_options
def export() -> None:
    """Write a FlashHead checkpoint in another form."""


@export.command(short_help="Write ONNX models: body, head, whole decoder.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dialect",
    type=click.Choice(["onnxruntime", "portable", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="Operators: those that ONNX Runtime is fastest at, those of the standard alone, or those that TensorRT reads.",
)
@click.option(
    "--body",
    type=click.Choice(["fp32", "fp16", "int8", "int4", "none"]),
    default="int4",
    show_default=True,
    help="Weights of the body's products; none writes the head alone.",
)
@click.option("--group", type=click.Choice(["32", "64", "128"]), default="32", show_default=True, help="Weights that share a scale, in int8 and int4.")
@click.option("--stages", is_flag=True, help="Write probe, score, rescore and decode as models of their own too.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is an export.")
@json_option
@common_options
def onnx(checkpoint: Path, out: Path, dialect: str, body: str, group: str, stages: bool, overwrite: bool, as_json: bool) -> None:
    """Write CHECKPOINT to OUT as ONNX models, for `flashhead generate OUT` without torch and for ONNX Runtime GenAI.

    OUT is written whole or not at all.
    """
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.export import export_onnx
            from flashhead_edge.report.tables import show_export

            result = export_onnx(
                checkpoint,
                out,
                dialect=dialect,
                body=None if body == "none" else body,
                group=int(group),
                stages=stages,
                overwrite=overwrite,
                progress=progress,
            )
        show_export(result, person(stdout, as_json))
        if as_json:
            write_json(result, stdout)
