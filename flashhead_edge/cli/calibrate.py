"""flashhead calibrate"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, calibration_options, common_options, folder_argument, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Give a checkpoint a new target or new texts.")
@folder_argument
@click.option("--target-agreement", "target", type=float, help="Share of steps that keep the dense head's token.  [default: the checkpoint's own]")
@calibration_options
@json_option
@common_options
def calibrate(
    out: Path,
    texts: tuple[str, ...],
    target: float | None,
    positions: int | None,
    device_model: str | None,
    seed: int,
    torch_device: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Calibrate the checkpoint OUT again, in place, without clustering again.

    Texts that it was held to before are to be given again.
    """
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.conversion import calibrate as run
            from flashhead_edge.report.tables import show_conversion

            summary = run(
                out,
                target=target,
                texts=texts,
                positions=positions,
                device_model=device_model,
                seed=seed,
                torch_device=torch_device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        show_conversion(summary, person(stdout, as_json))
        if as_json:
            write_json(summary, stdout)
