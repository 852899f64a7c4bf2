# make run    the demo: installs what it needs into .venv and runs `sdecontrol demo`
# make test   ruff, pyright and the default tests;  make test-slow  the longer statistical ones;
#             make test-shapes  some of the default tests with the shapes in all signatures checked at every call
# make docs   the site, in site/; a warning is an error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2

# One thread per process: more are slower here (small matrices), and far slower beside other work.
export OMP_NUM_THREADS := 1

.PHONY: run test test-slow test-shapes docs clean

run: $(VENV)/.installed
	$(BIN)/sdecontrol demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS)

# the rooms whose signatures name shapes, by tests that run through all of them
SHAPES := tests/house/test_shapes.py tests/chains tests/paths tests/exact/test_exact_mixtures.py

test-shapes: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --shapes $(SHAPES)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdecontrol needs Python >= 3.11; run: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (once; a few minutes, most of it torch) ..."
	$(PIP) install --constraint constraints.txt --editable '.[examples]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (once; a few minutes, most of it torch) ..."
	$(PIP) install --constraint constraints.txt --editable '.[dev,examples]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) output build site sdecontrol.egg-info
