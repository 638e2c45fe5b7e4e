# make demo and make test need Python 3.11+ and a network to the package index, nothing else.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
BOOTSTRAP := $(PYTHON) scripts/bootstrap.py --venv $(VENV)

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test test-slow test-mobile test-real lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## compress a small model and show what it gained (out/demo/report.html)
	$(VENV)/bin/deploykit compress --recipe examples/fashion_mnist/demo.yaml -o out/demo --overwrite

test: lint ## lint, types and the fast tests
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto -m "not slow and not mobile and not realdata"

test-slow: setup-test ## the tests that take minutes
	$(RUN) pytest -m "slow and not mobile"

test-mobile: setup-test ## the tests of mobile runtimes whose environments are there
	$(RUN) pytest -m mobile

test-real: setup-test ## the tests on real images and weights (DEPLOYKIT_REAL_DATA=folder)
	@test -d "$(DEPLOYKIT_REAL_DATA)" || { \
	  echo "make test-real: set DEPLOYKIT_REAL_DATA to the folder with the real data"; exit 1; }
	$(RUN) pytest -m realdata

lint: setup-test ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/python scripts/typecheck.py

format: setup-test ## let ruff mend what it can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean: ## remove what was built (the environment stays: rm -r .venv)
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup:
	@$(BOOTSTRAP)

setup-test:
	@$(BOOTSTRAP) --extra test
