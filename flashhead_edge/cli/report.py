"""flashhead report"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, check_page, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="One page of many records: filters, bars, frontiers, a table.")
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Write the self-contained page to this file.")
@json_option
@common_options
def report(records: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write a page of RECORDS: files and folders of `bench suite`, or the --json of any bench or evaluation.

    A broken file, a newer form and records that contradict each other are named and left out; the rest is shown.
    """
    check_page(output, "--output")
    with answer_only() as stdout:
        from flashhead_edge.errors import SettingsError
        from flashhead_edge.records.folder import read_records
        from flashhead_edge.report.explorer import write_explorer
        from flashhead_edge.report.words import counted

        with shown_progress("reading records"):
            found = read_records(records)
        alone = len(found.refused) == 1 and not found.entries  # which the error says
        for sentence in () if alone else found.refused:
            click.echo(f"left out: {sentence}", err=True)
        if not found.entries:
            why = found.refused[0] if alone else f"{len(found.refused)} files or records were left out"
            raise SettingsError(f"report: no record to show, expected one at least ({why}); measure with flashhead bench suite, or give other files")
        write_explorer(found, output)
        person(stdout, as_json).print(f"{output}: {counted(len(found.entries), 'record')}, {len(found.refused):,} left out", markup=False)
        if as_json:
            answer = {"page": str(output), "records": len(found.entries), "left_out": list(found.refused), "unrecorded": list(found.unrecorded)}
            write_json(answer, stdout)
