# One line a target: `make help`. Each runs in the environment that deploy/environment.sh makes.
SHELL := bash
VENV  := $(or $(ERA_VENV),.venv)
BIN   := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest
# Prints the total when the recipe ends, whichever way it ends.
TIMED  = trap 'printf "make $@: %d min %02d s\n" $$((SECONDS / 60)) $$((SECONDS % 60))' EXIT; set -e;
# The folders whose tests need no vLLM: `check` runs them, `test` runs them and then the others.
QUICK := tests/unit tests/contracts
# Whose engines live in the tests' processes, 7 GB in each: they end before servers start.
ENGINES := tests/engine
# A folder that is named is looked at by pytest's first process too, which would import vLLM.
BUT_ENGINES := $(patsubst %/,--ignore=%,$(filter-out $(ENGINES)/,$(wildcard tests/*/)))
# Two processes, a file in one of them, in order: that with the longest tests comes first, as it is
# called (JOBS=1 where there is less memory than 16 GB).
JOBS   ?= 2
SHARED = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Files that ask the same servers stay in one process (tests/conftest.py).
SERVED = -n $(JOBS) --dist loadgroup --no-loadscope-reorder
# Not in `make test`; slow ones are in `make test-all`, the other two have targets of their own.
APART := not gpu and not bench

.DEFAULT_GOAL := help
.PHONY: help env check test test-all test-gpu demo bench loadtest soak bodies serve clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

ifeq ($(shell uname -s),Linux)

env:  ## make or update the virtual environment (.venv, or $ERA_VENV)
	@deploy/environment.sh

check:  ## ruff, pyright, import-linter and the tests that start no engine (five minutes)
	@$(TIMED) deploy/environment.sh; \
	$(BIN)/ruff check . ; \
	$(BIN)/ruff format --check . ; \
	$(BIN)/pyright --pythonpath $(BIN)/python ; \
	$(BIN)/lint-imports --no-logo ; \
	$(PYTEST) $(SHARED) $(QUICK) -m "$(APART) and not slow"

test:  ## check, then the other tests that a CPU runs in time (25 minutes, 16 GB; JOBS=1: 9 GB)
	@$(TIMED) $(MAKE) --no-print-directory check ; \
	$(PYTEST) $(SHARED) tests $(BUT_ENGINES) -m "$(APART) and not slow" ; \
	$(PYTEST) $(SERVED) tests $(QUICK:%=--ignore=%) --ignore=$(ENGINES) -m "$(APART) and not slow"

test-all:  ## test, then the slow tests
	@$(TIMED) $(MAKE) --no-print-directory test ; \
	$(PYTEST) $(SHARED) tests $(BUT_ENGINES) -m "$(APART) and slow" ; \
	$(PYTEST) $(SERVED) tests --ignore=$(ENGINES) -m "$(APART) and slow"

test-gpu: env  ## the tests that need an NVIDIA GPU and a CUDA vLLM
	@$(TIMED) $(PYTEST) tests -m gpu

demo:  ## questions about pictures, pruned against unpruned, then the speed (FAST=1: no speed)
	@$(TIMED) deploy/environment.sh; $(BIN)/era-vllm demo $(if $(FAST),--fast)

bench: env  ## what pruning costs and saves here; figures in out/ (ARGS="--rounds 3 ...")
	@$(TIMED) $(PYTEST) tests/bench -m bench ; \
	for what in reducer segments attention serve gap; do $(BIN)/era-vllm bench $$what $(ARGS) ; done

loadtest: env  ## a server at every level, under growing load; plot in out/ (ARGS="--model 0.9b ...")
	@$(TIMED) $(BIN)/python deploy/loadtest/run.py $(ARGS)

bodies: env  ## what one body can do: gaps of /health, memory; report in out/ (ARGS="--cases 300 ...")
	@$(TIMED) $(BIN)/python deploy/loadtest/bodies.py $(ARGS)

soak: env  ## ten minutes above capacity, then kill -9; report in out/ (ARGS="--seconds 60 ...")
	@$(TIMED) $(BIN)/python deploy/loadtest/soak.py $(ARGS)

serve: env  ## the OpenAI server with the small model (ARGS="MODEL --era-pruning-rate .9 ...")
	@$(BIN)/era-vllm serve $(ARGS)

else

# vLLM has no CPU wheel for this platform: the same targets, in a Linux container.
check test demo:
	@FAST=$(FAST) JOBS=$(JOBS) deploy/in_container.sh $@

env test-all test-gpu bench loadtest bodies soak serve:
	@echo "make $@: runs on Linux, this is $$(uname -s); here: make check, test or demo (in a" \
	  "container), and the server as an image (the head of Dockerfile)" >&2; exit 2

endif

clean:  ## remove .venv and what tests and builds leave
	@rm -rf .venv build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
