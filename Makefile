# SPDX-License-Identifier: Apache-2.0
# Every target does the set-up it needs; `make help` lists them.

PYTHON ?= python3.11
BIN := .venv/bin
TARGET := examples/smollm2-135m

# Two contended cores: one OpenMP thread is the fast setting for the small models of the tests, and the
# stock KV split must not depend on threads. VLLM_CPU_KVCACHE_SPACE is in whole GiB.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_KVCACHE_SPACE=1 \
	VLLM_CPU_ATTN_SPLIT_KV=0 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup target demo unit test matrix scope soak mutations bench compat lint lock format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## .venv with vLLM for CPUs and this project (Linux x86-64, Python 3.11)
	@command -v $(PYTHON) >/dev/null || { echo "set-up: this needs Python 3.11 and there is no $(PYTHON): \
	install it or name it with make PYTHON=/path/to/python3.11."; exit 1; }
	@$(PYTHON) scripts/set_up.py

target: setup ## the demo target SmolLM2-135M-Instruct, fetched and converted once
	@$(BIN)/python scripts/demo_target.py

demo: target ## hidden transfer beside no speculation on real questions, both sides eager for a quick start
	@$(BIN)/vllm-hidden-transfer demo --eager

unit: setup ## the quick unit tests: none that trains, fuzzes or starts processes
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" --durations=10 tests/unit

test: lint target ## all checks but the slow rows of the feature matrix
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not matrix and not gpu" --durations=15

matrix: target ## the whole feature matrix (slow)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu" --durations=30

scope: setup ## the scope table of docs/compatibility.md, from what the tests recorded
	$(BIN)/python -m tests.matrix.table

soak: target ## a server under load and faults for 30 minutes
	$(TEST_ENV) $(BIN)/python -m tests.soak --minutes 30

mutations: target ## plant errors; each must be caught by a named test
	$(TEST_ENV) $(BIN)/python -m tests.mutations

bench: target ## what speculation gives here by number of requests, in half an hour; run again to go on
	OMP_WAIT_POLICY=PASSIVE $(BIN)/vllm-hidden-transfer bench --requests 1 --requests 4 --requests 16 --minutes 25

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup ## write the versions of .venv down for the next set-ups
	{ sed '/^[^#]/,$$d' scripts/cpu-lock.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable \
		| grep -Ev '^(pip|vllm)=='; } > scripts/cpu-lock.new
	mv scripts/cpu-lock.new scripts/cpu-lock.txt

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and made files, but not the downloaded target's cache
	rm -rf .venv work build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

compat: setup ## what moved in vLLM 0.32.0 and 0.33.0 of all that we use of it
	@$(BIN)/python scripts/check_vllm.py 0.32.0 0.33.0
