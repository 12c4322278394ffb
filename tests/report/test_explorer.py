"""The explorer: its text without scripts, and the page in a real browser without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_records import made, many, predicted

from flashhead_edge.errors import FlashHeadError
from flashhead_edge.records.folder import Entry, Found
from flashhead_edge.records.form import figure, identity
from flashhead_edge.report.explorer import COLUMNS, FILTERS, explorer_page, write_explorer

HOSTILE = ("<img src=x onerror=document.title='taken'>", "</script><script>document.title='taken'</script>", '<a href="javascript:x">&amp;\'"`|*', "\u2028")
VOID = {"meta", "link", "br"}


def entries(*records: dict[str, Any]) -> Found:
    return Found(tuple(Entry(r, identity(r), f"runs/{i % 3}.json") for i, r in enumerate(records)), ())


class Reader(HTMLParser):
    """The table as a person without scripts reads it, and whether every tag closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert reader.open == [] and reader.wrong == []
    assert len(set(reader.ids)) == len(reader.ids)
    return reader


def test_without_scripts_it_is_a_table_with_every_command() -> None:
    reader = read(explorer_page(entries(*many(40))))
    heads, *rows = reader.rows
    assert heads == [*(c.title for c in COLUMNS), "command"]
    assert len(rows) == 40
    assert all(len(row) == len(heads) for row in rows)
    assert sum("predicted" in row[0] for row in rows) == 2
    assert [bool("predicted" in row[0]) for row in rows] == [False] * 38 + [True] * 2  # predictions stand last
    assert sum(f"flashhead bench head --number {i}" in row[-1] for i, row in enumerate(rows)) < 40  # in an order of its own
    assert {re.search(r"--number (\d+)", row[-1])[1] for row in rows} == {str(i) for i in range(40)}  # type: ignore[index]


def test_a_row_says_what_its_record_says() -> None:
    one = made(head="FlashHead", spread=0.02)
    text = made("run-2", part="text", microseconds=None, tokens_per_second=figure(506.0, 417.0, 623.0, "range", 5), top1_agreement=None,
                top1_agreement_interval=None, calibrated_agreement=0.995, real_weights=True)  # fmt: skip
    powered = made("run-4", power_mode="MAXN_SUPER", joules_per_token=figure(0.05)) | {"threads": 2}
    powered["baseline"]["joules_per_token"] = figure(0.091)
    row = read(explorer_page(entries(powered))).rows[1]
    assert row[5] == "NVIDIA H100 80GB HBM32 threadsMAXN_SUPER" and row[8].endswith("25.50.05 J a token") and row[7].endswith("dense bf160.091 J a token")
    asked = {"task": "gsm8k", "metric": "equal answers", "value": 0.93, "interval": [0.9, 0.95], "samples": 100, "higher_is_better": True}
    asked |= {"harness": None, "domain": None, "note": None}
    rows = read(explorer_page(entries(one, text, made("run-3", part="quality", quality=asked), predicted()))).rows[1:]
    assert rows[0][:3] == ["Llama-3.2-1B random", "a step of the head", "FlashHead"]
    assert rows[0][7:12] == ["200 us196 to 204dense bf16", "25 us24.5 to 25.5", "8.007.68 to 8.32", "99.55 %99.40 to 99.65 %", "1.81 %9.5 MB"]
    assert rows[1][0] == "Llama-3.2-1B" and rows[1][8] == "506 tokens/s417 to 623" and rows[1][10] == "(99.50 %)"
    assert rows[2][1] == "gsm8k: equal answers" and rows[2][8] == "0.930.9 to 0.95"
    assert rows[3][0] == "Llama-3.2-1B random predicted" and rows[3][8] == "136 us"


