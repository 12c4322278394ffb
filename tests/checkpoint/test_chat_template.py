"""Chat templates in their process: what they make, and that nothing which a hostile one does reaches this process."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2 import TemplateError

from flashhead_edge.checkpoint import chat_template
from flashhead_edge.checkpoint.chat_template import rendered
from flashhead_edge.errors import CheckpointError, EngineError

GOES_ON = "{{ '-' * 40 }}{{ 2**10 }}{{ 3 * 0.5 }}"


def goes_on() -> bool:
    return rendered(GOES_ON, {}) == "-" * 40 + "10241.5"


@pytest.fixture
def soon(monkeypatch):
    """A second for a text, in a new process."""
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    chat_template._end()
    yield
    chat_template._end()


def test_a_template_has_what_transformers_gives_it():
    assert rendered("{{ strftime_now('%Y') }}", {}) in {str(datetime.datetime.now().year + i) for i in (-1, 0)}
    assert rendered("{{ x | tojson }}{% generation %}!{% endgeneration %}", {"x": {"é": "<b>\ud800"}}) == '{"é": "<b>\ud800"}!'
    assert rendered("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "012"


def test_a_template_cannot_leave_its_sandbox():
    for template in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateError, match=r"unsafe|not safely callable"):
            rendered(template, {"messages": []})
    with pytest.raises(CheckpointError, match=r"chat template: it cannot be read \(.*\), expected one for jinja2; restore"):
        rendered("{% if %}", {})
    with pytest.raises(TemplateError, match="only users speak"):
        rendered("{{ raise_exception('only users speak') }}", {})


def test_a_text_has_an_end():
    with pytest.raises(ValueError, match=r"its text has 20,000,000 characters, expected at most 16,777,\d\d\d"):
        rendered("{{ 'xy' * 10**7 }}", {})
    assert rendered("<{{ x }}>", {"x": "long" * 5_000_000}) == f"<{'long' * 5_000_000}>"  # what it is given is not its own
    assert goes_on()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.center(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{% set ns = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set a = 'x' * 1000000 %}{{ a.replace('x', a) }}",
    ],
)
def test_gigabytes_are_a_sentence(template):
    with pytest.raises(ValueError, match=r"it takes more than 1,024 MB of memory"):
        rendered(template, {})
    assert goes_on()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**8) }}",
        "{{ 'x' | batch(10**12, 1) | list }}",
        "{{ 9**(9**9) }}",
    ],
)
def test_a_loop_without_end_is_a_sentence(soon, template):
    with pytest.raises(ValueError, match=r"it takes more than 1 seconds|it takes more than 1,024 MB of memory"):
        rendered(template, {})
    assert goes_on()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10**8) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | length + 'one' }}", "unsupported operand type"),
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    ],
)
def test_what_fails_says_why(template, said):
    with pytest.raises(ValueError, match=said):
        rendered(template, {"messages": []})
    assert goes_on()


def test_its_process_may_end_and_threads_share_it():
    assert goes_on()
    os.kill(chat_template._running[0].pid, signal.SIGKILL)
    chat_template._running[0].wait()
    assert goes_on()
    os.kill(chat_template._running[0].pid, signal.SIGSTOP)  # it has the question, and ends before the answer
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rendered, GOES_ON, {})
        while not chat_template._turn.locked():
            time.sleep(0.01)
        time.sleep(0.2)  # from the lock to the question
        os.kill(chat_template._running[0].pid, signal.SIGSEGV)
        os.kill(chat_template._running[0].pid, signal.SIGCONT)
        with pytest.raises(ValueError, match=r"its process ends with status -11"):
            waiting.result()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: rendered("{{ x }}", {"x": i}), range(200))) == [str(i) for i in range(200)]


def test_no_process_is_a_sentence(monkeypatch):
    chat_template._end()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match=r"chat template: /nowhere/python cannot be started \(No such file or directory\), expected"):
        rendered("x", {})


def test_nothing_is_left_when_this_process_ends():
    code = "from flashhead_edge.checkpoint import chat_template as c; print(c.rendered('{{ 1 }}', {}), c._running[0].pid)"
    said = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    text, pid = said.stdout.split()
    assert (text, said.stderr) == ("1", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_its_process_ends_with_its_input_whoever_held_it():
    command = [sys.executable, "-c", chat_template.MAIN, "1", "1024", *sys.path]
    asked = json.dumps({"template": "{{ x }}", "context": {"x": 3}}) + "\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == {"text": "3"}
