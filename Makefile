# make demo   the whole road on synthetic mammograms        make test    what CI runs
# make check  lint, types and tests with coverage           make install only the environment
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: install demo tools test ruff format types lint check clean

$(BIN)/vitmodel: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# timm, which the tests compare our ViT with, requires torchvision, whose wheel breaks a CPU torch. It is installed without its
# dependencies (the others are ours as well), and benchmarks/torchvision_stub.py stands in for torchvision.
PEERS := timm

$(VENV)/dev: $(BIN)/vitmodel Makefile
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(PEERS)
	touch $@

install: $(BIN)/vitmodel

demo: install
	$(BIN)/vitmodel demo

# dciodvfy checks the DICOM files that we write; without it (and without root to install it) that test skips and says so
tools:
	@command -v dciodvfy >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq dicom3tools >/dev/null; } || echo "dciodvfy is not installed: its test will skip"

test: $(VENV)/dev tools
	$(BIN)/python -m pytest

ruff: $(VENV)/dev
	$(BIN)/ruff check .

format: $(VENV)/dev
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy vitmodel

lint: ruff format types

check: lint
	$(BIN)/python -m pytest --cov=vitmodel --cov-report=term-missing:skip-covered

clean:
	rm -rf $(VENV) demo
