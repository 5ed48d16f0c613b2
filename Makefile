# The project's two commands: `make demo` installs and runs the main job, `make test` runs the whole suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint mini-tofu

demo: $(VENV)/.installed
	$(BIN)/loku demo

test: $(VENV)/.test-installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real TOFU rows at small size; needs LOKU_DATA_DIR. See recipes/mini-tofu.
mini-tofu: $(VENV)/.installed
	$(BIN)/loku finetune recipes/mini-tofu/target.yaml & \
	  $(BIN)/loku finetune recipes/mini-tofu/retain-only.yaml & wait
	$(BIN)/loku unlearn recipes/mini-tofu/unlearn.yaml

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loku needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
