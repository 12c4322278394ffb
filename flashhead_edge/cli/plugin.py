"""flashhead plugin"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import answer_only, common_options, figures, json_option, plain, write_json
from flashhead_edge.cli.display import shown_progress


@click.group(short_help="Make the plugin library for TensorRT.")
@common_options
def plugin() -> None:
    """The library of plugins that TensorRT needs for an export."""


@plugin.command(short_help="Compile it on this machine.")
@click.option(
    "--tensorrt-include",
    "include",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The folder of NvInferRuntime.h, of the TensorRT that shall load it.  [default: where the system keeps headers]",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="LIB", help="The file to write.  [default: in the cache, where other verbs look]"
)
@click.option("--capability", type=click.IntRange(min=70), help="Compute capability of the GPU that shall run it: 87 for Orin.  [default: this machine's]")
@click.option("--cuda", type=click.IntRange(min=12), metavar="MAJOR", help="CUDA's major version on that machine: 12 on JetPack 6.  [default: this machine's]")
@json_option
@common_options
def build(include: Path | None, out: Path | None, capability: int | None, cuda: int | None, as_json: bool) -> None:
    """Compile the plugin library with g++ and NVRTC: neither nvcc nor CMake nor torch is needed, a minute or two is.

    The library is for one major version of TensorRT and one kind of GPU. An older one stays until the new one is whole. For a board of another
    processor set CXX to its compiler, and name --capability, --cuda and --out.
    """
    with answer_only() as stdout:
        with shown_progress("looking for headers") as progress:
            from flashhead_edge.jetson.plugin_build import build as make

            made = make(include, out, capability, cuda, progress)
        figures("plugin library", {name: value for name, value in plain(made).items() if name != "path"})
        if as_json:
            write_json(made, stdout)
        else:
            stdout.write(f"{made.path}\n")
