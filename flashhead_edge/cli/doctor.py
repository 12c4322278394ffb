"""flashhead doctor"""

from __future__ import annotations

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Say what this machine has and what that enables.")
@json_option
@common_options
def doctor(as_json: bool) -> None:
    """Say what this machine has, found or not, and what that enables."""
    with answer_only() as stdout, shown_progress("looking"):
        from flashhead_edge.doctor import examine, lines

        report = examine()
    if as_json:
        write_json(report, stdout)
    else:
        stdout.write("\n".join(lines(report)) + "\n")