def test_it_asks_no_network_and_its_policy_forbids_it() -> None:
    page = explorer_page(entries(made()))
    assert "default-src 'none'" in page
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)  # plotly's own text names addresses that it would only visit if asked
    assert len(own) < 80_000
    assert not re.search(r"https?:|url\(|@import|src=", own)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(text: str) -> None:
    fields = dict.fromkeys(("model", "head", "device", "backend", "precision", "command", "backend_version", "commit", "source", "note"), text)
    one = made(**fields, settings={text: text})
    page = explorer_page(Found((Entry(one, "0" * 12, text),), (f"{text}: broken",)))
    reader = read(page)
    assert len(reader.rows) == 2
    assert text.strip() in reader.rows[1][0] or text == "\u2028"
    data = page[page.index("id='data'>") + 10 : page.index("</script>", page.index("id='data'>"))]
    assert "<" not in data and ">" not in data
    assert json.loads(data)[0]["record"]["model"] == text


def test_rows_that_differ_in_target_text_or_cache_look_different() -> None:
    rows = read(explorer_page(entries(
        made(settings={"text": "GSM8K"}, target_agreement=0.995), made(settings={"text": "GSM8K"}, target_agreement=0.999), made(context=512), made(tokens=128),
    ))).rows[1:]  # fmt: skip
    assert rows[0][1:3] == ["a step of the headGSM8K", "FlashHeadtarget 99.5 %"] and rows[1][2] == "FlashHeadtarget 99.9 %"
    assert rows[2][1] == "a step of the head512 cached" and rows[3][1] == "a step of the head128 tokens"


def test_every_figure_is_a_link_and_nothing_turns_its_line_around() -> None:
    page = explorer_page(entries(made(device="a\u202eb", head="\u2066x")))
    row = page[page.index("<tbody>") : page.index("</tbody>")]
    assert row.count('<a href="#r-') == 5  # baseline, this head, times as fast, agreement, bytes
    assert "a\ufffdb" in row and "\ufffdx" in row and not set("\u202e\u2066") & set(page)


def test_what_is_no_record_is_on_the_page() -> None:
    page = explorer_page(Found(entries(made()).entries, (), ("a.json: a draw: no dense head in the same run",)))
    assert "Measured, and no record" in page and "<li>a.json: a draw: no dense head in the same run</li>" in page


def test_what_was_left_out_is_on_the_page() -> None:
    page = explorer_page(Found(entries(made()).entries, ("a.json: broken", "b.json: newer")))
    assert "2 files or records were left out" in page and "<li>b.json: newer</li>" in page
    assert "left out" not in explorer_page(entries(made()))


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FlashHeadError, match="cannot be written"):
        write_explorer(entries(made()), tmp_path / "missing" / "index.html")
    assert list(tmp_path.iterdir()) == []


# in a browser

ROWS = "return [...document.querySelectorAll('#records tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
SETTLED = "const done = arguments[0], wait = () => document.documentElement.dataset.drawn ? done() : requestAnimationFrame(wait); wait()"

SETTLED_AFTER_HASH = f"setTimeout(done => {{ (function () {{ {SETTLED} }})(done) }}, 50, arguments[0])"  # the event comes later than the change


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("explorer") / "index.html"
    write_explorer(entries(*many(300)), path)
    return path.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address)
    browser.execute_async_script(SETTLED)
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {u for u in asked if not u.startswith("data:")} == {address}


def choose(page: Any, name: str, value: str) -> None:
    page.execute_script(
        "const s = document.getElementById('filter-' + arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change', {bubbles: true}))",
        name,
        value,
    )
    page.execute_async_script(SETTLED)


def column(page: Any, key: str) -> list[str]:
    at = [c.key for c in COLUMNS].index(key)
    return [row[at] for row in page.execute_script(ROWS)]


