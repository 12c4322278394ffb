"""flashhead bench: measured comparisons on this machine"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from flashhead_edge.cli.bench_quality import quality
from flashhead_edge.cli.bench_suite import compare, suite
from flashhead_edge.cli.common import Settings, answer_only, check_page, common_options, json_option, person, write_json
from flashhead_edge.cli.display import shown_progress


@click.group(short_help="Measure speed on this machine, and the answers of two heads.")
@common_options
def bench() -> None:
    """Measure speed on this machine, and what the answers of two heads have in common."""


bench.add_command(quality)


bench.add_command(suite)
bench.add_command(compare)


@bench.command(short_help="Time a step of the output head on a GPU, beside its rivals.")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--text", metavar="FILE", help="Text whose hidden states the head of OUT is timed on.")
@click.option("--store", is_flag=True, help="Keep the batch from which on the dense head is faster than OUT's, for cuda_head(choice='auto').")
@click.option("--shape", "shapes", multiple=True, metavar="MODEL", help="Shape of a made head, such as Llama-3.2-1B. Repeatable.  [default: all known]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 64), help="Rows of a step. Repeatable.  [default: 1, 4, 16, 32]")
@click.option(
    "--head",
    "heads",
    multiple=True,
    type=click.Choice(["dense", "int8", "int4", "published", "flash", "auto"]),
    help="What to time; flash is FlashHead at every batch, auto whichever of it and dense is faster. Repeatable.  [default: all]",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page with plots to this file.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along.")
@json_option
@common_options
@click.pass_obj
def head(
    settings: Settings,
    out: Path | None,
    text: str | None,
    store: bool,
    shapes: tuple[str, ...],
    batches: tuple[int, ...],
    heads: tuple[str, ...],
    plot: Path | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Time one step of the output head on an NVIDIA GPU: dense, int8, int4, published, fitted, and `auto`.

    With the checkpoint OUT its own head is timed, else made heads of known shapes that open as many clusters as a real one.
    """
    if out is None and (text is not None or store):
        raise click.UsageError("--text and --store are about a checkpoint: name its folder.")
    if store and heads and "auto" not in heads:
        raise click.UsageError("--store keeps what auto goes by: add --head auto, or leave --head out.")
    if out is not None and (text is None or shapes):
        raise click.UsageError("a checkpoint has its own shape and is timed on a text: give --text FILE, and no --shape.")
    check_page(plot, "--plot")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("looking for a GPU") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.bench.head import bench_checkpoint, bench_shapes
            from flashhead_edge.report.heads import show_heads, write_heads

            if out is None or text is None:
                document = bench_shapes(shapes, batches, command, progress, heads=heads)
            else:
                document = bench_checkpoint(out, text, batches, command, progress, heads=heads, store=store, trust_remote_code=trust_remote_code)
        show_heads(document, person(stdout, as_json))
        if as_json:
            write_json(with_records("head", document, command), stdout)
        if plot is not None:
            write_heads(document, plot)
            click.echo(f"plots: {plot}", err=True)


@bench.command(short_help="Time decode steps of TensorRT engines on a GPU: dense, FlashHead.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--shape", "shapes", multiple=True, metavar="MODEL", help="Shape of a made model. Repeatable.  [default: Llama-3.2-1B, Qwen3-0.6B]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 32), help="Texts at a time. Repeatable.  [default: 1, 4, 16]")
@click.option("--plugin", type=click.Path(path_type=Path), help="TensorRT's plugin library.  [default: the one that `flashhead plugin build` made]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page with plots to this file.")
@json_option
@common_options
@click.pass_obj
def tensorrt(
    settings: Settings, folder: Path | None, shapes: tuple[str, ...], batches: tuple[int, ...], plugin: Path | None, plot: Path | None, as_json: bool
) -> None:
    """Time decode steps of a whole W4A16 decoder in TensorRT: with FlashHead, with TensorRT's own dense head, and the head alone.

    FOLDER is one of `flashhead export tensorrt`. Without it models are made: real shapes with random weights, heads that open as many clusters as a
    real one, engines built here.
    """
    if folder is not None and shapes:
        raise click.UsageError("a folder has its own shape: leave --shape out.")
    check_page(plot, "--plot")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("looking for a GPU") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.bench.tensorrt import bench_tensorrt
            from flashhead_edge.report.steps import show_steps, write_steps

            document = bench_tensorrt(folder, shapes, batches, command, progress, plugin=plugin)
        show_steps(document, person(stdout, as_json))
        if as_json:
            write_json(with_records("tensorrt", document, command), stdout)
        if plot is not None:
            write_steps(document, plot)
            click.echo(f"plots: {plot}", err=True)


@bench.command(short_help="Time whole texts on a GPU by our kernels alone: steps beside dense heads, tokens a second.")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--shape", "shapes", multiple=True, metavar="MODEL", help="Shape of a made model, such as Llama-3.2-1B. Repeatable.  [default: all known]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 32), help="Texts at a time. Repeatable.  [default: 1, 4, 8]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page with plots to this file.")
@json_option
@common_options
@click.pass_obj
def decode(settings: Settings, out: Path | None, shapes: tuple[str, ...], batches: tuple[int, ...], plot: Path | None, as_json: bool) -> None:
    """Time the torch-free CUDA backend: a decode step beside the same one with dense heads, tokens a second, the first token of a prompt of 512, joules.

    OUT is a checkpoint. Without it models are made: real shapes with random 4-bit weights, heads that open as many clusters as a real one.
    """
    if out is not None and shapes:
        raise click.UsageError("a checkpoint has its own shape: leave --shape out.")
    check_page(plot, "--plot")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("looking for a GPU") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.bench.decode import bench_decode
            from flashhead_edge.report.steps import show_steps, write_steps

            document = bench_decode(out, shapes, batches, command, progress)
        show_steps(document, person(stdout, as_json))
        if as_json:
            write_json(with_records("decode", document, command), stdout)
        if plot is not None:
            write_steps(document, plot)
            click.echo(f"plots: {plot}", err=True)


