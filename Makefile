PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install test test-slow test-vllm test-ray lint types format demo

install:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'

test:
	$(BIN)/pytest

test-slow:
	$(BIN)/pytest -m slow

# vLLM's own environment; the options of pyproject.toml ask for plugins that it does not have.
.venv-vllm:
	PYTHON=$(PYTHON) scripts/vllm_environment.sh $@

test-vllm: .venv-vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -o addopts= -o filterwarnings=default -rA tests/vllm_engine

# Ray's own environment, likewise.
.venv-ray:
	PYTHON=$(PYTHON) scripts/ray_environment.sh $@

test-ray: .venv-ray
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -o addopts= -o filterwarnings=default -rA tests/ray_serve

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo:
	$(BIN)/specproxy generate --stats
