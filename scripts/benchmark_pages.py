"""Write the tables and figures of docs/benchmarks/ into docs/benchmarks.md, docs/quality.md and README.md, between their markers; `make docs` runs it.

python scripts/benchmark_pages.py            write
python scripts/benchmark_pages.py --check    exit code 1 where a page is not what it would be
"""

from __future__ import annotations

import sys
from pathlib import Path

from flashhead_edge.errors import SettingsError
from flashhead_edge.records.folder import read_records
from flashhead_edge.report.pages import benchmarks_block, faithful_block, headline_block, with_block, with_figures
from flashhead_edge.report.quality import quality_block

ROOT = Path(__file__).resolve().parent.parent


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Each page that holds a table of records, as it should be.

    Raises:
        SettingsError: a record in docs/benchmarks is refused, or a page lacks its markers.
    """
    found = read_records([root / "docs/benchmarks"])
    if found.refused:
        raise SettingsError(found.refused[0])
    entries = found.entries
    blocks = {
        root / "docs/benchmarks.md": {"records": benchmarks_block(entries)},
        root / "docs/quality.md": {"answers": quality_block(entries)},
        root / "README.md": {"headlines": headline_block(entries, "docs/benchmarks"), "faithfulness": faithful_block(entries)},
    }
    made = {}
    for path, of in blocks.items():
        page = path.read_text(encoding="utf-8")
        for name, block in of.items():
            page = with_block(page, name, block)
        made[path] = with_figures(page, entries)
    return made


def main() -> None:
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        if stale:
            raise SystemExit(f"{', '.join(str(p.relative_to(ROOT)) for p in stale)}: not what docs/benchmarks says; run make docs")
        return
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(stale)} pages changed")


if __name__ == "__main__":
    main()
