"""The command line: `flashhead VERB`. One file a verb, no logic; each verb's heavy imports stand in its body."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from flashhead_edge import __version__
from flashhead_edge.cli.common import Settings, common_options
from flashhead_edge.errors import FlashHeadError

EXTRAS = {
    "torch": "torch", "transformers": "torch", "gguf": "torch", "accelerate": "torch", "huggingface_hub": "torch",
    "onnxruntime": "onnx", "onnx": "export", "onnx_ir": "export", "ml_dtypes": "export", "onnxruntime_genai": "export",
    "lm_eval": "quality", "datasets": "quality",
    "packaging": "bundle", "wheel": "bundle", "jsonschema": "report", "plotly": "report",
    "starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve", "anyio": "serve",
}  # fmt: skip
VERBS = (
    "convert", "quantize", "calibrate", "evaluate", "export", "plugin", "generate", "chat", "serve", "inspect", "doctor", "monitor", "plan", "bundle",
    "bench", "report",
)  # fmt: skip


class Verbs(click.Group):
    """A group whose verbs are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(import_module(f"flashhead_edge.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flashhead")
@common_options
def cli() -> None:
    """Language-model heads that read a fiftieth of their bytes, with a proof of how faithful they are."""


PIPE = 141  # 128 and the number of SIGPIPE, as a shell counts it: `bench compare | head` is no loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failure, 2 wrong input, 130 interrupted, 141 the reader of the output has gone."""
    # Threads that wait for each other must not spin: beside another program on the same cores that costs a factor of three and
    # more (a small conversion takes 2 min 16 s instead of 7 min 42 s), and on quiet cores it gains nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    settings = Settings(tuple(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.exit(cli.main(settings.arguments, prog_name="flashhead", obj=settings, standalone_mode=False) or 0)
    except SystemExit as error:
        gone = error.code == 1 and type(sys.stdout).__name__.endswith("PacifyFlushWrapper")  # click's, where the output's reader has gone
        sys.exit(PIPE if gone else error.code)
    except click.Abort as error:
        if isinstance(error.__cause__ or error.__context__, EOFError):
            _fail("the input ended", 1)
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a verb: its help, as click would print it
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "flashhead"
        _fail(f"{error.format_message()} See {path} --help", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except FlashHeadError as error:
        if settings.debug:
            raise
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # who read our output has gone: flashhead inspect OUT | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python would flush at its end has nowhere to go
        sys.exit(PIPE)
    except Exception as error:
        if settings.debug:
            raise
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in EXTRAS:
            _fail(f"{missing} is not installed; pip install 'flashhead-edge[{EXTRAS[missing]}]'", 1)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail(f"{error.filename or 'the output'}: the disk is full, expected room for the answer; free some space or write it elsewhere", 1)
        _fail(f"{type(error).__name__}: {error} (a defect or a broken machine: flashhead --debug shows where it happened)", 1)


def _fail(message: str, code: int) -> None:
    """Say what went wrong in one line on stderr and exit."""
    click.echo("flashhead: " + " ".join(message.split()), err=True)
    sys.exit(code)
