"""flashhead inspect"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, folder_argument, json_option, person, write_json


@click.command(short_help="Show what is in a checkpoint.")
@folder_argument
@json_option
@common_options
def inspect(out: Path, as_json: bool) -> None:
    """Show what is in the checkpoint OUT: its head, its codes, its bytes, and how it was calibrated."""
    with answer_only() as stdout:
        from flashhead_edge.inspection import describe

        description = describe(out)
        if as_json:
            write_json(description, stdout)
        else:
            from flashhead_edge.report.tables import show_inspection

            show_inspection(description, person(stdout, as_json))