@pytest.mark.browser
def test_filters_narrow_table_count_and_address(page: Any) -> None:
    options = page.execute_script("return [...document.querySelectorAll('#filters select')].map(s => [s.dataset.key, s.options.length])")
    assert [key for key, _ in options] == [f.key for f in FILTERS]
    assert dict(options)["model"] == 4 and dict(options)["batch"] == 4 and dict(options)["kind"] == 3
    assert page.execute_script("return document.getElementById('filter-part').closest('label').hidden")  # one value is no choice
    assert len(page.execute_script(ROWS)) == 100
    choose(page, "model", "Qwen3-1.7B")
    choose(page, "batch", "4")
    wanted = [r for r in many(300) if r["model"] == "Qwen3-1.7B" and r["batch"] == 4]
    assert page.execute_script("return document.getElementById('count').textContent") == f"{len(wanted)} of 300 records"
    assert len(page.execute_script(ROWS)) == len(wanted)
    assert {m.split(" ")[0] for m in column(page, "model")} == {"Qwen3-1.7B"} and set(column(page, "batch")) == {"4"}
    assert page.execute_script("return location.hash") == "#model=Qwen3-1.7B&batch=4"
    page.execute_script("document.getElementById('reset').click()")
    assert page.execute_script("return document.getElementById('count').textContent") == "300 of 300 records"


@pytest.mark.browser
def test_the_address_brings_its_filters(browser: Any, address: str) -> None:
    browser.get("about:blank")
    browser.get(address + "#kind=predicted")
    browser.execute_async_script(SETTLED)
    assert browser.execute_script("return document.getElementById('count').textContent") == "17 of 300 records"
    assert browser.execute_script("return [...document.querySelectorAll('#records tbody tr')].every(r => r.classList.contains('predicted'))")


@pytest.mark.browser
def test_an_address_that_changes_brings_its_filters_too_and_a_record_s_address_its_record(page: Any) -> None:
    count = "return document.getElementById('count').textContent"
    page.execute_script("location.hash = '#model=Qwen3-1.7B'")
    page.execute_async_script(SETTLED_AFTER_HASH)
    assert {m.split(" ")[0] for m in column(page, "model")} == {"Qwen3-1.7B"}
    page.execute_script("location.hash = '#kind=predicted&model=no-such-model'")  # what it does not name is not filtered by, nor what no record has
    page.execute_async_script(SETTLED_AFTER_HASH)
    assert page.execute_script(count) == "17 of 300 records"
    page.execute_script("document.querySelector('#records tbody tr td:nth-child(9) a').click()")
    address = page.execute_script("return location.hash")
    assert address == "#r-" + page.execute_script("return document.querySelector('#records tbody tr').id").removeprefix("r-")
    page.execute_script("document.getElementById('record').close()")
    assert page.execute_async_script("setTimeout(() => arguments[0](location.hash), 50)") == "#kind=predicted"
    page.execute_script("location.hash = arguments[0]", address)
    page.execute_async_script(SETTLED_AFTER_HASH)
    assert page.execute_script("return document.getElementById('record').open")


@pytest.mark.browser
def test_columns_sort_both_ways_by_the_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    button = page.find_element("css selector", "th[data-key=ours] button")
    button.send_keys(Keys.ENTER)
    values = [float(v.split(" us")[0].replace(",", "")) for v in column(page, "ours")]
    assert values == sorted(values) and len(set(values)) > 5
    assert page.execute_script("return document.querySelector('th[data-key=ours]').getAttribute('aria-sort')") == "ascending"
    button.send_keys(Keys.SPACE)
    values = [float(v.split(" us")[0].replace(",", "")) for v in column(page, "ours")]
    assert values == sorted(values, reverse=True)
    page.execute_script("for (let i = 0; i < 2; i++) document.getElementById('more').click()")
    for descending in (False, True):  # the order before had the predictions, whose agreement is not known, among the others
        page.find_element("css selector", "th[data-key=agreement] button").send_keys(Keys.ENTER)
        found = column(page, "agreement")
        known = [float(v.split(" %")[0]) for v in found[:-17]]
        assert len(found) == 300 and set(found[-17:]) == {"–"}  # what is not known stands last in both directions
        assert known == sorted(known, reverse=descending)
    assert page.execute_script("return document.getElementById('more').hidden")


