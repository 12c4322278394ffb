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
@click.option(
    "--for",
    "name",
    metavar="BOARD|NUMBER",
    help="What shall run it: a board (orin-nano-8gb, agx-thor, ...), or a GPU's capability (89).  [default: this machine]",
)
@json_option
@common_options
def build(include: Path | None, out: Path | None, name: str | None, as_json: bool) -> None:
    """Compile the plugin library with g++ and NVRTC: neither nvcc nor CMake nor torch is needed, a minute or two is.

    The library is for one major version of TensorRT and one kind of GPU. An older one stays until the new one is whole. For a board, on a PC,
    set CXX to a compiler for its processor, and name it with --for and the file with --out.
    """
    with answer_only() as stdout:
        with shown_progress("looking for headers") as progress:
            from flashhead_edge.jetson.plugin_build import build as make
            from flashhead_edge.jetson.plugin_build import target_named

            made = make(include, out, None if name is None else target_named(name), progress)
        figures("plugin library", {key: value for key, value in plain(made).items() if key != "path"})
        if as_json:
            write_json(made, stdout)
        else:
            stdout.write(f"{made.path}\n")
