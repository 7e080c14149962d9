# make demo   the whole road on synthetic mammograms        make test    what CI runs
# make check  lint, types and tests with coverage           make install only the environment
# make docs   the documentation site, into site/
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: install demo docs tools test check clean

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

$(VENV)/docs: $(BIN)/vitmodel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

# dciodvfy checks the DICOM files that we write; without it (and without root to install it) that test skips and says so
tools:
	@command -v dciodvfy >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq dicom3tools >/dev/null; } || echo "dciodvfy is not installed: its test will skip"

test: $(VENV)/dev tools
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vitmodel
	$(BIN)/python -m pytest --cov=vitmodel --cov-report=term-missing:skip-covered

clean:
	rm -rf $(VENV) demo site
