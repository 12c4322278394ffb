"""Loaded by schemathesis: texts of a few tokens, so that a run is about what is asked and not about how long a text is."""

from __future__ import annotations

from typing import Any

import schemathesis

FEW = 4


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Leave what is wrong as it is: only a length that is not said, or is long, becomes short."""
    body = case.body
    if isinstance(body, dict) and ("messages" in body or "prompt" in body):
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) in (int, float) and body[name] > FEW and body[name] <= 1 << 20:
                body[name] = FEW
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = FEW
