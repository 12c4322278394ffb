"""The process in which chat templates run (`chat_template`): a line of JSON in, a line of JSON out."""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from typing import Any

from flashhead_edge.errors import TEMPLATE_FAULTS, first_line

MOST_ADDED = 16 << 20  # characters that a template adds to what it is given


def main(seconds: int, megabytes: int) -> None:
    """Answer until the input ends.

    Args:
        seconds: for a text, after which the process ends.
        megabytes: of address space.
    """
    limit_memory(megabytes)
    for line in sys.stdin.buffer:
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)  # nobody has set what is done then: the process ends, in the middle of whatever it does
        try:
            answer = json.dumps(answered(**json.loads(line), most=len(line) + MOST_ADDED))
        except MemoryError:
            answer = json.dumps({"fault": f"it takes more than {megabytes:,} MB of memory"})
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answered(template: str, context: dict[str, Any], most: int) -> dict[str, str]:
    """`text` of at most so many characters, or what is wrong: the template is `unreadable`, has `refused` or is at `fault`."""
    from jinja2 import TemplateError

    try:
        program = compiled(template)
    except TemplateError as error:
        return {"unreadable": first_line(error)}
    try:
        text = program.render(**context)
    except TemplateError as error:
        return {"refused": first_line(error)}
    except MemoryError:
        raise
    except TEMPLATE_FAULTS as error:
        return {"fault": first_line(error)}
    return {"text": text} if len(text) <= most else {"fault": f"its text has {len(text):,} characters, expected at most {most:,}"}


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """A template in jinja2's sandbox, with the names that transformers gives to chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks what a model says, for training; here its content stands as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return environment.from_string(template)
