"""flashhead quantize"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.command(short_help="Write a model with its body in 4 bits.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--group", type=click.Choice(["32", "64", "128"]), default="128", show_default=True, help="Weights that share a scale.")
@click.option("--asymmetric", is_flag=True, help="A zero point for each group too.")
@click.option("--calibration", multiple=True, metavar="FILE|datasets:NAME", help="Choose on this text too, beside the model's own. Repeatable.")
@click.option("--text", "texts", multiple=True, metavar="FILE|datasets:NAME", help="Measure on this text; nothing is chosen on it. Repeatable.")
@click.option("--positions", type=click.IntRange(min=1_000), default=16_384, show_default=True, help="Positions of each text to choose on.")
@click.option("--measured", type=click.IntRange(min=1_000), default=8_192, show_default=True, help="Positions of each text to measure.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same command, seed and threads: same checkpoint.")
@click.option("--torch-device", metavar="NAME", help="Where the layers run.  [default: a GPU if there is one]")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub name.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@json_option
@common_options
def quantize(
    model: str,
    out: Path,
    group: str,
    asymmetric: bool,
    calibration: tuple[str, ...],
    texts: tuple[str, ...],
    positions: int,
    measured: int,
    seed: int,
    torch_device: str | None,
    revision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write MODEL to OUT with its decoder's linear layers in 4 bits.

    MODEL is a model folder, a .gguf file or a hub name, in floats. OUT is a model folder that flashhead convert, vLLM
    and transformers read (compressed-tensors); its head and embedding are MODEL's. It is written whole or not at all.
    """
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.quantize import quantize as run
            from flashhead_edge.report.tables import show_quantisation

            report = run(
                model,
                out,
                group=int(group),
                symmetric=not asymmetric,
                calibration=calibration,
                texts=texts,
                positions=positions,
                measured=measured,
                seed=seed,
                torch_device=torch_device,
                revision=revision,
                overwrite=overwrite,
                progress=progress,
            )
        show_quantisation(report, person(stdout, as_json))
        if as_json:
            write_json(report, stdout)
