"""The options of `generate` and `chat`: how tokens are chosen, what computes them, and where."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from flashhead_edge.cli.common import context_option
from flashhead_edge.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

TORCH = "--torch-device or --trust-remote-code"
RUN_BY = {
    "torch": "a checkpoint",
    "onnxruntime": "a folder of flashhead export onnx",
    "tensorrt": "a folder of flashhead export tensorrt",
    "cuda": "a checkpoint",
}
HOW = {"torch": "give the checkpoint", "onnxruntime": "run flashhead export onnx", "tensorrt": "run flashhead export tensorrt", "cuda": "give the checkpoint"}

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
OPTIONS = (
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest tokens; 0 is off."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens that reach this mass; 1 is off."),
    click.option("--min-p", type=float, default=0.0, show_default=True, help="Keep tokens at least this likely, as a share of the likeliest; 0 is off."),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Over prompt and answer; 1 is off."),
    click.option("--presence-penalty", type=float, default=0.0, show_default=True, help="Once for each token of the answer; 0 is off."),
    click.option("--frequency-penalty", type=float, default=0.0, show_default=True, help="For each time the answer holds the token; 0 is off."),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws the same answer."),
    click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Tokens of an answer at most."),
    click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="End the answer before this text. Repeatable."),
    click.option(
        "--json-schema",
        metavar="FILE|TEXT",
        callback=lambda c, p, given: given and _schema(given),
        help="An answer that is JSON of this schema; '{}' is any JSON.  [needs the extra grammar]",
    ),
    click.option("--regex", metavar="PATTERN", help="An answer that matches this pattern as a whole.  [needs the extra grammar]"),
    click.option("--exact", is_flag=True, help="The dense head's greedy text, token for token, verified in blocks."),
    click.option(
        "--backend",
        type=click.Choice(["auto", "torch", "onnxruntime", "tensorrt", "cuda"]),
        default="auto",
        show_default=True,
        help="torch or cuda (our kernels alone, no torch) for a checkpoint, onnxruntime and tensorrt for a folder that flashhead export wrote for them; "
        "auto sees which it is.",
    ),
    click.option("--plugin", type=click.Path(path_type=Path), help="TensorRT's plugin library.  [default: the one that `flashhead plugin build` made]"),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: one for each core]"),
    context_option,
    click.option("--standard-operators", is_flag=True, help="Leave our own operators of an export aside: ONNX Runtime's alone, which are slower."),
    click.option("--torch-device", metavar="NAME", help="Where the model runs: cpu, cuda, cuda:1, ...  [default: a GPU if there is one]"),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along."),
)


def generation_options(function: F) -> F:
    """Add all of them, in the order of OPTIONS."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def take_sampling(options: dict[str, Any], exact: bool) -> Any:
    """Take the sampling options out of `options`: a `decoding.Sampling`."""
    from flashhead_edge.decoding import Sampling

    sampling = Sampling(**{name: options.pop(name) for name in NAMES})
    if exact and sampling != Sampling(seed=sampling.seed):
        raise click.UsageError("--exact is the dense head's greedy text: leave out the sampling options.")
    return sampling


def open_engine(out: Path, options: dict[str, Any], progress: Progress, texts: int = 1) -> Any:
    """Take the options that say what computes out of `options`: a `generation.TextEngine` of a checkpoint or an exported folder, for some texts at once."""
    names = ("backend", "threads", "torch_device", "trust_remote_code", "standard_operators", "plugin", "context")
    backend, threads, device, trust, standard, plugin, context = (options.pop(name) for name in names)
    found = _backend_of(out, backend)
    for given, flag, kind in (
        (standard, "--standard-operators", "onnxruntime"),
        (plugin, "--plugin", "tensorrt"),
        (device or trust, TORCH, "torch"),
        (context, "--context", "cuda"),
    ):
        if given and found != kind:
            raise click.UsageError(f"{flag} is for the {kind} backend, and {out} runs on {found}: leave it out.")
    if threads and found in ("tensorrt", "cuda"):
        raise click.UsageError(f"--threads: {found} computes on the GPU, and the option is of CPU threads: leave it out.")
    if found == "torch":
        from flashhead_edge.generation import load_engine

        return load_engine(out, device, threads, trust_remote_code=trust)
    from flashhead_edge.jetson import open_engine as open_exported

    return open_exported(out, found, threads, native=not standard, plugin=plugin, context=context, texts=texts, progress=progress)


def _backend_of(out: Path, backend: str) -> str:
    """What runs a folder: what was named, or what is for it; cuda takes a checkpoint where there is a GPU and no torch."""
    from flashhead_edge.jetson import is_exported
    from flashhead_edge.jetson.tensorrt_folder import is_tensorrt

    found = "tensorrt" if is_tensorrt(out) else "onnxruntime" if is_exported(out) else "torch"
    if backend == "cuda" and found == "torch":
        return backend
    if backend not in ("auto", found):
        raise click.UsageError(f"{out} is not {RUN_BY[backend]}, which --backend {backend} runs: {HOW[backend]}, or leave --backend out.")
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if backend != "auto" or found != "torch" or not missing or not out.is_dir():
        return found
    from flashhead_edge.errors import DeviceError
    from flashhead_edge.jetson.driver import device_facts

    try:
        device_facts()
    except DeviceError as error:
        raise click.ClickException(
            f"{out} is a checkpoint, which needs {' and '.join(missing)} (pip install 'flashhead-edge[torch]') or an NVIDIA GPU ({error}); "
            "or give a folder that flashhead export onnx wrote, which needs neither"
        ) from error
    return "cuda"


def take_grammar(engine: Any, options: dict[str, Any]) -> Any:
    """Take --json-schema and --regex out of `options`: a `generation.grammar.Grammar` of the engine, or None."""
    schema, regex = options.pop("json_schema"), options.pop("regex")
    if schema is None and regex is None:
        return None
    if schema is not None and regex is not None:
        raise click.UsageError("--json-schema and --regex: an answer follows one of them, leave out the other.")
    from flashhead_edge.generation.grammar import compile_grammar

    return compile_grammar(engine, json_schema=schema, regex=regex)


def _schema(given: str) -> str:
    """The schema's text: what begins like JSON is the text itself, all else names a file."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise click.BadParameter(f"{given} cannot be read ({why}), expected a file or a JSON object; give one.", param_hint="--json-schema") from error


def answer(engine: Any, ids: list[int], max_new_tokens: int, sampling: Any, exact: bool, stop_strings: tuple[str, ...], **more: Any) -> Any:
    """The answer to a prompt: a `generation.Stream`. `more`: grammar, logprobs and cache, as `stream` takes them."""
    from flashhead_edge.generation import exact_stream, stream

    if exact:
        return exact_stream(engine, ids, max_new_tokens, stop_strings=stop_strings, **more)
    return stream(engine, ids, max_new_tokens, sampling, stop_strings=stop_strings, **more)
