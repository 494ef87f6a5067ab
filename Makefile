# `make` lists the commands. Each works alone, in a fresh clone, with nothing but Python (3.11 or newer), git and make.

PYTHON ?= python3
# A newer Python, if there is one, gets the newest JAX: the tests that need no PyTorch run on it too.
NEWEST ?= $(shell for python in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)

# How many tests run at once; each takes up to 2 GB of memory. make test WORKERS=4
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# What the short form runs on the newest JAX: the tests of what reaches deepest into it, but for files that spend their
# time in arithmetic.
NEWEST_TESTS ?= tests/functional tests/facade tests/devices $(addprefix tests/invariants/test_,\
	errors_while_running.py interrupts.py looking.py memory.py) $(addprefix --ignore=tests/,\
	functional/test_hyperparameters.py facade/test_clip_programs.py facade/test_muon_groups.py)

# What runs on the oldest versions that pyproject.toml allows: the tests of what reaches deepest into the neighbours.
OLDEST_TESTS ?= tests/interop tests/devices tests/facade/test_nnx_models.py tests/facade/test_models.py

BIN := .venv/bin
PYTEST := -m pytest -q -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-thorough check newest oldest lint format docs bench mutations clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo ## train on the handwritten digits and compare optimizers
	$(BIN)/python -m optimjax demo

test: ## the checks of a change, in about twelve minutes on two cores
	@echo "About twelve minutes on two cores, the installation included; 'make test-thorough' takes half an hour."
	@echo "1/3 formatting, lint and types (1 minute)"
	@$(MAKE) --no-print-directory lint
	@echo "2/3 tests and doctests (8 minutes)"
	@$(MAKE) --no-print-directory check
	@echo "3/3 what depends most on JAX, on the newest one (3 minutes)"
	@$(MAKE) --no-print-directory newest

test-thorough: ## all combinations, and programs compiled as users compile them: about half an hour
	@$(MAKE) --no-print-directory check FORM=--thorough
	@$(MAKE) --no-print-directory newest NEWEST_TESTS=
	@$(MAKE) --no-print-directory oldest

check: .venv/test
	$(BIN)/python $(PYTEST) $(FORM)

newest: $(if $(NEWEST),.venv-newest/test)
	$(if $(NEWEST),.venv-newest/bin/python $(PYTEST) $(FORM) $(NEWEST_TESTS),@echo "No Python 3.13 here: the pass on the newest JAX is left out.")

oldest: .venv-oldest/test ## the tests of neighbours, on the oldest JAX, Flax, optax and Orbax
	.venv-oldest/bin/python $(PYTEST) $(OLDEST_TESTS)

lint: .venv/test ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: .venv/test ## format, and mend what the linter can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/docs ## build the documentation, docs/_build/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

bench: .venv/test ## time a step alongside optax and PyTorch, and measure where these differ
	$(BIN)/python benchmarks/differences.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/training_step.py --seconds 10
	$(BIN)/python benchmarks/first_step.py --sets mlp resnet50
	$(BIN)/python benchmarks/sparse.py
	$(BIN)/python benchmarks/clip.py
	$(BIN)/python benchmarks/muon.py --layers 2
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/lbfgs.py

mutations: .venv/test ## break the library in 40 places and see whether the tests notice: about an hour
	$(BIN)/python tests/mutations.py

clean: ## remove the virtual environments and caches
	rm -rf .venv .venv-newest .venv-oldest docs/_build docs/algorithms.rst docs/lr_schedulers.png .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say which extras are installed; they are made again when pyproject.toml changes.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "optimjax needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # a half-made one would pass for a whole one

.venv/demo .venv/docs .venv/test: .venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

.venv-newest/test: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[test-without-torch]'
	@touch $@

# The lower bounds of what the package runs with, and of the neighbours that it is tested with. NumPy's has no build for
# Python 3.13.
.venv-oldest/test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m venv .venv-oldest
	sed -nE -e 's/^ *"(jax|jaxlib|chex|flax|safetensors|equinox|orbax-checkpoint)>=([0-9.]+)".*/\1==\2/p' \
		-e 's/^ *"numpy>=([0-9.]+)".*/numpy==\1; python_version < "3.13"/p' \
		-e 's/^interop = \["optax>=([0-9.]+)"\]/optax==\1/p' pyproject.toml > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/oldest.txt --editable '.[test-without-torch]'
	@touch $@
