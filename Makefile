# The one interface to the project: `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find runtime deployments clients -type f -not -name '*.pyc' 2>/dev/null)
PACKAGES := runtime deployments clients

# pip says nothing for a minute while it fetches torch: let its own progress show.
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The load generator of the tests has demands of its own on packages that pimoe uses too. Its environment lies in
# front of ours, so that it finds torch and transformers there and brings only what is missing or must differ.
LOAD := $(VENV)/load_generator

.PHONY: help install demo serve test rivals wrk check format bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Make the environment in .venv, or bring it up to date

# Two stamps: dependencies are fetched once and again only when their list changes; the package itself is
# reinstalled, in a second or two, whenever a source file is newer.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pimoe needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@echo "Making the environment in $(VENV) (torch and Ray are a few hundred megabytes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet 'setuptools>=77' wheel -c constraints.txt
	@$(PIP) install --progress-bar on 'torch' -c constraints.txt 2>&1 | sed -u -n '/Collecting\|Downloading\|Installing\|ERROR/p'; \
	  exit $${PIPESTATUS[0]}
	@$(PIP) install --progress-bar on '.[server,dev]' -c constraints.txt 2>&1 \
	  | sed -u -n '/Installing\|ERROR\|Successfully/{s/\(.\{110\}\).*/\1 .../;p}'; exit $${PIPESTATUS[0]}
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	@echo "Installing pimoe into $(VENV) ..."
	@rm -rf build
	@$(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall .
	@rm -rf build pimoe.egg-info
	@touch $@

demo: install  ## Start the embedded model in two expert groups, ask it, and stop
	@$(BIN)/pimoe demo $(ARGS)

serve: install  ## Serve the embedded model, or ARGS="FOLDER --groups 4", until Ctrl-C
	@$(BIN)/pimoe serve $(ARGS)

$(LOAD)/.installed: constraints.txt | $(VENV)/.installed
	@echo "Installing the load generator of the tests into $(LOAD) ..."
	@rm -rf $(LOAD) && $(BIN)/python -m venv $(LOAD)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(LOAD)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pimoe.pth"
	@{ $(LOAD)/bin/python -m pip --disable-pip-version-check install --quiet guidellm -c constraints.txt && touch $@; } \
	  || { rm -rf $(LOAD); echo "guidellm could not be installed: its test will be skipped"; }

test: install $(LOAD)/.installed  ## Run the tests against the installed package
	@$(BIN)/python -m pytest $(ARGS)

# What pimoe is measured against, each in front of ours in the same way. Triton is apart: it wants an older numpy.
# What cannot be installed is said, and skipped by the benchmarks; no mark remains, so that the next run tries again.
RIVALS := $(VENV)/rivals
TRITON := $(VENV)/rivals_triton
LLAMA := $(VENV)/llama

# $(call beside,FOLDER,EXTRA,CONSTRAINTS): an environment that looks into ours after its own, with the packages of
# an extra. Of the extra, not with it: pimoe itself is there already.
EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])
define beside
@echo "Installing the $(2) into $(1) ..."
@rm -rf $(1) && $(BIN)/python -m venv $(1)
@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pimoe.pth"
@{ $(1)/bin/python -m pip --disable-pip-version-check install --quiet -c $(3) \
    $$($(BIN)/python -c '$(call EXTRA,$(2))') 2> $(1)/pip.log && touch $(1)/.installed; } \
  || { reason="$$(grep -m1 ERROR $(1)/pip.log)"; rm -rf $(1); echo "skipped: $(2): $$reason"; }
endef

rivals: $(RIVALS)/.installed $(TRITON)/.installed $(LLAMA)/.installed  ## Install what bench compares with

$(RIVALS)/.installed: constraints.txt | $(VENV)/.installed
	$(call beside,$(RIVALS),rivals,constraints.txt)

$(TRITON)/.installed: constraints.txt | $(VENV)/.installed
	@grep -v '^\(numpy\|tritonclient\)==' constraints.txt > $(VENV)/constraints_triton.txt
	$(call beside,$(TRITON),triton,$(VENV)/constraints_triton.txt)

# Built from source, for the instructions that this processor has; that takes minutes, so not at every change.
$(LLAMA)/.installed: | $(VENV)/.installed
	$(call beside,$(LLAMA),llama,constraints.txt)

# The load generator of compare_serving, which has a slower one of its own for where this is missing.
wrk:
	@command -v wrk > /dev/null || \
	  { [ "$$(id -u)" = 0 ] && { apt-get update -qq && apt-get install -y -qq wrk; } > /dev/null 2>&1; } || \
	  echo "wrk is not installed and could not be (Debian: apt-get install wrk): the closed loop will be our own"

# Without the test of packaging that installs, which takes a minute: `make test` has it.
check: install .types/pimoe  ## Lint, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@MYPYPATH=.types $(BIN)/mypy $(addprefix .types/pimoe/,$(PACKAGES))
	@$(BIN)/python -m pytest -q tests/test_layers.py tests/test_packaging.py -k 'not installs'

# mypy reads the packages under their import names through this link; given as files, since `-p` would find the
# installed copy instead.
.types/pimoe:
	@mkdir -p .types && ln -sfn .. $@

format: install  ## Sort imports and format the code
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: install $(if $(BENCH)$(findstring tiny,$(ARGS)),,rivals wrk)  ## Run all benchmarks and write load_tests/RESULTS.md, or BENCH=NAME, one of them
	@$(if $(BENCH),set -e; for name in $(BENCH); do $(BIN)/python load_tests/$$name.py $(ARGS); done,\
	  $(BIN)/python load_tests/bench.py $(ARGS))

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
