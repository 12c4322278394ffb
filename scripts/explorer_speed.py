"""How long the explorer's page takes to filter and to sort, in headless Chromium: medians of twenty turns, table alone and with the plots drawn.

The clock counts what else runs on the machine; "thread" is the time that the page's main thread computed, plots and layout included.

python scripts/explorer_speed.py [COUNT]      records, 5,000 unless told; needs chromium, chromedriver and selenium
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from small_records import many

from flashhead_edge.records.folder import Entry, Found
from flashhead_edge.records.form import identity
from flashhead_edge.report.explorer import write_explorer

# From the event to the end of the script that answers it (the new rows laid out), and to the frame in which the plots are drawn.
TURN = """const [act, done] = arguments, root = document.documentElement, begun = performance.now();
  eval(act); document.getElementById('records').getBoundingClientRect(); const table = performance.now() - begun;
  const wait = () => root.dataset.drawn ? done([table, performance.now() - begun]) : requestAnimationFrame(wait); wait();"""
ACTS = {
    "sort by a number": "document.querySelector('th[data-key=ours] button').click()",
    "sort by text": "document.querySelector('th[data-key=device] button').click()",
    "filter": "const s = document.getElementById('filter-model'); s.selectedIndex = (s.selectedIndex + 1) % s.options.length;"
    " s.dispatchEvent(new Event('change'))",
}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1240,900"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as work:
        page = Path(work) / "index.html"
        write_explorer(Found(tuple(Entry(r, identity(r), "made.json") for r in many(count)), ()), page)
        print(f"{count:,} records, a page of {page.stat().st_size / 1e6:.1f} MB")
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as session:
            measure(session, page)


def measure(session: Any, page: Path) -> None:
    session.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})  # for the eval of this script alone
    session.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    session.get(page.as_uri())

    def computed() -> float:
        return 1e3 * next(m["value"] for m in session.execute_cdp_cmd("Performance.getMetrics", {})["metrics"] if m["name"] == "TaskDuration")

    for name, act in ACTS.items():
        turns = []
        for _ in range(20):
            before = computed()
            table, plots = session.execute_async_script(TURN, act)
            turns.append((table, plots, computed() - before))
        words = (f"{what} {statistics.median(t[i] for t in turns):.0f} ms" for i, what in enumerate(("table", "with plots", "thread")))
        print(f"{name:<18}" + ", ".join(words) + f"; most with plots {max(t[1] for t in turns):.0f} ms")


if __name__ == "__main__":
    main()
