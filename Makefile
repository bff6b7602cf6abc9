PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install test test-slow lint types format demo

install:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'

test:
	$(BIN)/pytest

test-slow:
	$(BIN)/pytest -m slow

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
