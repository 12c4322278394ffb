"""flashhead generate"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashhead_edge.cli.common import answer_only, common_options, figures, folder_argument, json_option, plain, write_json
from flashhead_edge.cli.display import shown_progress
from flashhead_edge.cli.reporting import recorded, reported
from flashhead_edge.cli.sampling import answer, generation_options, open_engine, take_grammar, take_sampling

if TYPE_CHECKING:
    from flashhead_edge.generation import Token

EXACT_FIGURES = ("exact", "rounds", "missed", "repeated_steps", "repeated_share")  # that say nothing without --exact
OTHER_FIGURES = ("allowed_steps", "dense_steps", "passes", "drafted", "accepted", "accepted_per_pass")  # that say nothing where they are 0


@click.command(short_help="Answer a prompt.")
@folder_argument
@click.option("--prompt", metavar="TEXT", help="What to answer or to continue.")
@click.option("--prompt-file", metavar="FILE", help="A file with the prompt in UTF-8; - is standard input. A line end at its end is left out.")
@click.option("--chat/--raw", "chat", default=None, help="The prompt as a chat message, or as it is.  [default: chat if the model has a chat template]")
@generation_options
@click.option(
    "--speculate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Guess up to N tokens, at most 32, from the text so far and verify them at once; greedy only.",
)
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: each token's log-probability and its N likeliest alternatives, the fast head's; with --exact the dense head's.",
)
@json_option
@common_options
def generate(
    out: Path,
    prompt: str | None,
    prompt_file: str | None,
    chat: bool | None,
    max_new_tokens: int,
    exact: bool,
    stop_strings: tuple[str, ...],
    speculate: int,
    logprobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt with OUT, a checkpoint or a folder of `flashhead export`. The answer alone goes to stdout, figures to stderr."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("--prompt and --prompt-file: a prompt comes from one of them, give one.")
    if prompt_file is not None:
        prompt = _text(prompt_file)
    assert prompt is not None
    sampling = take_sampling(options, exact)
    if exact and speculate:
        raise click.UsageError("--exact guesses and verifies in its own way: leave out --speculate.")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs stands in the JSON document: add --json, or leave it out.")
    from flashhead_edge.generation.decode import check_settings

    grammar = options["json_schema"] is not None or options["regex"] is not None
    check_settings(max_new_tokens, sampling, stop_strings, speculate, grammar=grammar, logprobs=logprobs)
    with answer_only() as stdout, recorded() as taken:
        pieces, listed = [], []
        live = stdout.isatty() and not as_json
        with shown_progress("loading") as progress:
            from flashhead_edge.generation import prompt_ids

            engine = open_engine(out, options, progress)
            ids = prompt_ids(engine, prompt, chat)
            more: dict[str, Any] = {"grammar": take_grammar(engine, options), "logprobs": logprobs}
            if not exact:
                more["speculate"] = speculate
            run = answer(engine, ids, max_new_tokens, sampling, exact, stop_strings, **more)
            if not live:
                for n, token in enumerate(run, 1):
                    pieces.append(token.text)
                    listed.append(token)
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
    figures("figures", {name: value for name, value in summary.items() if (exact or name not in EXACT_FIGURES) and (value or name not in OTHER_FIGURES)})
    if as_json:
        if logprobs is not None:
            summary["logprobs"] = logprobs_document(listed, engine.tokenizer)
        write_json({"prompt": prompt, "text": text, **summary}, stdout)
    else:
        stdout.write(text + "\n")
        stdout.flush()


def _text(file: str) -> str:
    """A file's text, or that of standard input (-), without the line end at its end and without a byte order mark."""

    def wrong(said: str) -> click.BadParameter:
        return click.BadParameter(f"{'standard input' if file == '-' else file}: {said}", param_hint="--prompt-file")

    if file == "-" and sys.stdin is None:
        raise wrong("it is closed, expected a prompt; name a file, or give it one.")
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except OSError as error:
        raise wrong(f"it cannot be read ({error.strerror}), expected a file of text; give another one.") from error
    except UnicodeDecodeError as error:
        raise wrong(f"byte {error.start} is not UTF-8, expected UTF-8 text; convert the file.") from error
    text = text.removeprefix("\ufeff")
    text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise wrong("it is empty, expected a prompt; give another one.")
    return text


def logprobs_document(tokens: Sequence[Token], tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, under the names that OpenAI's interface gave them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token]), "id": token, "logprob": logprob}

    found = [(token.id, token.logprobs) for token in tokens if token.logprobs is not None]
    return [entry(token, of.logprob) | {"top_logprobs": [entry(*other) for other in of.top]} for token, of in found]
