# Two commands: `make demo` shows what loraloom does, `make test` proves it. Both start from python3 and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := loraloom-demo
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TOOLS := $(VENV)/tools

.DEFAULT_GOAL := help
.PHONY: help demo test docs fuzz format benchmarks lock sbom licences clean

help: ## Say what can be made
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.installed ## Install, then train, merge and measure on a small real model; prints where report.html lies
	$(BIN)/loraloom demo --output $(DEMO)

test: $(VENV)/.installed ## Install what the checks need, then run ruff, mypy --strict and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.installed ## Build the site out of docs/ and the code into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

fuzz: $(VENV)/.installed ## Try a hundred thousand malformed inputs, an hour at most, and print what became of them
	LORALOOM_FUZZ=50 timeout 3600 $(BIN)/pytest tests/fuzz

format: $(VENV)/.installed ## Put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed ## Print every ratio of benchmarks/: hours; what needs a GPU or other checkouts says so and skips
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

lock: $(TOOLS)/.installed ## Write requirements.lock anew from constraints.txt: versions with the hashes of every file
	grep -v '^torch==' constraints.txt | $(TOOLS)/bin/uv pip compile - --quiet --no-deps --universal --python-version 3.10 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" -o requirements.lock

sbom: $(VENV)/.installed $(TOOLS)/.installed ## Write sbom.json: what is installed, as CycloneDX
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(BIN)/python

licences: $(VENV)/.installed $(TOOLS)/.installed ## Write docs/licences.md: the licence of every package that is installed
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --format markdown --with-urls --ignore-packages loraloom \
		> docs/licences.md

clean: ## Remove the environment; studies and demo output stay
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "loraloom needs Python 3.10 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Every package but torch is checked against the hashes of requirements.lock. torch is not: its CPU and CUDA builds differ
# by machine and index, and the CUDA build brings packages that the CPU build must not, so no one list of hashes fits both.
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt requirements.lock
	@echo "installing loraloom with its demo and checks into $(VENV): some minutes the first time"
	$(INSTALL) --no-deps --require-hashes -r requirements.lock
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0 pip-licenses==5.5.5
	@touch $@
