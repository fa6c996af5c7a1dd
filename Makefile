# Two commands do everything on a machine with Python: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo test test-slow test-long lint types imports doctest

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

demo: env
	$(BIN)/python examples/eight_schools.py --output out

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"

test-slow: env
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-long: env
	$(BIN)/python -m pytest -m long

doctest: env
	$(BIN)/python -m pytest --doctest-modules --doctest-glob='*.md' numpyro_sbtm README.md docs

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports --no-cache
