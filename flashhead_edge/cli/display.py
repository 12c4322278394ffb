"""Progress on stderr: bars on a terminal, plain lines elsewhere, and a sign of life at least every five seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from flashhead_edge.progress import Progress

SILENCE_S = 4.0  # silence after which a plain line is repeated


@contextlib.contextmanager
def shown_progress(first: str) -> Iterator[Progress]:
    """A progress to pass to long-running functions; `first` is shown until they say something."""
    if sys.stderr.isatty():
        with _bars(first) as progress:
            yield progress
    else:
        with plain_lines(first, sys.stderr) as progress:
            yield progress


def subject(message: str) -> str:
    """What a message is about: the words before its first colon. A new subject is a new bar or a new line."""
    return message.split(":", 1)[0]


@contextlib.contextmanager
def _bars(first: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Bars(*columns, console=Console(stderr=True), refresh_per_second=8) as bars:
        current: Any = bars.add_task(first, total=None)
        about = subject(first)

        def progress(message: str, share: float | None = None) -> None:
            nonlocal current, about
            if subject(message) != about:
                bars.update(current, total=1.0, completed=1.0)
                current, about = bars.add_task(message, total=None), subject(message)
            bars.update(current, description=message, total=None if share is None else 1.0, completed=share or 0.0)

        yield progress
        bars.update(current, total=1.0, completed=1.0)


@contextlib.contextmanager
def plain_lines(first: str, stream: TextIO, silence_s: float = SILENCE_S) -> Iterator[Progress]:
    """One line for each new subject, and one whenever `silence_s` seconds have passed without any."""
    start = time.monotonic()
    lock, done = threading.Lock(), threading.Event()
    state: dict[str, Any] = {"message": first, "share": None, "said": 0.0}

    def say() -> None:
        share = "" if state["share"] is None else f"{100 * state['share']:3.0f} % "
        stream.write(f"[{time.monotonic() - start:5.0f} s] {share}{state['message']}\n")
        stream.flush()
        state["said"] = time.monotonic()

    def tick() -> None:
        while not done.wait(min(0.5, silence_s / 4)):
            with lock:
                if time.monotonic() - state["said"] >= silence_s:
                    say()

    def progress(message: str, share: float | None = None) -> None:
        with lock:
            new = subject(message) != subject(state["message"])
            state.update(message=message, share=share)
            if new:
                say()

    with lock:
        say()
    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        done.set()
        thread.join()