@pytest.mark.browser
def test_every_figure_leads_to_its_record_and_command(page: Any) -> None:
    link = page.find_element("css selector", "#records tbody tr:nth-child(3) td:nth-child(9) a")
    command = page.execute_script("return document.querySelector('#records tbody tr:nth-child(3) code').textContent")
    page.execute_script("arguments[0].click()", link)
    text = {name: page.execute_script("return document.getElementById(arguments[0]).textContent", f"record-{name}") for name in ("command", "json", "file")}
    assert text["command"] == command
    one = json.loads(text["json"])
    assert one["command"] == command and one["baseline"]["run"] == one["run"] and "note" not in one
    assert text["file"].startswith("runs/")
    assert page.execute_script("return document.activeElement.textContent") == "Close"
    from selenium.webdriver.common.keys import Keys

    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.execute_script("return document.getElementById('record').open")


@pytest.mark.browser
def test_the_table_is_copied_as_markdown(page: Any) -> None:
    choose(page, "device", "Jetson Orin Nano")
    page.execute_script("window.copied = null; Object.defineProperty(navigator, 'clipboard', {value: {writeText: async t => { window.copied = t; }}})")
    page.execute_script("document.getElementById('copy').click()")
    page.execute_async_script(SETTLED)
    lines = page.execute_script("return window.copied").splitlines()
    wanted = [r for r in many(300) if r["device"] == "Jetson Orin Nano"]
    assert len(lines) == 2 + len(wanted)  # all that the filters leave, not only those on the screen
    assert lines[0].startswith("| model | measured | head |") and lines[1] == "|" + "---|" * (len(COLUMNS) + 1)
    assert all(line.count(" | ") == len(COLUMNS) for line in lines[2:])
    assert page.execute_script("return document.getElementById('copied').textContent") == f"{len(wanted)} rows copied"


@pytest.mark.browser
def test_plots_follow_the_filters(page: Any) -> None:
    bars = "return document.querySelectorAll('#bars .bars .point').length"
    marks = "return document.querySelectorAll('#by-bytes .points path').length"
    assert page.execute_script(bars) == 32  # sixteen records and their baselines
    assert page.execute_script("return [...document.querySelectorAll('#bars .xerror')].filter(p => p.getAttribute('d')).length") == 32
    before = page.execute_script(marks)
    choose(page, "kind", "predicted")
    assert page.execute_script("return document.getElementById('by-bytes').hidden")
    assert page.execute_script(marks) == 0  # these predictions have no agreement
    assert 120 <= before < 283  # the frontier and the first of what has an agreement
    assert page.execute_script("return document.querySelectorAll('#bars .bars .point path').length") == 32
    assert page.execute_script("return [...document.querySelectorAll('#bars .bars .point path')].every(p => p.style.fill.startsWith('url'))")  # hatched
    whiskers = "return [...document.querySelectorAll('#bars .xerror')].filter(p => p.getAttribute('d')).length"
    assert page.execute_script(whiskers) == 0  # a prediction has no spread
    page.execute_script("const m = document.getElementById('measure'); m.value = 'times_as_fast'; m.dispatchEvent(new Event('change'))")
    page.execute_async_script(SETTLED)
    assert page.execute_script(bars) == 16
    page.execute_script("const m = document.getElementById('measure'); m.value = 'joules_per_token'; m.dispatchEvent(new Event('change'))")
    page.execute_async_script(SETTLED)
    assert page.execute_script("return document.getElementById('bars-note').textContent") == "None of the records shown has this figure."
    assert page.execute_script("return document.getElementById('bars').hidden")


