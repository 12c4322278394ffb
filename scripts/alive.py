"""Run a command and give a sign of life whenever it has been silent for four seconds.

python scripts/alive.py "installing" pip install ...
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time

SILENCE_S = 4.0


def run(label: str, command: list[str]) -> int:
    """Run `command`, its output passed through line by line; return its exit code."""
    start = last = time.monotonic()
    done = threading.Event()

    def tick() -> None:
        nonlocal last
        while not done.wait(0.5):
            now = time.monotonic()
            if now - last >= SILENCE_S:
                print(f"... {label} ({now - start:.0f} s)", file=sys.stderr, flush=True)
                last = now

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, errors="replace") as process:
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        assert process.stdout is not None
        for line in process.stdout:
            last = time.monotonic()
            sys.stdout.write(line)
            sys.stdout.flush()
    done.set()
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit('usage: python scripts/alive.py "what it is doing" COMMAND [ARGUMENT]...')
    try:
        sys.exit(run(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
