"""flashhead serve"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import click

from flashhead_edge.cli.common import answer_only, common_options, context_option, folder_argument
from flashhead_edge.cli.display import shown_progress

KEY = "FLASHHEAD_API_KEY"


@click.command(short_help="Serve a model by OpenAI's API, with a page to watch it.")
@folder_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another than this machine's own needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="The model's name in the API.  [default: the folder's]")
@click.option("--api-key-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), help=f"A file that holds the key; or set {KEY}.")
@click.option("--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Texts in the engine at once, where it can hold several.")
@click.option("--waiting", type=click.IntRange(1, 10_000), default=64, show_default=True, help="Texts that may wait; more are answered with 429.")
@click.option("--deadline", type=click.FloatRange(1, 86_400), default=600.0, show_default=True, metavar="SECONDS", help="For a request, to its last byte.")
@click.option("--drain", type=click.FloatRange(1, 3_600), default=30.0, show_default=True, metavar="SECONDS", help="For running texts after SIGTERM.")
@click.option("--backend", type=click.Choice(["auto", "torch", "onnxruntime", "tensorrt", "cuda"]), default="auto", show_default=True, help="As in generate.")
@click.option("--plugin", type=click.Path(path_type=Path), help="TensorRT's plugin library.  [default: the one that `flashhead plugin build` made]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: one for each core]")
@context_option
@common_options
def serve(
    out: Path, host: str, port: int, name: str | None, api_key_file: Path | None, at_once: int, waiting: int, deadline: float, drain: float, **options: Any
) -> int:
    """Serve OUT, a checkpoint or a folder of `flashhead export`, by OpenAI's API. The address goes to stdout, the log to stderr.

    SIGTERM lets running texts end, then the exit code is 0.
    """
    from flashhead_edge.errors import SettingsError
    from flashhead_edge.serve.limits import Limits
    from flashhead_edge.serve.run import is_loopback, model_facts, open_port
    from flashhead_edge.serve.run import serve as run

    key = api_key_file.read_text(encoding="utf-8", errors="replace").strip() if api_key_file else os.environ.get(KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise click.UsageError("the API key is empty or not of plain letters, expected one line of ASCII: correct it.")
    if key is None and not is_loopback(host):
        raise click.UsageError(f"--host {host} lets other machines in, and there is no API key: set {KEY} or --api-key-file, or leave --host out.")
    if name is not None and not name.strip():
        raise click.UsageError("--name is empty, expected a name, or leave it out for the folder's.")
    if out.is_file():
        raise click.UsageError(f"{out} is a file, expected a folder: a checkpoint that flashhead convert wrote, or an export of it.")
    limits = Limits(waiting=waiting, at_once=at_once, deadline=deadline, drain=drain)
    from flashhead_edge.cli.sampling import open_engine

    with answer_only() as stdout:
        listening = open_port(host, port)
        with shown_progress("loading") as progress:
            engine = open_engine(out, options | {"torch_device": None, "trust_remote_code": False, "standard_operators": False}, progress, at_once)
        if engine.tokenizer is None:
            raise SettingsError(f"{out}: it has no tokenizer, expected one to serve texts; save the tokenizer there")
        about = model_facts(engine, name or out.resolve().name, out)
        at, number = listening.getsockname()[:2]

        def ready() -> None:
            stdout.write(f"http://{f'[{at}]' if ':' in at else at}:{number}\n")
            stdout.flush()

        found = run(engine, about["model"], listening, key=key, limits=limits, about=about, ready=ready)
    return 130 if found == signal.SIGINT else 0
