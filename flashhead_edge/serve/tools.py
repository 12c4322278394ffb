"""Calls of tools: how a model's template lets it write them, and how they are read from its text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_edge.serve.refusals import Refusal

TAG = "<tool_call>"
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments as JSON text."""

    name: str
    arguments: str


def form_of(template: Any) -> str:
    """How a chat template asks for calls: "tagged" (Hermes, Qwen: JSON between tags) or "bare" (Llama 3: the text is JSON).

    Raises:
        Refusal: the template knows no tools.
    """
    if not knows_tools(template):
        raise Refusal("tools: the model's chat template knows none, expected a model made for tools; leave them out", param="tools")
    return "tagged" if TAG in said_by(template) else "bare"


def knows_tools(template: Any) -> bool:
    return "tools" in said_by(template)


def said_by(template: Any) -> str:
    """A chat template's text, or those of several."""
    return template if isinstance(template, str) else json.dumps(template)


def forced_schema(tools: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The schema of a text that is a call of one of `names`, and nothing else."""
    functions = [tool["function"] for tool in tools if tool["function"]["name"] in names]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class CallReader:
    """Parts a growing text into what is said and what is called; what may become a call waits for the text's end."""

    def __init__(self, form: str, names: Sequence[str]) -> None:
        self.form, self.names = form, names
        self.text = ""
        self.out = 0  # characters that have been said

    def push(self, piece: str) -> str:
        """What is certain to be said."""
        self.text += piece
        return self._say(self._certain())

    def finish(self) -> tuple[str, list[Call]]:
        """What is left to be said, and the calls. A text that looks like a call and is none is said."""
        calls = self._calls()
        return ("" if calls else self._say(len(self.text))), calls

    def _say(self, end: int) -> str:
        start, self.out = self.out, max(end, self.out)
        return self.text[start : self.out]

    def _certain(self) -> int:
        if self.form == "bare":
            begun = self.text.lstrip()
            return 0 if not begun or begun.startswith("{") else len(self.text)
        at = self.text.find(TAG)
        if at >= 0:
            return at
        return len(self.text) - next((n for n in range(len(TAG) - 1, 0, -1) if self.text.endswith(TAG[:n])), 0)

    def _calls(self) -> list[Call]:
        found = TAGGED.findall(self.text) if self.form == "tagged" else re.split(r"(?<=\})\s*;\s*(?=\{)", self.text)
        calls = [self._call(one) for one in found]
        return [] if None in calls else [c for c in calls if c is not None]

    def _call(self, source: str) -> Call | None:
        try:
            value = json.loads(source)
        except ValueError:
            return None
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
