"""Keep the records of a run in docs/benchmarks/: from what `--json` or `bench suite` wrote, without machine paths, checked. Then `make docs`.

python scripts/keep_records.py docs/benchmarks/NAME.json FILE_OR_FOLDER... [--commit REVISION]

The file is replaced. REVISION stands where the run had no git beside it.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path, PurePath
from typing import Any

from flashhead_edge.records.folder import read_records, write_records


def kept(record: dict[str, Any], revision: str | None) -> dict[str, Any]:
    """A record as the repository keeps it: of paths in its command the names alone, and a commit.

    Raises:
        SystemExit: date, commit or command is missing.
    """
    found = record | {"commit": record["commit"] or revision, "command": None if record["command"] is None else without_paths(record["command"])}
    if missing := [name for name in ("date", "commit", "command") if not found[name]]:
        raise SystemExit(
            f"{record['head']} on {record['model']}: the record has no {missing[0]}, expected where it comes from; measure it again, or add --commit"
        )
    return found


def without_paths(command: str) -> str:
    """A command line whose absolute paths are their last names, also behind `NAME=`."""

    def short(word: str) -> str:
        name, equals, value = word.rpartition("=")
        return name + equals + (PurePath(value).name if value.startswith("/") else value)

    return shlex.join(short(word) for word in shlex.split(command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--commit", metavar="REVISION")
    given = parser.parse_args()
    found = read_records(given.runs)
    if found.refused:
        raise SystemExit("\n".join(found.refused))
    write_records(given.out, [kept(dict(e.record), given.commit) for e in found.entries])
    print(f"{given.out}: {len(found.entries)} records")


if __name__ == "__main__":
    main()
