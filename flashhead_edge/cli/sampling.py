"""The options of `generate` and `chat`: how tokens are chosen, and where the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

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
    click.option("--exact", is_flag=True, help="The dense head's greedy text, token for token, verified in blocks."),
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
