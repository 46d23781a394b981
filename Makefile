# Every target does its own set-up: a virtual environment with the pinned versions, made once and remade
# only when pyproject.toml or constraints.txt change.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
comma := ,
# TensorRT for RTX has wheels only where this is true; everything else installs anywhere.
EXTRAS := dev$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)tensorrt-rtx)
WORKERS ?= 2
# One thread per worker: the tests' tensors are small, and two thread pools on two cores only fight.
# A worker that died is not replaced: pytest-xdist 3.8 then waits for ever at the end, where it could say which test it was.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=60 -n $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help install demo docs test run-tests test-fast bench-gpu lint format clean

help:
	@echo "make demo       calibrate, export and validate the packaged network, on the CPU; ends with the report's path"
	@echo "make test       lint, type check and every test"
	@echo "make test-fast  the tests that are not marked slow"
	@echo "make bench-gpu  the tests and benchmarks that want a GPU, in ten minutes; results in runs/bench-gpu"
	@echo "make docs       the documents as a site in site/; every link is checked"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff lay the code out"
	@echo "make clean      remove the virtual environment and caches"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with the venv module found: set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/ospq-export demo

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

# The type check keeps one core busy for a minute: it runs beside the first tests.
test: $(STAMP)
	+$(MAKE) --no-print-directory -j2 lint run-tests

run-tests: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
