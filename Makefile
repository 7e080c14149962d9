# make demo      the whole pipeline on synthetic mammograms  make install    only the environment
# make quick     unit tests                                  make test       all tests but the slow and nightly ones
# make test-all  the slow ones, too                          make lint       ruff and mypy
# make check     lint, and all tests with coverage           make docs       the documentation site, into site/
# make pages     the scripts of the reading room             make viewer-package   OHIF for the node, into dist/
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: pages viewer-package test-browser install demo docs tools test test-slow test-all quick ruff format types lint check clean

$(BIN)/vitmodel: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

# timm, which the tests compare our ViT with, requires torchvision, whose wheel breaks a CPU torch. It is installed without its
# dependencies (the others are ours as well), and benchmarks/torchvision_stub.py stands in for torchvision.
PEERS := timm

$(VENV)/dev: $(BIN)/vitmodel Makefile
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(PEERS)
	touch $@

$(VENV)/docs: $(BIN)/vitmodel
	$(PIP) -e '.[docs]'
	touch $@

install: $(BIN)/vitmodel

demo: install
	$(BIN)/vitmodel demo

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

# dciodvfy checks the DICOM files that we write; without it (and without root to install it) that test skips and says so
tools:
	@command -v dciodvfy >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq dicom3tools >/dev/null; } || echo "dciodvfy is not installed: its test will skip"

# the scripts of `vitmodel view`, from dev/typescript into vitmodel/viewer/static; needs npm
pages:
	cd dev/typescript && npm install --silent --no-audit --no-fund && npm run --silent build

# the wheel of OHIF for `vitmodel node`, from npm into dist/; needs npm
viewer-package: install
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist packages/vitmodel-viewer

# tests in a browser; installs Chromium, Orthanc and DCMTK if run as root on Debian, and OHIF from npm
BROWSER_TOOLS := chromium orthanc orthanc-dicomweb dcmtk
test-browser: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	@dpkg -s $(BROWSER_TOOLS) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && apt-get install -y -qq $(BROWSER_TOOLS) >/dev/null; } || echo "not installed: some of $(BROWSER_TOOLS); tests will skip"
	@$(BIN)/pip show --quiet vitmodel-viewer 2>/dev/null \
	  || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps packages/vitmodel-viewer \
	  || echo "OHIF is not installed (needs npm); its tests will skip"
	@command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix $(VENV)/axe axe-core \
	  || echo "axe-core is not installed: its tests will skip"
	AXE_CORE=$(abspath $(VENV))/axe/node_modules/axe-core/axe.min.js $(BIN)/python -m pytest -m browser

test: $(VENV)/dev tools
	$(PYTEST) -m "not slow and not nightly and not browser"

test-slow: $(VENV)/dev tools
	$(PYTEST) -m slow

test-all: $(VENV)/dev tools
	$(PYTEST)

quick: $(VENV)/dev
	$(PYTEST) -m "not slow and not nightly and not browser and not integration"

ruff: $(VENV)/dev
	$(BIN)/ruff check .

format: $(VENV)/dev
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy vitmodel

lint: ruff format types

check: lint tools
	$(PYTEST) --cov=vitmodel --cov-report=term-missing:skip-covered

clean:
	rm -rf $(VENV) demo site
