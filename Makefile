# Two commands: `make demo` shows what loraloom does, `make test` proves it. Both start from python3 and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := loraloom-demo
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test format benchmarks clean

help: ## Say what can be made
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.demo ## Install, then train, merge and measure on a small real model; prints where report.html lies
	$(BIN)/loraloom demo --output $(DEMO)

test: $(VENV)/.dev ## Install what the checks need, then run ruff, mypy --strict and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

format: $(VENV)/.dev ## Put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.dev ## Print the ratios of benchmarks/
	$(BIN)/python benchmarks/statistics_cost.py
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/fuse.py

clean: ## Remove the environment; studies and demo output stay
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "loraloom needs Python 3.10 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing loraloom with its demo into $(VENV): some minutes the first time"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing loraloom with its checks into $(VENV): some minutes the first time"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo
