# Needs git, make and Python 3.11 to 3.13; every target sets up .venv by itself, and again only when
# requirements.txt changes. PYTHON=/path/to/python3.12 picks another interpreter for a new .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

PYTHON ?= python3
UV_VERSION := 0.13.9
ENV_PYTHON := $(CURDIR)/.venv/bin/python
READY := .venv/.requirements-installed
BENCH ?= iteration evaluation head_training svm_head data augmentation explain
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help demo test scripts torture lint format bench bench-peers check-gpu
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## meta-train, meta-test and cross-test CxGrad on built-in data; GPU=0 runs it on a GPU
	@PYTHON="$(ENV_PYTHON)" bash experiment_scripts/demo.sh "$(or $(GPU),cpu)"

# One thread a worker: two processes of one thread each are faster on two cores than one process of two.
test: $(READY) ## run every test, print the coverage; ARGS="tests/test_data.py -k sampler" runs some, prints none
	OMP_NUM_THREADS=1 "$(ENV_PYTHON)" -m pytest -n auto --maxprocesses 8 --dist worksteal $(or $(ARGS),--cov=.)

scripts: $(READY) ## run every experiment script dry; ARGS="CUB resnet12" those that have both words in their names
	OMP_NUM_THREADS=1 "$(ENV_PYTHON)" -m tests.every_script $(ARGS)

torture: $(READY) ## kill, fill, damage and disturb everything, and count; ARGS="--only kills --seed 7"
	OMP_NUM_THREADS=1 "$(ENV_PYTHON)" -m tests.torture $(ARGS)
	OMP_NUM_THREADS=1 "$(ENV_PYTHON)" -m tests.fuzzing

lint: $(READY) ## check style, formatting and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	"$(ENV_PYTHON)" -m mypy

format: $(READY) ## put the code into the checked format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# A benchmark that fails does not keep the others from running; make then fails at the end.
bench: $(READY) ## run the benchmarks and print their tables; BENCH=iteration ARGS="--size 32" runs one
	@failed=
	for name in $(BENCH); do
	    echo "== $$name"
	    "$(ENV_PYTHON)" "benchmarks/$$name.py" $(ARGS) || failed="$$failed $$name"
	done
	[[ -z $$failed ]] || { echo "make: failed:$$failed" >&2; exit 1; }

bench-peers: $(READY)
	"$(ENV_PYTHON)" benchmarks/peers.py

check-gpu: $(READY) ## check the first GPU, or else the CPU; ARGS="--only parity waits" checks part of it
	"$(ENV_PYTHON)" benchmarks/check_gpu.py $(ARGS)

$(READY): requirements.txt
	@stop() { echo "make: $$1" >&2; exit 1; }
	if [[ ! -e .venv/bin/python && ! -L .venv/bin/python ]]; then
	    command -v "$(PYTHON)" >/dev/null || stop "no $(PYTHON) here; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12 …"
	    "$(PYTHON)" -c '$(SUPPORTED)' || stop "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but the pinned packages need Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12 …"
	    echo "Creating .venv with $$("$(PYTHON)" --version)"
	    "$(PYTHON)" -m venv .venv
	fi
	.venv/bin/python -c '$(SUPPORTED)' || stop ".venv is broken or not of Python 3.11, 3.12 or 3.13; remove it (rm -rf .venv) and call make again"
	if ! .venv/bin/uv --version >/dev/null 2>&1; then
	    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip --upgrade
	    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	fi
	# uv links files out of its cache where the two share a disk; told to copy elsewhere, it does not warn.
	cache=$$(.venv/bin/uv cache dir)
	mkdir -p "$$cache" 2>/dev/null || { cache=$$PWD/.venv/.uv-cache; mkdir -p "$$cache"; export UV_CACHE_DIR=$$cache; }
	[[ $$(stat -c %d "$$cache") == $$(stat -c %d .venv) ]] || export UV_LINK_MODE=copy
	# Compiled beforehand, because where Python is told to write no bytecode every process would compile torch anew.
	# The mark outlives an install that was cut short; what that one left half-written is then replaced.
	again=
	[[ ! -e .venv/.installing ]] || again=--reinstall
	touch .venv/.installing
	.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode $$again -r requirements.txt
	rm .venv/.installing
	touch $@
