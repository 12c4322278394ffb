"""What a client did wrong, or must be told, in OpenAI's form of an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flashhead_edge.errors import FlashHeadError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class Refusal(FlashHeadError):
    """A request that is not served; its message is one sentence."""

    message: str
    status: int = 400
    code: str | None = None  # a word for programs
    param: str | None = None  # the field of the request
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def error_document(refusal: Refusal) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}
