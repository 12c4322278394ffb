"""Chat templates, in a process of their own: a template is a program that comes from whoever made the model.

jinja2's sandbox keeps it from Python's objects, not from a loop without end or a text of gigabytes. So it runs beside this process, which goes on whatever
becomes of it, with limits that the operating system holds: SECONDS for a text, MEGABYTES of memory (where there is no `resource` module, as on Windows, the
time alone). The process starts with the first template, in a tenth of a second, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flashhead_edge.errors import CheckpointError, EngineError

SECONDS, MEGABYTES = 10, 1024
MAIN = "import sys; sys.path[:] = sys.argv[3:]; from flashhead_edge.checkpoint.chat_template_process import main; main(int(sys.argv[1]), int(sys.argv[2]))"

TIMES_UP = {-getattr(signal, name) for name in ("SIGALRM", "SIGKILL") if hasattr(signal, name)} or {1}  # 1: Windows, of a process that was ended

_turn = threading.Lock()  # one text at a time
_running: list[subprocess.Popen[bytes]] = []  # none, or the one


class Templated(Protocol):
    """A tokenizer, of transformers or of `jetson.tokenizer`."""

    chat_template: Any  # a template; empty or None: there is none; several by name

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """What templates know of it: "bos_token" and so on."""
        ...

    def apply_chat_template(self, conversation: Any, *, tools: Any = ..., tokenize: bool = ..., add_generation_prompt: bool = ...) -> Any: ...


def chat_text(tokenizer: Templated, conversation: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The text of a conversation up to where the assistant speaks, by a tokenizer's template. Errors as `rendered`.

    Several templates by name are left to transformers, which knows which one is meant.
    """
    if not isinstance(tokenizer.chat_template, str):
        more = {"tools": list(tools)} if tools else {}
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **more))
    return conversation_text(tokenizer.chat_template, tokenizer.special_tokens_map, conversation, tools, True)


def conversation_text(
    template: str, special_tokens: Mapping[str, Any], conversation: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompts: bool
) -> str:  # fmt: skip
    """As transformers renders it; prompts: whether the assistant's turn is begun. Errors as `rendered`."""
    messages = [{k: v for k, v in m.items() if v is not None} for m in conversation]
    return rendered(template, {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompts, **special_tokens})


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """The text that a template makes.

    Args:
        template: jinja2's source.
        context: its variables, which JSON can hold.
    Raises:
        jinja2.TemplateError: the template refuses, in its own words, or leaves the sandbox.
        CheckpointError: it is no template.
        ValueError: it fails, or goes beyond a limit.
        EngineError: no process can be started.
    """
    from jinja2 import TemplateError

    asked = json.dumps({"template": template, "context": context}).encode() + b"\n"
    with _turn:
        answer = _answer(asked)
    kind, said = next(iter(answer.items()))
    if kind == "refused":
        raise TemplateError(said)
    if kind == "unreadable":
        raise CheckpointError(f"chat template: it cannot be read ({said}), expected one for jinja2; restore the model's template")
    if kind == "fault":
        raise ValueError(said)
    return said


def _answer(asked: bytes) -> dict[str, str]:
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    late = threading.Timer(SECONDS + 1, process.kill)  # the process ends itself before, where the system has alarms
    late.start()
    try:
        process.stdin.write(asked)
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = b""
    except BaseException:  # such as Ctrl-C: what it answers now is nobody's
        _end()
        raise
    finally:
        late.cancel()
    if not answer.endswith(b"\n"):
        code = process.wait()
        _end()
        return {"fault": f"it takes more than {SECONDS} seconds" if code in TIMES_UP else f"its process ends with status {code}"}
    found: dict[str, str] = json.loads(answer)
    return found


def _process() -> subprocess.Popen[bytes]:
    if _running and _running[0].poll() is None:
        return _running[0]
    _end()
    command = [sys.executable or "python3", "-c", MAIN, str(SECONDS), str(MEGABYTES), *sys.path]
    try:
        # A session of its own: Ctrl-C in a terminal ends an answer, not this process.
        _running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True))
    except OSError as error:
        raise EngineError(
            f"chat template: {command[0]} cannot be started ({error.strerror}), expected a process of its own for it; give a plain text"
        ) from error
    return _running[0]


@atexit.register
def _end() -> None:
    for process in _running:
        process.kill()
        process.communicate()
    _running.clear()
