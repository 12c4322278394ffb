"""flashhead export: a checkpoint in another form"""

from __future__ import annotations

from pathlib import Path

import click

from flashhead_edge.cli.common import F, answer_only, common_options, context_option, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.group(short_help="Write a checkpoint in another form.")
@common_options
def export() -> None:
    """Write a FlashHead checkpoint in another form."""


@export.command(short_help="Write ONNX models: body, head, whole decoder.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dialect",
    type=click.Choice(["onnxruntime", "portable", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="Operators: those that ONNX Runtime is fastest at, those of the standard alone, or those that TensorRT reads.",
)
@click.option(
    "--body",
    type=click.Choice(["fp32", "fp16", "int8", "int4", "none"]),
    default="int4",
    show_default=True,
    help="Weights of the body's products; none writes the head alone.",
)
@click.option("--group", type=click.Choice(["32", "64", "128"]), default="32", show_default=True, help="Weights that share a scale, in int8 and int4.")
@click.option("--stages", is_flag=True, help="Write probe, score, rescore and decode as models of their own too.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is an export.")
@json_option
@common_options
def onnx(checkpoint: Path, out: Path, dialect: str, body: str, group: str, stages: bool, overwrite: bool, as_json: bool) -> None:
    """Write CHECKPOINT to OUT as ONNX models, for `flashhead generate OUT` without torch and for ONNX Runtime GenAI.

    OUT is written whole or not at all.
    """
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.export import export_onnx
            from flashhead_edge.report.tables import show_export

            result = export_onnx(
                checkpoint,
                out,
                dialect=dialect,
                body=None if body == "none" else body,
                group=int(group),
                stages=stages,
                overwrite=overwrite,
                progress=progress,
            )
        show_export(result, person(stdout, as_json))
        if as_json:
            write_json(result, stdout)


def engine_options(function: F) -> F:
    """How engines are built."""
    for option in (
        click.option("--memory", type=click.IntRange(min=1), metavar="MIB", help="The most memory that TensorRT may take to try kernels out."),
        click.option(
            "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="What was timed, kept in this file: the next build is as fast as a copy."
        ),
        click.option(
            "--plugin",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="LIB",
            help="The plugin library.  [default: the one that `flashhead plugin build` made]",
        ),
        click.option(
            "--runtime",
            type=click.Choice(["tensorrt", "tensorrt_rtx"]),
            default="tensorrt",
            show_default=True,
            help="Who builds. tensorrt_rtx takes native layers alone, and needs no GPU.",
        ),
    ):
        function = option(function)
    return function


@export.command(short_help="Write weights and models for TensorRT, and build engines.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--layers",
    type=click.Choice(["plugin", "native"]),
    default="plugin",
    show_default=True,
    help="Our kernels as plugins, the weights outside of the engine; or TensorRT's own operators (10 and later), which this version builds and does not run.",
)
@click.option("--precision", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True, help="Of activations. bfloat16: TensorRT 10.")
@click.option("--group", type=click.Choice(["32", "64", "128"]), default="32", show_default=True, help="Weights that share a scale.")
@context_option
@click.option("--batch", type=click.IntRange(1, 32), default=1, show_default=True, help="Texts at once, at most.")
@click.option("--chunk", type=click.IntRange(min=1), help="Tokens of a prompt that are read together, at most.  [default: 256]")
@click.option("--dense-head", is_flag=True, help="Write and build the same decoder with TensorRT's own head over the whole vocabulary too, to compare with.")
@engine_options
@click.option(
    "--onnx-only", is_flag=True, help="Build no engine: `flashhead export engines OUT` does it on the board. Needs --for, or the three options behind it."
)
@click.option("--for", "board", metavar="BOARD", help="The board that shall run it: orin-nano-8gb, agx-orin-64gb, agx-thor, ...")
@click.option("--multiprocessors", type=click.IntRange(min=1), help="Of the GPU that shall run it: 8 for Orin Nano and NX, 16 for AGX Orin, 132 for an H100.")
@click.option(
    "--shared-kib", type=click.IntRange(min=1), help="Shared memory that a block may have there, KiB: 99 for 8.6 and 8.9, 163 for 8.0 and 8.7, 227 for 9.0."
)
@click.option("--capability", type=click.IntRange(min=70), help="Its compute capability: 87 for Orin.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is an export.")
@json_option
@common_options
def tensorrt(
    checkpoint: Path,
    out: Path,
    layers: str,
    precision: str,
    group: str,
    context: int | None,
    batch: int,
    chunk: int | None,
    dense_head: bool,
    runtime: str,
    plugin: Path | None,
    timing_cache: Path | None,
    memory: int | None,
    onnx_only: bool,
    board: str | None,
    multiprocessors: int | None,
    shared_kib: int | None,
    capability: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT to OUT for TensorRT: a file of weights, models of plugin nodes, and their engines, built on this machine's GPU.

    OUT is written whole or not at all.
    """
    if board is not None:
        if multiprocessors or shared_kib or capability:
            raise click.UsageError("--for names the board whose numbers --multiprocessors, --shared-kib and --capability are: leave them out.")
        from flashhead_edge.jetson.board import board_named

        module = board_named(board)
        multiprocessors, shared_kib, capability = module.multiprocessors, module.shared_bytes >> 10, module.capability
    device_asked = (multiprocessors, shared_kib, capability)
    if onnx_only == (None in device_asked) or (not onnx_only and any(device_asked)):
        raise click.UsageError("--onnx-only and --for, or --multiprocessors, --shared-kib and --capability, belong together: all of them, or none.")
    if onnx_only and (plugin or timing_cache or memory or runtime != "tensorrt"):
        raise click.UsageError("--plugin, --timing-cache, --memory and --runtime are of builds: with --onnx-only give them to `flashhead export engines`.")
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.export.tensorrt import export_tensorrt
            from flashhead_edge.export.tensorrt.engines import Build
            from flashhead_edge.program.head import Device
            from flashhead_edge.report.tables import show_tensorrt

            result = export_tensorrt(
                checkpoint,
                out,
                layers=layers,
                precision=precision,
                group=int(group),
                context=context,
                batch=batch,
                chunk=chunk,
                dense_head=dense_head,
                device=Device(multiprocessors, shared_kib << 10, capability) if multiprocessors and shared_kib else None,
                build=Build(runtime, plugin, timing_cache, memory),
                overwrite=overwrite,
                progress=progress,
            )
        show_tensorrt(result.folder, result.manifest, person(stdout, as_json))
        if as_json:
            write_json(result, stdout)


@export.command(short_help="Build the engines of a folder that was written without.")
@click.argument("out", type=click.Path(path_type=Path))
@engine_options
@click.option("--dense-head", is_flag=True, help="Add the same decoder with TensorRT's own head where OUT has none, to compare with: needs the onnx package.")
@json_option
@common_options
def engines(out: Path, runtime: str, plugin: Path | None, timing_cache: Path | None, memory: int | None, dense_head: bool, as_json: bool) -> None:
    """Build the engines of OUT, which `flashhead export tensorrt --onnx-only` wrote, on the board that shall run them.

    Neither torch nor onnxruntime is needed. OUT stays as it was until all engines are built.
    """
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.export.tensorrt import build_engines
            from flashhead_edge.export.tensorrt.engines import Build
            from flashhead_edge.report.tables import show_tensorrt

            manifest = build_engines(out, build=Build(runtime, plugin, timing_cache, memory), dense_head=dense_head, progress=progress)
        show_tensorrt(str(out), manifest, person(stdout, as_json))
        if as_json:
            write_json({"folder": str(out), "manifest": manifest}, stdout)
