# The commands of this repository; CI runs the same ones. A target that needs the environment makes it first.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PYTHON ?= python3
# What the environment was last made for, else cpu: `make test` after `make setup ACCELERATOR=cuda` keeps CUDA.
ACCELERATOR ?= $(or $(shell cat $(VENV)/accelerator 2>/dev/null),cpu)
DEMO ?= demo
ROWS ?= 150000
WORKERS ?= 2

# Exists only after a complete setup; older than the requirements, pyproject.toml or what setup.py builds, it is out of date.
INSTALLED := $(VENV)/.installed-$(ACCELERATOR)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-warn-conflicts

# torchx starts `torchrun` by name.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup test check format bench demo clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo "Variables, as they stand: PYTHON=$(PYTHON) ACCELERATOR=$(ACCELERATOR) DEMO=$(DEMO) ROWS=$(ROWS) WORKERS=$(WORKERS)"

setup: $(INSTALLED) ## Make the environment in .venv (ACCELERATOR=cpu or cuda); instant when it is up to date

$(INSTALLED): requirements/$(ACCELERATOR).txt $(wildcard requirements/*.txt) pyproject.toml setup.py $(wildcard recsys/native/*.cpp recsys/native/*.h recsys/native/*.inl)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("recsys needs Python 3.11 or later, $(PYTHON) is %d.%d: use make PYTHON=python3.11" % v[:2] if v < (3, 11) else 0)'
	@echo "Making $(VENV) for $(ACCELERATOR): some minutes the first time"
	@test -e $@ || { $(PYTHON) -m venv --clear $(VENV) && echo $(ACCELERATOR) >$(VENV)/accelerator; }
	@rm -f $@
	$(PIP) -r requirements/$(ACCELERATOR).txt -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -r requirements/torchrec.txt -e .
	@touch $@

test: $(INSTALLED) ## Run the tests, files side by side on WORKERS processes
	pytest -n $(WORKERS) --dist loadfile

check: $(INSTALLED) ## Check format, lint, import order and types, then run the tests
	ruff format --check
	ruff check
	lint-imports
	mypy
	@$(MAKE) --no-print-directory test

format: $(INSTALLED) ## Format the code and mend what ruff can
	ruff format
	ruff check --fix

bench: $(INSTALLED) ## Measure training beside its floor and baselines, for half a minute; fails where a ratio is too low
	python benchmarks/throughput.py --gate benchmarks/gate.json

demo: $(INSTALLED) ## From a synthetic log to the evaluation of three merged members, on two processes
	@test ! -e "$(DEMO)" || test -e "$(DEMO)/.made-by-demo" || { echo "$(DEMO) exists and is no demo of ours: use make demo DEMO=FOLDER" >&2; exit 2; }
	rm -rf -- "$(DEMO)"
	mkdir -p "$(DEMO)" && touch "$(DEMO)/.made-by-demo"
	recsys synth --out "$(DEMO)/log.tsv.gz" --num-rows $(ROWS)
	recsys prepare criteo_kaggle "$(DEMO)/log.tsv.gz" --out "$(DEMO)/data"
	torchx run -s local_cwd launchers/train.py:ddp -j 1x2 -- \
		synthetic --data "$(DEMO)/data" --members dcnv2 wukong rankmixer --out "$(DEMO)/run"
	recsys evaluate "$(DEMO)/run" --truth "$(DEMO)/log.tsv.gz.truth.parquet"

clean: ## Remove everything that make made, .venv and the demo too
	test ! -e "$(DEMO)/.made-by-demo" || rm -rf -- "$(DEMO)"
	rm -rf -- $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
