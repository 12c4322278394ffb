"""flashhead monitor"""

from __future__ import annotations

import os

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person
from flashhead_edge.cli.serve import KEY


@click.command(short_help="Show clocks, load, temperatures, power and memory, live.")
@click.option("--interval", metavar="SECONDS", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, help="Time between two looks.")
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option("--server", metavar="URL", help="Show beside it what the flashhead serve at this address does: tokens a second, first token, joules a token.")
@json_option
@common_options
def monitor(interval: float, once: bool, server: str | None, as_json: bool) -> None:
    """Show what this board does, from its own device files, until Ctrl-C. With --json each look is one line of JSON on stdout."""
    with answer_only() as stdout:
        from flashhead_edge.jetson.board_monitor import looks
        from flashhead_edge.report.board import show_looks, write_lines

        documents = looks(interval=interval, once=once, server=server, key=os.environ.get(KEY))
        if as_json:
            write_lines(documents, stdout)
        else:
            show_looks(documents, person(stdout, as_json))
