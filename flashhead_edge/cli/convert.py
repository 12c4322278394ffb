"""flashhead convert"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, calibration_options, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Write a model as a FlashHead checkpoint.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target-agreement", "target", type=float, help="Share of steps that keep the dense head's token.  [default: 0.995]")
@click.option("--head", type=click.Choice(["fitted", "published"]), default="fitted", show_default=True, help="The calibrated head, or the published method's.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub name.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@calibration_options
@json_option
@common_options
def convert(
    model: str,
    out: Path,
    texts: tuple[str, ...],
    target: float | None,
    head: str,
    positions: int | None,
    device_model: str | None,
    seed: int,
    overwrite: bool,
    torch_device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write MODEL to OUT as a FlashHead checkpoint.

    MODEL is a model folder, a .gguf file or a hub name. Without --calibration the head is calibrated on text that the
    model writes itself. OUT is written whole or not at all.
    """
    if head == "published" and target is not None:
        raise click.UsageError("--head published is calibrated for no target, expected no --target-agreement; leave it out, or leave out --head.")
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.conversion import convert as run
            from flashhead_edge.report.tables import show_conversion

            summary = run(
                model,
                out,
                head=head,
                target=0.995 if target is None else target,
                texts=texts,
                positions=positions,
                device_model=device_model,
                seed=seed,
                torch_device=torch_device,
                revision=revision,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        show_conversion(summary, person(stdout, as_json))
        if as_json:
            write_json(summary, stdout)
