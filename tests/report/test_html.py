"""The HTML report: its text, and the page in a real browser without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_document import document

from flashhead_edge.errors import FlashHeadError
from flashhead_edge.evaluation.measures import histogram
from flashhead_edge.report import plots
from flashhead_edge.report.html import page, write_html

OUTSIDE = """return [...document.querySelectorAll("svg.plot")].flatMap(p => {  // marks and labels that leave their picture
  const f = p.getBoundingClientRect();
  return [...p.querySelectorAll("text, rect, path, line")].map(e => e.getBoundingClientRect())
    .filter(r => r.left < f.left - 1 || r.right > f.right + 1 || r.top < f.top - 1 || r.bottom > f.bottom + 1); })"""
OVERLAPS = """return [...document.querySelectorAll("svg.plot")].flatMap(p => {  // labels that lie on each other
  const t = [...p.querySelectorAll(".tick, .name, .note")].map(e => [e.textContent, e.getBoundingClientRect()]);
  const on = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  return t.flatMap(([a, r], i) => t.slice(0, i).filter(([b, q]) => on(r, q)).map(([b, q]) => a + " on " + b)); })"""
VOID = {"meta", "link", "br"}


class Checker(HTMLParser):
    """Tags that close in the order in which they opened, ids that are there once, every picture named."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(str(given["id"]))
        self.named += str(given.get("aria-labelledby") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"circle", "line", "path", "polygon", "rect"}  # of SVG: in HTML the slash means nothing

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def without_rivals() -> dict[str, Any]:
    d = document(1, None) | {"rivals": [], "worst_tokens": []}
    d["texts"] = [t | {"rivals": [], "free_running": None} for t in d["texts"]]
    return d


def perfect() -> dict[str, Any]:
    """Not one miss: the plots must not take the logarithm of nothing."""
    d = document(1)
    for record in [d, *d["texts"]]:
        record |= {"top1_agreement": 1.0, "top1_agreement_interval": [0.9987, 1.0]}
    return d


@pytest.mark.parametrize("make", [document, lambda: document(1), without_rivals, perfect], ids=["five texts", "one text", "no rivals", "perfect"])
def test_page_is_well_formed_and_self_contained(make: Any) -> None:
    text = page(make())
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.named) <= set(checker.ids)
    assert '<html lang="en">' in text
    assert "<script" not in text
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", text.lower())
    assert len(text) < 200_000


def test_what_comes_from_outside_is_escaped() -> None:
    d = document()
    d["model"], d["texts"][0]["text"] = "<img src=x>", "<u>.txt"
    text = page(d)
    assert "<img" not in text
    assert "<u>" not in text
    assert "␣&lt;b&gt;&amp;" in text  # a token
    assert "&lt;wikitext2-valid.txt&gt;" in text  # the command


def test_a_fixed_count_of_clusters_is_a_sentence_not_a_plot() -> None:
    d = document(1) | {"clusters_opened": {"mean": 256.0, "p50": 256.0, "p90": 256.0, "p99": 256.0}, "clusters_opened_histogram": histogram(np.full(9, 256))}
    text = page(d)
    assert "Every step opens 256 of 1,536 clusters." in text
    assert 'id="clusters"' not in text


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    write_html(document(1), out)
    before = out.read_text(encoding="utf-8")
    assert before == page(document(1))
    with pytest.raises(FlashHeadError, match=r"missing/report.html: the report cannot be written .*choose another path"):
        write_html(document(1), tmp_path / "missing" / "report.html")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FlashHeadError, match="No space left on device"):
        write_html(document(2), out)
    assert out.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_axis() -> None:
    x = plots.Axis(0.01, 1.0, 100, 300, log=True)
    assert [x.at(v) for v in (0.01, 0.1, 1.0, 5.0, 1e-9)] == pytest.approx([100, 200, 300, 300, 100])
    y = plots.Axis(0.5, 0.001, 300, 0, log=True)  # the largest share of misses at the bottom
    assert y.at(0.5) == pytest.approx(300)
    assert y.at(0.001) == pytest.approx(0)
    assert y.at(0.5) > y.at(0.1) > y.at(0.01)
    assert plots.Axis(3, 3, 0, 10).at(3) == 0


def test_ticks() -> None:
    assert [v for v, _ in plots.log_ticks(3, 150, str)] == pytest.approx([5, 10, 20, 50, 100])
    assert [v for v, _ in plots.log_ticks(1, 1e5, str)] == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5])
    assert [v for v, _ in plots.linear_ticks(0.11, str)] == pytest.approx([0, 0.05, 0.1])
    assert len(plots.linear_ticks(0.0, str)) == 1


def requests(session: Any) -> list[str]:
    """Addresses that the page asked for since the last call."""
    events = [json.loads(e["message"])["message"] for e in session.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def box(session: Any, selector: str) -> dict[str, float]:
    return session.execute_script("const r = document.querySelector(arguments[0]).getBoundingClientRect(); return r.toJSON()", selector)  # type: ignore[no-any-return]


@pytest.mark.browser
def test_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    d = document()
    write_html(d, tmp_path / "report.html")
    address = (tmp_path / "report.html").as_uri()
    browser.get_log("browser"), requests(browser)
    browser.get(address)
    assert browser.get_log("browser") == []
    assert [u for u in requests(browser) if not u.startswith("data:")] == [address]
    assert browser.title == "FlashHead report: SmolLM2-135M-Instruct"
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "svg.plot") == 4
    heads = 1 + len(d["rivals"])
    assert browser.execute_script(count, "#agreement g > title") == heads * (len(d["texts"]) + 1)
    assert browser.execute_script(count, "#clusters rect.bar") == len(d["clusters_opened_histogram"]["steps"])
    assert browser.execute_script(count, "#cumulative path") == len(d["texts"])
    for name in ("agreement", "clusters", "bytes", "cumulative"):
        size = box(browser, f"#{name}")
        assert size["width"] > 700
        assert size["height"] > 300
    assert browser.execute_script(OUTSIDE) == []
    assert browser.execute_script(OVERLAPS) == []
    best = browser.execute_script("return document.querySelector('tr.ours').innerText")
    assert "this head (fitted)" in best


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser: Any, tmp_path: Path, theme: str) -> None:
    """Contrast of text and of the plots' colours against the card: 4.5 and 3, WCAG 2.2, 1.4.3 and 1.4.11."""
    write_html(document(), tmp_path / "report.html")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get((tmp_path / "report.html").as_uri())

    def colour(selector: str, what: str) -> tuple[float, ...]:
        value = browser.execute_script("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what)
        return tuple(int(v) for v in re.findall(r"\d+", value)[:3])

    def light(rgb: tuple[float, ...]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    card = light(colour("section", "backgroundColor"))
    assert (card < 0.1) == (theme == "dark")
    texts = [(s, "fill" if s[0] == "." else "color", 4.5) for s in ("section p", "figcaption", "tbody th", "thead th", ".tick", ".name")]
    marks = [(f".legend li:nth-child({i}) svg > *", "stroke" if i > 5 else "fill", 3) for i in range(1, 8)]
    for selector, what, least in texts + marks:
        pair = sorted((light(colour(selector, what)), card))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, selector


@pytest.mark.browser
def test_narrow_screen_scrolls_tables_alone(browser: Any, tmp_path: Path) -> None:
    write_html(document(), tmp_path / "report.html")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.execute_script("return [...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
