"""flashhead bench suite, flashhead bench compare"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Run every bench that this machine can, into one folder of records.")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A FlashHead checkpoint, for the tasks on real weights.")
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The text that the checkpoint is measured on.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same model as a GGUF file, for llama.cpp.")
@click.option("--task", "asked", multiple=True, metavar="NAME[=FILE]", help="Task of lm-evaluation-harness, as for bench quality. Repeatable.")
@click.option("--quick", is_flag=True, help="One shape, batch 1 and few rounds: minutes instead of an hour.")
@json_option
@common_options
@click.pass_context
def suite(
    context: click.Context,
    out: Path,
    checkpoint: Path | None,
    text: Path | None,
    gguf: Path | None,
    asked: tuple[str, ...],
    quick: bool,
    as_json: bool,
) -> None:
    """Run every bench that this machine can, a process each, and keep the records of each as a file in OUT.

    What is skipped is said, and why. The same command again goes on where it was interrupted. Exit code 1: a task failed.
    """
    if (checkpoint is None) != (text is None):
        raise click.UsageError("--checkpoint and --text belong together: give both, or neither.")
    if asked and checkpoint is None:
        raise click.UsageError("--task is asked of a checkpoint: give --checkpoint and --text too.")
    names = [one.partition("=")[0] for one in asked]
    if len(set(names)) < len(names):
        raise click.UsageError("--task: a task is asked once: leave its second one out.")
    with answer_only() as stdout:
        with shown_progress("looking at this machine") as progress:
            from dataclasses import asdict

            from flashhead_edge.bench.suite import Inputs, run_suite

            real = [None if path is None else path.resolve() for path in (checkpoint, text, gguf)]
            files = tuple(name if not file else f"{name}={Path(file).resolve()}" for name, _, file in (one.partition("=") for one in asked))
            inputs = Inputs(real[0], real[1], real[2], files, quick)
            outcomes = run_suite(out, inputs, progress, lambda sentence: click.echo(sentence, err=True))
        console = person(stdout, as_json)
        counts = {what: sum(o.what == what for o in outcomes) for what in ("done", "kept", "skipped", "failed")}
        console.print(f"{out}: " + ", ".join(f"{n} {what}" for what, n in counts.items()) + f"; {sum(o.records for o in outcomes)} records", markup=False)
        if as_json:
            write_json({"folder": str(out), "tasks": [asdict(o) for o in outcomes]}, stdout)
    context.exit(1 if counts["failed"] else 0)


@click.command(short_help="Compare two folders of records; exit code 1 on a loss beyond the spread.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Share of a time or of bytes that is no loss, beyond the spread."
)
@click.option("--all", "whole", is_flag=True, help="Exit code 1 also where AFTER lacks a subject of BEFORE: what is gone may have been lost.")
@click.option("--relative", is_flag=True, help="Compare times with their own baselines first: for machines that differ from day to day.")
@json_option
@common_options
@click.pass_context
def compare(context: click.Context, before: Path, after: Path, tolerance: float, whole: bool, relative: bool, as_json: bool) -> None:
    """Compare the records of AFTER with those of BEFORE: ratios with the interval that both spreads allow.

    A loss is a ratio whose whole interval lies below 1, and which is lower than the tolerance allows. Exit codes: 0 no loss, 1 a loss, or a file or record
    of AFTER that cannot be read, 2 nothing to compare.
    """
    if not 0 <= tolerance <= 1:  # a number that is none passes a range
        raise click.UsageError(f"--tolerance: {tolerance}, expected a share from 0 to 1.")
    with answer_only() as stdout:
        from dataclasses import asdict

        from flashhead_edge.errors import SettingsError
        from flashhead_edge.records.compare import compare as compared
        from flashhead_edge.records.folder import read_records
        from flashhead_edge.records.form import SUBJECT
        from flashhead_edge.report.comparing import show_comparison, verdict

        sides = [read_records([path]) for path in (before, after)]
        for sentence in (*sides[0].refused, *sides[1].refused):
            click.echo(f"left out: {sentence}", err=True)
        found = compared(sides[0].entries, sides[1].entries, relative)
        if not found.changes:
            raise SettingsError(
                f"bench compare: {before} and {after} have no subject in common ({len(sides[0].entries)} and {len(sides[1].entries)} records), "
                "expected one at least; compare runs of the same benches on the same device"
            )
        show_comparison(found, tolerance, person(stdout, as_json))
        if as_json:
            named = (*SUBJECT, "kind", "settings", "quality")  # which record it is; all of it stands in AFTER
            changes = [asdict(c) | {"record": {n: c.record[n] for n in named}, "verdict": verdict(c, tolerance)} for c in found.changes]
            left_out = [*sides[0].refused, *sides[1].refused]
            write_json({"changes": changes, "only_before": found.only_before, "only_after": found.only_after, "left_out": left_out}, stdout)
    lost = any(c.lost(tolerance) for c in found.changes) or bool(sides[1].refused) or (whole and bool(found.only_before))
    context.exit(1 if lost else 0)
