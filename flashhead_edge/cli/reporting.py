"""What `generate` and `chat` say of a run: its report, with the board's power beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def recorded() -> Any:
    """A context in which the board's power is recorded, where it is known: samples for `reported`."""
    from flashhead_edge.jetson.run_report import power_recorded

    return power_recorded()


def reported(out: Path, engine: Any, summary: Any, taken: Any, end: float) -> dict[str, Any]:
    """The run's report as plain values. The engine has answered once: its time in the head is that run's, and is taken from it."""
    from flashhead_edge.cli.common import plain
    from flashhead_edge.jetson import ExportedEngine, is_exported
    from flashhead_edge.jetson.run_report import run_report

    head = None
    if isinstance(engine, ExportedEngine):
        head, engine.spent.head = (engine.spent.head if is_exported(out) else None), 0.0
    weight = getattr(getattr(engine, "module", None), "weight", None)  # torch's; the cuda backend has none
    gpu = not is_exported(out) and (weight is None or weight.device.type != "cpu")
    need = engine.backend.need if isinstance(engine, ExportedEngine) and engine.backend.about["backend"] == "cuda" else None
    document = plain(run_report(out, summary, taken, end, head_seconds=head, gpu=gpu, need=need))
    assert isinstance(document, dict)
    return document
