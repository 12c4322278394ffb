"""What a `flashhead serve` is doing, from its /metrics: tokens a second, the wait for the first, joules a token. Standard library only."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flashhead_edge.errors import SettingsError

MOST = 1 << 20  # bytes of an answer that are read
WAIT = 2.0  # seconds for an answer
NAMES = {
    "tokens": "flashhead_generated_tokens_total",
    "firsts": "flashhead_time_to_first_token_seconds_count",
    "first_seconds": "flashhead_time_to_first_token_seconds_sum",
    "active": "flashhead_texts_active",
    "waiting": "flashhead_texts_waiting",
}


@dataclass(frozen=True)
class Counts:
    """A server's counts at one time. All but the last two only grow."""

    at: float  # by time.monotonic
    tokens: float  # that it has generated
    firsts: float  # texts that have had their first token
    first_seconds: float  # that those waited for it, together
    active: float  # texts being made
    waiting: float


def check_address(url: str) -> str:
    """The address of a server, without what follows its port.

    Raises:
        SettingsError: it is none.
    """
    parts = urlsplit(url)
    try:
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise SettingsError(f"monitor: server {url!r} is no address, expected one such as http://127.0.0.1:8000, which flashhead serve prints; give that one")
    return f"{parts.scheme}://{parts.netloc}"


def read_counts(address: str, key: str | None, unread: dict[str, str]) -> Counts | None:
    """Ask a server; None where it does not answer.

    Args:
        key: its API key.
        unread: gets why.
    """
    request = urllib.request.Request(f"{address}/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            text = answer.read(MOST).decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        unread[address] = f"no answer ({' '.join(str(reason).split()) or type(reason).__name__})"
        return None
    found = {name: re.search(rf"^{metric} (\S+)$", text, re.MULTILINE) for name, metric in NAMES.items()}
    try:
        return Counts(time.monotonic(), **{name: float(match[1]) for name, match in found.items() if match is not None})
    except (TypeError, ValueError):
        unread[address] = "its /metrics are not flashhead serve's"
        return None


def since(before: Counts | None, now: Counts, joules: float | None) -> dict[str, Any]:
    """What a server did between two looks, as JSON; what nothing tells is None.

    Args:
        joules: that the board drew in between, idle ones included.
    """
    found: dict[str, Any] = {"texts_active": int(now.active), "texts_waiting": int(now.waiting), "tokens": int(now.tokens)}
    if before is None or now.tokens < before.tokens:  # another process has its address
        return found | {"tokens_per_second": None, "seconds_to_first_token": None, "joules_per_token": None}
    tokens, firsts = now.tokens - before.tokens, now.firsts - before.firsts
    return found | {
        "tokens_per_second": tokens / (now.at - before.at) if now.at > before.at else None,
        "seconds_to_first_token": (now.first_seconds - before.first_seconds) / firsts if firsts > 0 else None,
        "joules_per_token": joules / tokens if joules is not None and tokens else None,
    }
