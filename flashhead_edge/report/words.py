"""Numbers as a person reads them: shares in percent, bytes in MB, and a dash where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"


def percent(share: float | None, digits: int = 2) -> str:
    """0.9953 -> `99.53 %`. A share below 1 is never rounded up to 100 %: it gets the digits that show the gap."""
    if share is None:
        return DASH
    while share < 1 and round(100 * share, digits) >= 100 and digits < 6:
        digits += 1
    return f"{100 * share:.{digits}f} %"


def interval(pair: Sequence[float] | None) -> str:
    """The two ends of an interval of a share."""
    return DASH if pair is None else f"{percent(pair[0])[:-2]} to {percent(pair[1])}"


def megabytes(count: float | None) -> str:
    """Bytes in MB (10^6) or kB, with three figures."""
    if count is None:
        return DASH
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def counted(count: int, what: str) -> str:
    """`1 record`, `2 records`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def number(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def short(value: float) -> str:
    """Four figures, or all of a large number: `22.6`, `1,354`."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def quantiles(spread: Mapping[str, float] | None) -> str:
    """`p50 / p90 / p99` of a spread."""
    return DASH if spread is None else " / ".join(f"{spread[p]:,.0f}" for p in ("p50", "p90", "p99"))


def visible(text: str | None) -> str:
    """A token's text with its blanks to be seen."""
    return DASH if text is None else text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "(empty)"


def verdict(document: Mapping[str, Any]) -> tuple[str, str]:
    """Whether a checkpoint kept its promise on the text where it did worst: `kept`, `close`, `missed` or `none`, and a sentence."""
    s = document["summary"]
    target, lowest, ends = s["target_agreement"], s["lowest_agreement"], s["lowest_agreement_interval"]
    where = f"{percent(lowest)} on {s['lowest_agreement_text']}" + (f", the lowest of {s['texts']} texts" if s["texts"] > 1 else "")
    if target is None:
        return "none", f"The head was not calibrated to a target. It kept the dense head's token in {where}."
    if lowest >= target:
        sure = "" if ends[0] >= target else f" The 95 % interval starts at {percent(ends[0])}: more positions would make it sure."
        return "kept", f"The promise of {100 * target:g} % was kept: {where}.{sure}"
    if ends[1] >= target:
        return "close", f"The promise of {100 * target:g} % was not reached, by less than chance explains: {where}."
    return "missed", f"The promise of {100 * target:g} % was not kept: {where}."
