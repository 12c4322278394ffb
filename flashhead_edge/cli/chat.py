"""flashhead chat"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import click

from flashhead_edge.cli.common import answer_only, common_options, folder_argument, json_option, plain, write_json
from flashhead_edge.cli.display import shown_progress
from flashhead_edge.cli.reporting import recorded, reported
from flashhead_edge.cli.sampling import answer, generation_options, open_engine, take_grammar, take_sampling
from flashhead_edge.errors import SettingsError

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@click.command(short_help="Talk with a model.")
@folder_argument
@click.option("--system", metavar="TEXT", help="A system message that stands before the conversation.")
@generation_options
@click.option(
    "--overflow",
    type=click.Choice(["refuse", "drop-oldest"]),
    default="refuse",
    show_default=True,
    help="A conversation longer than the model's context: refuse the message, or leave out the oldest turns.",
)
@json_option
@common_options
def chat(out: Path, system: str | None, max_new_tokens: int, exact: bool, stop_strings: tuple[str, ...], overflow: str, as_json: bool, **options: Any) -> None:
    """Talk with OUT, a checkpoint or a folder of `flashhead export`, in its chat template. Answers stream to stdout.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. With --json all conversations are
    printed as one document at the end, and answers stream to stderr.
    """
    from flashhead_edge.generation.decode import check_settings

    sampling = take_sampling(options, exact)
    check_settings(max_new_tokens, sampling, stop_strings)
    start = [{"role": "system", "content": system}] if system else []
    messages, turns = list(start), []
    conversations = [messages]
    with answer_only() as stdout:
        with shown_progress("loading") as progress:
            from flashhead_edge.generation import PromptCache
            from flashhead_edge.generation.text import fitting_ids, prompt_ids

            engine = open_engine(out, options, progress)
            grammar = take_grammar(engine, options)
            cache, dropped = PromptCache(), 0  # turns of the conversation that are left out
        answers = sys.stderr if as_json else stdout
        click.echo(HELP, err=True)
        while (line := _read(stdout)) not in (None, "/exit"):
            assert line is not None
            if line == "/reset":
                messages, dropped = list(start), 0
                conversations.append(messages)
                click.echo("forgotten", err=True)
            elif line.startswith("/") and " " not in line:  # a command that there is not; a sentence may begin so
                click.echo(HELP, err=True)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    if overflow == "refuse":
                        ids = prompt_ids(engine, messages)
                    else:
                        ids, more = fitting_ids(engine, messages, len(start), dropped, max_new_tokens)
                        if more > dropped:
                            click.echo(f"(the oldest turns are left out: {more} of {len(messages) // 2 + 1})", err=True)
                        dropped = more
                    run = answer(engine, ids, max_new_tokens, sampling, exact, stop_strings, grammar=grammar, cache=cache)
                except SettingsError as error:  # too long: the conversation goes on without the message
                    messages.pop()
                    click.echo(f"flashhead: {error}", err=True)
                    continue
                with recorded() as taken:
                    messages.append({"role": "assistant", "content": _speak(run, answers)})
                    end = time.monotonic()
                turns.append({"conversation": len(conversations) - 1, "dropped_turns": dropped} | plain(run.summary))
                turns[-1]["report"] = reported(out, engine, run.summary, taken, end)
                click.echo(said(turns[-1]), err=True)
    if as_json:
        write_json({"conversations": conversations, "turns": turns}, stdout)


def said(turn: Mapping[str, Any]) -> str:
    """A turn's figures in one line."""
    r = turn["report"]
    words = [f"{turn['tokens']} tokens", f"the first after {r['seconds_to_first_token']:.2f} s"]
    if r["joules_per_token"] is not None:
        words.append(f"{r['joules_per_token']:.3g} J a token")
    if r["bandwidth_share"] is not None:
        words.append(f"{100 * r['bandwidth_share']:.0f} % of the memory's bandwidth")
    if r["head_share_of_time"] is not None:
        words.append(f"head {100 * r['head_share_of_time']:.0f} % of the time")
    words.append(f"{turn['tokens_per_second']:.1f} a second")
    return f"({', '.join(words)})"


def _read(stdout: TextIO) -> str | None:
    """The next line that was typed, without spaces around it; None at the end of the input."""
    typed = sys.stdin.isatty()
    # line editing needs the terminal itself; where stdout is not one, the prompt goes to stderr
    terminal = contextlib.redirect_stdout(stdout) if typed and stdout.isatty() else contextlib.nullcontext()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines once it is loaded
    interrupted = False
    with terminal:
        while True:
            try:
                if interrupted:
                    click.echo(f"\n{HELP}", err=True)  # in here, for whoever presses Ctrl-C again meanwhile
                interrupted = False
                return input("> " if typed else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                interrupted = True


def _speak(run: Iterable[Any], out: TextIO) -> str:
    """Stream an answer; Ctrl-C ends it early, and what was said stays."""
    pieces = []
    try:
        for token in run:
            pieces.append(token.text)
            out.write(token.text)
            out.flush()
    except KeyboardInterrupt:
        click.echo(" (stopped)", err=True)
    out.write("\n")
    out.flush()
    return "".join(pieces)
