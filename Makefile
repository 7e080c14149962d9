# make demo      the whole road on synthetic mammograms     make install    only the environment
# make quick     unit tests, under a minute                 make test       all tests but the slow ones, five minutes on 2 cores
# make test-all  the slow ones, too                         make lint       ruff and mypy
# make check     lint, and all tests with coverage
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: install demo tools test test-slow test-all quick lint check clean

$(BIN)/vitmodel: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(BIN)/vitmodel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(BIN)/vitmodel

demo: install
	$(BIN)/vitmodel demo

# dciodvfy checks the DICOM files that we write; without it (and without root to install it) that test skips and says so
tools:
	@command -v dciodvfy >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq dicom3tools >/dev/null; } || echo "dciodvfy is not installed: its test will skip"

test: $(VENV)/dev tools
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/dev tools
	$(PYTEST) -m slow

test-all: $(VENV)/dev tools
	$(PYTEST)

quick: $(VENV)/dev
	$(PYTEST) -m "not slow and not integration"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vitmodel

check: lint tools
	$(PYTEST) --cov=vitmodel --cov-report=term-missing:skip-covered

clean:
	rm -rf $(VENV) demo
