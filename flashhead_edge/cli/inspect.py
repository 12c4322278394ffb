"""flashhead inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashhead_edge.cli.common import answer_only, common_options, folder_argument, json_option, person, write_json


@click.command(short_help="Show what is in a checkpoint or an export.")
@folder_argument
@json_option
@common_options
def inspect(out: Path, as_json: bool) -> None:
    """Show what is in OUT: a checkpoint's head, its codes, its bytes, and how it was calibrated; or an exported folder's models, or one .onnx file."""
    with answer_only() as stdout:
        from flashhead_edge.jetson.folder import is_exported
        from flashhead_edge.jetson.tensorrt_folder import is_tensorrt

        description: dict[str, Any]
        if out.suffix == ".onnx" or is_exported(out) or is_tensorrt(out):
            from flashhead_edge.jetson.inspection import describe_model

            description = describe_model(out)
        else:
            from flashhead_edge.inspection import describe

            description = describe(out)
        if as_json:
            write_json(description, stdout)
        else:
            from flashhead_edge.report.tables import show_inspection

            show_inspection(description, person(stdout, as_json))