@bench.command(short_help="Time decode steps of vLLM on a GPU: dense, published, FlashHead.")
@click.option("--shape", "shapes", multiple=True, metavar="MODEL", help="Shape of a made model, such as Llama-3.2-1B. Repeatable.  [default: all known]")
@click.option("--runner", "runners", multiple=True, type=click.Choice(["v1", "v2"]), help="vLLM's model runner. Repeatable.  [default: both]")
@click.option("--body", "bodies", multiple=True, type=click.Choice(["bf16", "w4a16"]), help="Weights of the linear layers. Repeatable.  [default: bf16]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 256), help="Requests at a time. Repeatable.  [default: 1, 16, 64]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page with plots to this file.")
@json_option
@common_options
@click.pass_obj
def vllm(
    settings: Settings,
    shapes: tuple[str, ...],
    runners: tuple[str, ...],
    bodies: tuple[str, ...],
    batches: tuple[int, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time decode steps of a real vLLM engine on an NVIDIA GPU: the dense head, the published method and FlashHead, switched inside it.

    Models are made: real shapes with random weights, heads that open as many clusters as a real one.
    """
    check_page(plot, "--plot")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("looking for vLLM") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.bench.vllm import bench_vllm
            from flashhead_edge.report.serving import show_serving, write_serving

            document = bench_vllm(shapes, runners, batches, bodies, command, progress)
        show_serving(document, person(stdout, as_json))
        if as_json:
            write_json(with_records("vllm", document, command), stdout)
        if plot is not None:
            write_serving(document, plot)
            click.echo(f"plots: {plot}", err=True)


@bench.command(short_help="Time exported heads, whole models and engines on this CPU, beside ONNX Runtime's own and llama.cpp.")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--text", metavar="FILE", help="Text whose hidden states the head of OUT is timed on; its beginning is the engines' prompt.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same model as a GGUF file, for llama.cpp.")
@click.option("--part", "parts", multiple=True, type=click.Choice(["head", "models", "engines"]), help="What to compare. Repeatable.  [default: all]")
@click.option("--shape", "shapes", multiple=True, metavar="MODEL", help="Shape of a made model, such as Llama-3.2-1B. Repeatable.  [default: three]")
@click.option("--threads", multiple=True, type=click.IntRange(1), help="Threads of all that is compared. Repeatable.  [default: 1, 2]")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2), help="Measured rounds, after one that is dropped.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page with plots to this file.")
@json_option
@common_options
@click.pass_obj
def onnx(
    settings: Settings,
    out: Path | None,
    text: str | None,
    gguf: Path | None,
    parts: tuple[str, ...],
    shapes: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time FlashHead in ONNX Runtime on this CPU: the head alone, whole models, and whole engines.

    Made models of known shapes draw what opens from a real head's distribution. With the checkpoint OUT its own head is timed too, and engines
    run it: FlashHead's, ONNX Runtime GenAI, llama.cpp. Models are exported once and kept in the user's cache folder.
    """
    check_page(plot, "--plot")
    command = shlex.join(["flashhead", *settings.arguments])
    with answer_only() as stdout:
        with shown_progress("looking for ONNX Runtime") as progress:
            from flashhead_edge.bench.as_records import with_records
            from flashhead_edge.bench.onnx import bench_onnx
            from flashhead_edge.report.onnx import show_onnx, write_onnx

            document = bench_onnx(out, text, gguf, shapes, threads, parts, command, progress, rounds=rounds)
        show_onnx(document, person(stdout, as_json))
        if as_json:
            write_json(with_records("onnx", document, command), stdout)
        if plot is not None:
            write_onnx(document, plot)
            click.echo(f"plots: {plot}", err=True)