@pytest.mark.browser
def test_a_frontier_is_of_one_model_and_text(browser: Any, tmp_path: Path) -> None:
    """An easier text is no better head: two texts give two lines, and a text with one head none."""

    def at(run: str, text: str, read: float, agreement: float) -> dict[str, Any]:
        ends = [agreement - 0.0001, agreement]
        return made(run, settings={"text": text, "number": read}, bytes_per_step=read, top1_agreement=agreement, top1_agreement_interval=ends)

    records = [at("a", "easy", 1e6, 0.999), at("b", "easy", 2e6, 0.9999), at("c", "hard", 3e6, 0.99), at("d", "hard", 4e6, 0.995), at("e", "lone", 9e6, 0.9)]
    write_explorer(entries(*records), tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    browser.execute_async_script(SETTLED)
    line = "return document.getElementById('by-bytes').data.at(-1).x"
    dense = 525_336_576
    assert browser.execute_script(line) == pytest.approx([1e6 / dense, 2e6 / dense, None, 3e6 / dense, 4e6 / dense, None])
    choose(browser, "text", "hard")
    assert browser.execute_script(line) == pytest.approx([3e6 / dense, 4e6 / dense, None])


@pytest.mark.browser
def test_bars_show_what_most_records_have_until_somebody_chooses(browser: Any, tmp_path: Path) -> None:
    rate = figure(506.0, 417.0, 623.0, "range", 5)
    texts = [made(f"text-{i}", part="text", microseconds=None, tokens_per_second=rate, bytes_per_step=None, batch=i + 1) for i in range(3)]
    write_explorer(entries(*[made(f"run-{i}") for i in range(9)], *texts), tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    browser.execute_async_script(SETTLED)
    shown = "return document.getElementById('measure').value"
    assert browser.execute_script(shown) == "microseconds"
    choose(browser, "part", "whole texts")
    assert browser.execute_script(shown) == "tokens_per_second"
    browser.execute_script("const m = document.getElementById('measure'); m.value = 'times_as_fast'; m.dispatchEvent(new Event('change'))")
    choose(browser, "part", "a step of the head")
    assert browser.execute_script(shown) == "times_as_fast"


@pytest.mark.browser
def test_hostile_strings_do_nothing_in_a_browser(browser: Any, tmp_path: Path) -> None:
    records = [made(f"run-{i}", model=t, head=t, device=t, command=t, settings={t: i}) for i, t in enumerate(HOSTILE)]
    write_explorer(entries(*records), tmp_path / "hostile.html")
    browser.get_log("browser")
    browser.get((tmp_path / "hostile.html").as_uri())
    browser.execute_async_script(SETTLED)
    browser.execute_script("for (const a of document.querySelectorAll('#records tbody a')) a.click()")
    assert browser.title == "FlashHead benchmarks"
    assert browser.execute_script("return document.querySelectorAll('img, #bars a, #records a:not([href^=\"#r-\"])').length") == 0
    assert HOSTILE[0] in browser.execute_script("return document.getElementById('bars').textContent")
    assert browser.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_bars_stand_out_in_both_themes(browser: Any, address: str, theme: str) -> None:
    """Contrast against the card: 4.5 for text, 3 for bars, WCAG 2.2, 1.4.3 and 1.4.11."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get(address)
    browser.execute_async_script(SETTLED)

    def light(selector: str, what: str) -> float:
        value = browser.execute_script("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what)
        parts = [int(v) / 255 for v in re.findall(r"\d+", value)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    card = light("section", "backgroundColor")
    assert (card < 0.1) == (theme == "dark")
    bars = [(f"#bars .trace:nth-child({i}) .point path", "fill", 3.0) for i in (1, 2)]
    texts = [(s, "fill", 4.5) for s in ("#bars .textpoint text", "#bars .xtick text", "#by-bytes .legendtext")]
    texts += [(s, "color", 4.5) for s in ("#records td", "#records a", "#records td small", "figcaption", "label", "thead button")]
    for selector, what, least in bars + texts:
        pair = sorted((light(selector, what), card))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, selector
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_a_phone_scrolls_the_table_alone(browser: Any, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    browser.get(address)
    browser.execute_async_script(SETTLED)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.execute_script("const s = document.querySelector('.scroll'); return s.scrollWidth > s.clientWidth")
    outside = """return ['bars', 'by-bytes', 'by-time'].flatMap(id => { const f = document.getElementById(id).getBoundingClientRect();
      return [...document.querySelectorAll(`#${id} text`)].filter(t => { const r = t.getBoundingClientRect();
        return r.width && (r.left < f.left - 1 || r.right > f.right + 1); }).map(t => t.textContent); })"""
    assert browser.execute_script(outside) == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_without_scripts_the_browser_shows_the_table(browser: Any, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(address)
    rows = browser.find_elements("css selector", "#records tbody tr")
    assert len(rows) == 300
    assert not any(s.is_displayed() for s in browser.find_elements("css selector", ".scripted"))
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
