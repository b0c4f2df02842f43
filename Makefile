.SILENT:
.ONESHELL:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: setup demo test check up down status lock clean bench
.DEFAULT_GOAL := help

# Set on some build machines: every start of Python would compile every import anew.
unexport PYTHONDONTWRITEBYTECODE
export VIRTUAL_ENV := $(CURDIR)/.venv

python := .venv/bin/python
uv_version := $(shell sed -n 's|^uv==\([^ ]*\).*|\1|p' requirements.lock)
benches := $(patsubst benchmarks/%.py,%,$(filter-out benchmarks/__init__.py benchmarks/load.py benchmarks/measure.py benchmarks/plain_%.py,$(wildcard benchmarks/*.py)))

help:
	echo "make demo    from nothing to predictions of a real model, and the URLs to look at"
	echo "make test    the whole suite, on real parts"
	echo "make check   lint, types, import rules"
	echo "make up | down | status | bench | bench-NAME | lock | clean"

setup: .venv/installed

.venv/installed: requirements.lock
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "✗ python3 is $$(python3 --version 2>&1)"; echo "Expected: Python 3.11 or newer, with venv"; exit 1; }
	test -x $(python) || python3 -m venv .venv
	.venv/bin/uv --version 2>/dev/null | grep -q ' $(uv_version) ' || $(python) -m pip install --quiet --disable-pip-version-check uv==$(uv_version)
	echo "installing what requirements.lock pins into .venv"
	.venv/bin/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	touch $@

demo: setup
	$(python) -m deployments.demo

test: setup
	$(python) -m pytest -n 2 --dist loadfile

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check --quiet
	.venv/bin/mypy
	.venv/bin/lint-imports

up down status: setup
	$(python) -m perennial $@

bench: $(addprefix bench-,$(benches))

bench-%: setup
	$(python) -m benchmarks.$*

lock:
	.venv/bin/uv pip compile pyproject.toml --all-extras --universal --generate-hashes --no-emit-index-url --no-header --quiet --python-version 3.11 --output-file requirements.lock

clean:
	! test -x $(python) || $(python) -m perennial down
	rm -rf "$${PERENNIAL_HOME:-.perennial}"
