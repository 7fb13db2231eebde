# Everything runs in .venv, which the first target that needs it makes.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
TRACES ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench experiments docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything that demo, test and check need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "HyperFlexis needs Python 3.11 or later, and $(PYTHON) is older: run make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,report,dev]'
	@touch $@

demo: setup  ## two real engines, four tasks, every request with a promise: HyperFlexis against round robin
	$(BIN)/hyperflexis demo $(ARGS)

test: setup  ## all tests; what was skipped is listed with its reason
	$(BIN)/python -m pytest -q -rs $(ARGS)

check: setup  ## lint, format, types, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py
	$(BIN)/python docs/generate.py --check

bench: setup  ## the benchmarks under benchmarks/, each writing JSON under benchmarks/results/
	@for file in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

experiments: setup  ## the claims of docs/experiments.md, measured anew: hours; TRACES=DIR with the data
	$(BIN)/python -m benchmarks.experiments $(if $(TRACES),--traces $(TRACES)) $(ARGS)

docs: setup  ## write the generated parts of docs/ anew
	$(BIN)/hyperflexis config-docs > docs/configuration.md
	$(BIN)/python docs/generate.py

clean:  ## remove caches and run-time state, not .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo-report
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
