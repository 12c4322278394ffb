"""What the verbs share: common options, the one JSON document on stdout, figures for a person on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

WIDTH = 160  # of tables that go to a file or a pipe
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What a verb must know of its call, and `main` after a verb has failed."""

    arguments: tuple[str, ...] = ()
    debug: bool = False


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and isinstance(ctx.obj, Settings):
        ctx.obj.debug = True


def common_options(function: F) -> F:
    """--debug, which every verb takes."""
    option = click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error.")
    return option(function)


def calibration_options(function: F) -> F:
    """What `convert` and `calibrate` both ask of a calibration."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings along."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same command, seed and threads: same checkpoint."),
        click.option("--torch-device", metavar="NAME", help="Where the model runs and the head is fitted.  [default: a GPU if there is one]"),
        click.option("--device", "device_model", metavar="NAME", help="Choose settings by a step's time on this board (orin-nano, ...), not by its bytes."),
        click.option("--positions", type=click.IntRange(min=1_000), help="Positions to calibrate on.  [default: 60,000, more for deeper targets than 99.8 %]"),
        click.option(
            "--calibration", "texts", multiple=True, metavar="FILE|datasets:NAME", help="Calibrate on this text too, and hold it to the target. Repeatable."
        ),
    ):
        function = option(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout; all else goes to stderr.")
context_option = click.option("--context", type=click.IntRange(min=2), metavar="N", help="Positions of the cache.  [default: the model's, 4,096 at most]")
folder_argument = click.argument("out", type=click.Path(path_type=Path))


@contextlib.contextmanager
def answer_only() -> Iterator[TextIO]:
    """The real stdout, kept for the answer alone: whatever libraries print in the meantime goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy and torch numbers become numbers, what is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # a numpy array or number, a tensor
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def write_json(document: Any, stdout: TextIO) -> None:
    """Print one strict JSON document."""
    stdout.write(json.dumps(plain(document), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    stdout.flush()


def person(stdout: TextIO, as_json: bool) -> Any:
    """A rich console for what a person reads: on stdout where it is the answer, on stderr beside a JSON document."""
    from rich.console import Console

    stream = sys.stderr if as_json else stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def figures(title: str, values: Mapping[str, Any]) -> None:
    """Figures for a person, on stderr: one a line, nested ones indented."""
    click.echo(title, err=True)
    _figures(plain(values), 1)


def _figures(values: Mapping[str, Any], depth: int) -> None:
    pad = "  " * depth
    width = max((len(k) for k, v in values.items() if not _nested(v)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            click.echo(f"{pad}{name}", err=True)
            _figures(value, depth + 1)
        elif _nested(value):
            click.echo(f"{pad}{name}: {len(value)} entries (--json shows them)", err=True)
        elif value not in (None, [], {}):
            click.echo(f"{pad}{name:<{width}}  {_short(value)}", err=True)


def _nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and (len(value) > 12 or any(isinstance(v, (dict, list)) for v in value))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def check_page(path: Path | None, option: str) -> None:
    """Refuse a page that cannot be written, before anything is measured; None is no page."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"the folder {folder} does not exist.", param_hint=option)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise click.BadParameter(f"{path} cannot be written.", param_hint=option)
