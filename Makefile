# Every target does all of its own set-up; see tools/setup_environment.py.
#   make demo PYTHON=python3.12      another Python
#   make demo ARGS="--json"          arguments for the command
#   make test ARGS="tests/core -k jsonl"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SET_UP := $(PYTHON) tools/setup_environment.py

# One thread for each process: two on a busy machine are several times slower than one (docs/decisions/004).
export OMP_NUM_THREADS ?= 1
# The version is pinned; pyright need not look for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format test-slow test-trl test-frameworks test-browser test-gpu benchmark-trl clean python

help:
	@echo 'make demo           train, compare and report on the bundled model and data (minutes, no network after set-up)'
	@echo 'make test           lint and tests (minutes)'
	@echo 'make lint           ruff, pyright, import-linter'
	@echo 'make format         let ruff rewrite the code in place'
	@echo 'make test-trl       our numbers against TRL, in its own environment'
	@echo 'make test-frameworks  LLaMA-Factory, Axolotl and Unsloth for real (nightly: installs 9 GB)'
	@echo 'make test-browser   open the report in Chromium'
	@echo 'make test-slow      tests of the benchmarks, and long ones'
	@echo 'make test-gpu       tests that need an NVIDIA GPU'
	@echo 'make benchmark-trl  CPU training speed against TRL'
	@echo 'make clean          remove environments and caches; runs stay'

# Said here and not in Python, because an old Python cannot even read the set-up script.
python:
	@command -v $(PYTHON) >/dev/null || \
	    { echo 'set-up: there is no $(PYTHON). Install Python 3.11 or newer, or add PYTHON=NAME' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 7))' || \
	    { echo 'set-up: $(PYTHON) is too old. Tunesmith needs 3.11 or newer: add PYTHON=python3.11' >&2; exit 2; }

demo: python
	@$(SET_UP) runtime
	@$(BIN)/tunesmith demo $(ARGS)

# Tests run although lint fails, so that one run shows both.
test: python
	@$(SET_UP) dev
	@lint=0; $(MAKE) --no-print-directory run-lint || lint=1; \
	    $(BIN)/python -m pytest -n 2 -m 'not gpu and not trl and not frameworks and not browser and not slow' $(ARGS) || exit 1; \
	    if [ $$lint = 1 ]; then echo 'make test: the tests passed, lint did not (above)' >&2; exit 1; fi

lint: python
	@$(SET_UP) dev
	@$(MAKE) --no-print-directory run-lint

.PHONY: run-lint
run-lint:
	@failed=''; \
	$(BIN)/ruff check . || failed="$$failed ruff-check"; \
	$(BIN)/ruff format --check . || failed="$$failed ruff-format"; \
	$(BIN)/pyright --project . || failed="$$failed pyright"; \
	$(BIN)/lint-imports --no-cache || failed="$$failed lint-imports"; \
	if [ -n "$$failed" ]; then echo "lint: failed:$$failed" >&2; exit 1; fi

format: python
	@$(SET_UP) dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# The benchmarks' harnesses, and a few long trainings.
test-slow: python
	@$(SET_UP) dev
	@$(BIN)/python -m pytest -n 2 -m 'slow and not gpu and not trl and not frameworks and not browser' $(ARGS)

test-trl: python
	@$(SET_UP) dev
	@$(SET_UP) trl
	@$(BIN)/python -m pytest -m trl $(ARGS)

# Each in its own environment, below this folder and not the user's.
test-frameworks: export TUNESMITH_HOME = $(CURDIR)/.frameworks
test-frameworks: python
	@$(SET_UP) dev
	@for name in llamafactory axolotl unsloth; do $(BIN)/tunesmith frameworks install $$name || exit 1; done
	@$(BIN)/python -m pytest -m frameworks $(ARGS)

test-browser: python
	@$(SET_UP) dev
	@$(BIN)/python -m pytest -m browser $(ARGS)

test-gpu: python
	@$(SET_UP) dev
	@$(BIN)/python -m pytest -m gpu -W default $(ARGS)

benchmark-trl: python
	@$(SET_UP) runtime
	@$(SET_UP) trl
	@$(BIN)/python benchmarks/cpu_vs_trl.py $(ARGS)

clean:
	rm -rf .venv .venv-trl .frameworks .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
