# Each target does its own set-up: all it needs is make and Python 3.10 or later, named by PYTHON.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-real test-cuda check bench bench-goals docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo "  e.g. make test ARGS='-k needle', make venv PYTHON=python3.12"

venv: $(STAMP) ## Create .venv with the package (editable) and the developers' tools

quickstart: $(STAMP) ## Run a small evaluation: built-in model, CPU, no network
	$(BIN)/kv-lm-eval quickstart $(ARGS)

# Two processes of one thread: on the tiny models of the tests, more threads are slower.
test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-real: $(STAMP) ## Run the tests on real models, which KV_REAL_MODELS=DIR names (tests/real/README.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/real $(ARGS)

test-cuda: $(STAMP) ## Run the tests of caches, engine and methods on a GPU
	KV_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 -m 'not slow and not deep' tests/cache tests/engine tests/methods $(ARGS)

check: $(STAMP) ## Check style, format, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

BENCH = $(BIN)/kv-lm-eval bench --random-weights tiny-26m --device cpu --threads 1 --warm-up 1 --repeats 2
bench: $(STAMP) ## Time all methods on this CPU, in under ten minutes; the card goes to docs/bench
	$(BENCH) --parts generation,decode,storage,prefill,memory,scoring,fidelity,shared_prefix,compiled $(ARGS)

bench-goals: $(STAMP) ## The ratios that were promised of the speed, each beside its goal, in some five minutes
	$(BENCH) --parts one_prefill,goals $(ARGS)

docs: $(STAMP) ## Build the documentation site into build/site, which opens from disk
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	$(BIN)/python scripts/docs_site.py
	$(BIN)/mkdocs build --quiet --strict

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt $(wildcard shim/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
