# `make demo`, `make test` and `make test-all` need git, make and Python 3.11 or newer. Everything
# else goes into .venv here.
# `make demo PYTHON=/path/to/python3.12` chooses the Python.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-all setup format lint aot results docs clean

# The two runs share the cores, one device each.
RUN := $(BIN)/fedhelp train --config=configs/quickstart.py --config.mapping.cpu_devices=1
demo: .venv/.core
	@mkdir -p $(DEMO)
	@$(RUN) --workdir=$(DEMO)/local --config.algorithm.name=local > $(DEMO)/local.log 2>&1 & \
	local=$$!; trap "kill $$local 2>/dev/null" EXIT; \
	$(RUN) --workdir=$(DEMO)/fedhelp && wait $$local || { cat $(DEMO)/local.log; exit 1; }
	$(BIN)/fedhelp show $(DEMO)/fedhelp $(DEMO)/local
	$(BIN)/fedhelp report $(DEMO)/fedhelp $(DEMO)/local --out=$(DEMO)

# A file of tests at a time on each core, since tests of one file share what they compile.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

test: setup
	$(PYTEST) --long=none $(PYTEST_ARGS)

test-all: setup
	$(PYTEST) $(PYTEST_ARGS)

setup: .venv/.dev

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Compiles for an H100 and TPU v5e chips, neither of which has to be there.
aot: .aot/.installed
	.aot/bin/python -m benchmarks.aot

# The tables of docs/results.md, from the summaries of studies in docs/results.
results: setup
	$(BIN)/python -m benchmarks.results

# The documentation site. A broken link or a block of code that fails is an error.
docs: .venv/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs/html
	@echo "written: build/docs/html/index.html"

clean:
	rm -rf .venv .aot dist build $(DEMO)

# A stamp is written only after its installation went through; pyproject.toml makes it stale.
.venv/.core: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/.docs: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

.aot/.installed: pyproject.toml
	$(PYTHON) -m venv .aot
	.aot/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cuda12,tpu]'
	touch $@
