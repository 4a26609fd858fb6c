# `make help` lists what there is to do. Everything runs in .venv, which the first target makes.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TODAY := $(shell date -u +%F)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Kept outside of the clone under the hash of its lock, where rollout.python=null finds it.
SGLANG_ENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lpexp/envs/sglang-$(shell sha256sum requirements-sglang.lock | cut -c 1-12)

# One OpenMP thread a process: processes that each spin two threads on two cores are many times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-gpu test-sglang sglang-env check format evidence benchmark clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## make the environment and watch a policy learn, two minutes on two cores
	$(BIN)/python launch.py

test: $(VENV)/.installed-extras ## the main tests, at most 15 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu: $(VENV)/.installed ## the tests that need a CUDA card; fails where there is none
	$(BIN)/python -m pytest -m gpu

test-sglang: $(VENV)/.installed-extras $(SGLANG_ENV)/.installed ## the tests that drive a real SGLang server on this machine's cores
	$(BIN)/python -m pytest -m sglang

sglang-env: $(SGLANG_ENV)/.installed ## SGLang's own environment: 11 GB in the cache, built once a lock
	@echo $(SGLANG_ENV)/bin/python

check: $(VENV)/.installed-extras ## ruff, pyright, and the layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed ## let ruff mend what it can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

evidence: $(VENV)/.installed-bench ## what takes an hour: learning over seeds, mixed and matched pairs, benchmarks
	$(BIN)/python benchmarks/evidence.py

benchmark: $(VENV)/.installed-bench ## lpexp beside TRL and transformers; results go to docs/results/
	$(BIN)/python benchmarks/vs_trl.py --check --out docs/results/$(TODAY)-vs_trl.md
	$(BIN)/python benchmarks/rollout.py --out docs/results/$(TODAY)-rollout.md

clean: ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lpexp needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(SGLANG_ENV)/.installed:
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-sglang.lock
	touch $@

$(VENV)/.installed-extras: $(VENV)/.installed requirements-extras.lock
	$(PIP) install --quiet -r requirements-extras.lock
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed requirements-bench.lock
	$(PIP) install --quiet -r requirements-bench.lock
	touch $@
