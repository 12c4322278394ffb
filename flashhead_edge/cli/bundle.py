"""flashhead bundle"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Write a model and all it needs for a machine without a network.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="jetpack6, jetpack7, linux-aarch64-cp311, or linux-x86_64-cp311 to try it on a PC.")
@click.option("--find-links", multiple=True, type=click.Path(path_type=Path), metavar="DIR", help="Take wheels from this folder too. Repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@common_options
def bundle(model: Path, out: Path, target: str, find_links: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Write OUT, a tar file with MODEL, the wheels of TARGET's Python, a systemd unit, checksums and an installer that needs no network.

    MODEL is a folder of `flashhead export`, or for a Jetson a checkpoint, whose weights are laid out and whose kernels are compiled here, for every
    board of TARGET. There: tar xf OUT, sh flashhead-*/install.sh.
    Wheels are downloaded by pip here. OUT is written whole or not at all.
    """
    with answer_only() as stdout:
        with shown_progress("reading the model") as progress:
            from flashhead_edge.bundle import bundle as run
            from flashhead_edge.report.tables import show_bundle

            result = run(model, out, target=target, find_links=find_links, overwrite=overwrite, progress=progress)
        show_bundle(result, person(stdout, as_json))
        if as_json:
            write_json(result, stdout)
