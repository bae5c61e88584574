# `make train` distills the embedded digits teacher; `make train ARGS="--config my.yaml optimizer.lr=1e-5"` anything else.
# Everything runs in .venv, which is made on first use and brought up to date when the files that define it change.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# DeepSpeed builds its extensions with the `ninja` that it finds on the path. Not exported for all recipes: the one that
# makes .venv must find the interpreter outside of it.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help train test lint format clean

help:
	@echo "make train [ARGS='key=value ...']   distill the embedded digits teacher, or what ARGS says"
	@echo "make test [ARGS='tests/rl -k name'] lint, then the tests, or some of them; ARGS='-n 8' on 8 cores"
	@echo "make lint | format                  check | rewrite the code's format"
	@echo "make clean                          remove the environment, build outputs and caches (runs are kept)"
	@echo "PYTHON=python3.12 chooses the interpreter (3.10 to 3.12)"

train: $(STAMP)
	$(IN_VENV) deepspeed engine/train.py $(ARGS)

# Two processes of one thread each, which take a file of tests in turn. The files stay in order: by default xdist starts
# with those of many tests, and would end with the one test of the interpreter, which takes minutes.
test: lint
	$(IN_VENV) OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "PYTHON=$(PYTHON) is missing or $$($(PYTHON) -V 2>&1); the engine needs Python 3.10 to 3.12:" \
			"make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --upgrade setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
