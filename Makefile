# Targets for newcomers: `make quickstart` and `make test`. Both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --durations=40
READY := $(VENV)/.ready

.PHONY: quickstart test test-all quick-test check lint mypy pyright clean

quickstart: $(READY)  ## the whole workflow on installed text, in a few minutes
	$(BIN)/expertctl quickstart quickstart

test: $(READY)  ## all tests but the long ones, and those of a federation's processes and of every model family
	$(PYTEST) -m "not federation and not families and not clusters and not long"

test-all: test  ## and those; the federation tests, which start Flower's processes, last and one after the other
	$(PYTEST) -m "families or clusters or long"
	$(BIN)/python -m pytest -m federation

quick-test: $(READY)
	$(PYTEST) -m "not slow"

check: lint mypy pyright  ## formatting, lint and types

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mypy pyright: $(READY)
	$(BIN)/$@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info quickstart
