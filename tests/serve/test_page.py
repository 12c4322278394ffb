"""The page in a real browser: a chat with each head, live figures, a phone's width, the keyboard alone, nothing from elsewhere."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("starlette")
pytestmark = pytest.mark.browser


def until(browser, script, what):
    end = time.monotonic() + 30
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def say(browser, text):
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(text + Keys.ENTER)
    until(browser, "document.querySelectorAll('.turn.assistant .of').length && !running", "no answer")
    return browser.execute_script("return [...document.querySelectorAll('.turn')].map(t => t.innerText)")


ANSWER = "document.querySelectorAll('.turn.assistant .of').length"


def test_chat_by_both_heads_and_live_figures(browser, server):
    browser.get(server.address)
    until(browser, "document.title == 'tiny'", "the page does not know its model")
    assert say(browser, "Hello")[0] == "Hello"  # the field has the focus from the start
    assert until(browser, "document.getElementById('of-fast').textContent", "no speed").endswith("tokens/s")
    browser.execute_script("document.querySelector('[value=dense]').click(); document.getElementById('text').focus()")
    say(browser, "Again")
    until(browser, f"{ANSWER} == 2 && document.getElementById('of-dense').textContent.endsWith('tokens/s')", "no answer of the dense head")
    until(browser, "Math.max(...speeds) > 0", "no figures")
    assert until(browser, "document.getElementById('memory').textContent", "no memory").endswith("iB")
    assert browser.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {u for u in asked if u.startswith("http")} == {server.address + p for p in ("/", "/live", "/v1/chat/completions")}


def test_escape_stops_an_answer(browser, server):
    from selenium.webdriver.common.keys import Keys

    browser.get(server.address)
    until(browser, "document.title == 'tiny'", "the page does not know its model")
    browser.execute_script("document.getElementById('tokens').value = 7000")
    # pressed in the page, as soon as there is an answer: on a busy machine the driver may come when the text has ended
    browser.execute_script("""new MutationObserver((_, watch) => {
      if ((document.querySelector('.turn.assistant')?.innerText.length ?? 0) <= 20) return;
      watch.disconnect();
      document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
    }).observe(document.body, {childList: true, subtree: true, characterData: true})""")
    browser.switch_to.active_element.send_keys("Hello" + Keys.ENTER)  # its text does not end by itself
    until(browser, f"{ANSWER} == 1", "it goes on")
    assert "stopped" in browser.execute_script("return document.querySelector('.turn.assistant .of').textContent")
    server.until(lambda: server.metric("flashhead_texts_active") == 0, "the text goes on without its reader")


def test_a_new_chat_knows_nothing_of_an_answer_that_was_running(browser, server):
    from selenium.webdriver.common.keys import Keys

    browser.get(server.address)
    until(browser, "document.title == 'tiny'", "the page does not know its model")
    browser.execute_script("document.getElementById('tokens').value = 7000")
    browser.switch_to.active_element.send_keys("Hello" + Keys.ENTER)  # its text does not end by itself
    until(browser, "document.querySelector('.turn.assistant')?.innerText.length > 20", "no answer begins")
    browser.execute_script("document.getElementById('fresh').click()")
    server.until(lambda: server.metric("flashhead_texts_active") == 0, "the text goes on without its reader")
    browser.execute_script("document.getElementById('tokens').value = 5; document.getElementById('text').focus()")
    assert say(browser, "Again")[0] == "Again"
    assert browser.execute_script("return turns.map(t => t.role)") == ["user", "assistant"]


def test_a_message_that_was_refused_can_be_mended(browser, server):
    from selenium.webdriver.common.keys import Keys

    browser.get(server.address)
    until(browser, "document.title == 'tiny'", "the page does not know its model")
    browser.execute_script("document.getElementById('text').value = 'Hello '.repeat(9000)")  # longer than the model's context
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    until(browser, "document.querySelectorAll('.turn.error').length == 2 && !running", "it is not refused")
    assert browser.execute_script("return [turns.length, document.getElementById('text').value.length]") == [0, 53_999]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_page_fits_and_can_be_read(browser, server, scheme, width):
    """Nothing is wider than the screen, and text stands out from its ground by WCAG's 4.5 to 1."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.get(server.address)
    until(browser, "document.title == 'tiny'", "the page does not know its model")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    contrast = """
    const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const light = hex => { const h = hex.length == 4 ? [...hex.slice(1)].map(c => c + c) : hex.slice(1).match(/../g);
      const [r, g, b] = h.map(c => parseInt(c, 16) / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const pairs = [["--ink", "--card"], ["--ink", "--back"], ["--soft", "--card"], ["--soft", "--back"], ["--ink", "--mine"], ["--bad", "--card"],
      ["--on-accent", "--accent"]];
    return pairs.map(([a, b]) => { const [x, y] = [light(style(a)), light(style(b))].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); });
    """
    assert min(browser.execute_script(contrast)) >= 4.5


def test_a_key_is_asked_for_and_taken(browser, start_server):
    from selenium.webdriver.common.keys import Keys

    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    with start_server(key="sesame") as server:
        browser.get(server.address)
        until(browser, "document.activeElement.id == 'key'", "no key is asked for")
        browser.switch_to.active_element.send_keys("sesame" + Keys.ENTER)
        until(browser, "document.title == 'tiny'", "the key is not taken")
        browser.execute_script("document.getElementById('text').focus()")
        assert len(say(browser, "Hello")) == 2
