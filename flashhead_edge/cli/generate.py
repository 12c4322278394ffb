"""flashhead generate"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from flashhead_edge.cli.common import answer_only, common_options, figures, folder_argument, json_option, plain, write_json
from flashhead_edge.cli.display import shown_progress
from flashhead_edge.cli.sampling import answer, generation_options, open_engine, recorded, reported, take_sampling

EXACT_FIGURES = ("exact", "rounds", "missed", "repeated_steps", "repeated_share")  # that say nothing without --exact


@click.command(short_help="Answer a prompt.")
@folder_argument
@click.option("--prompt", required=True, metavar="TEXT", help="What to answer or to continue.")
@click.option("--chat/--raw", "chat", default=None, help="The prompt as a chat message, or as it is.  [default: chat if the model has a chat template]")
@generation_options
@json_option
@common_options
def generate(
    out: Path,
    prompt: str,
    chat: bool | None,
    max_new_tokens: int,
    exact: bool,
    stop_strings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt with OUT, a checkpoint or a folder of `flashhead export`. The answer alone goes to stdout, figures to stderr."""
    sampling = take_sampling(options, exact)
    with answer_only() as stdout, recorded() as taken:
        pieces = []
        live = stdout.isatty() and not as_json
        with shown_progress("loading") as progress:
            from flashhead_edge.generation import prompt_ids

            engine = open_engine(out, options)
            ids = prompt_ids(engine, prompt, chat)
            run = answer(engine, ids, max_new_tokens, sampling, exact, stop_strings)
            if not live:
                for n, token in enumerate(run, 1):
                    pieces.append(token.text)
                    progress(f"generating: {n} tokens", n / max_new_tokens)
        for token in run:
            stdout.write(token.text)
            stdout.flush()
        end = time.monotonic()
    text, summary = "".join(pieces), plain(run.summary)
    from flashhead_edge.jetson import ExportedEngine

    ran = engine.backend.about if isinstance(engine, ExportedEngine) else {}
    summary |= {name: ran[name] for name in ("head_operators", "body_operators") if name in ran}
    summary["report"] = reported(out, engine, run.summary, taken, end)
    figures("figures", {name: value for name, value in summary.items() if (exact or name not in EXACT_FIGURES) and (value or name != "allowed_steps")})
    if as_json:
        write_json({"prompt": prompt, "text": text, **summary}, stdout)
    else:
        stdout.write(text + "\n")
        stdout.flush()
