# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python 3.11 or newer, gcc and cmake; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready

.PHONY: help setup demo test test-slow lint clean models

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## install deltaweave and its tools into .venv

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt
	@$(PYTHON) -c 'import sys; sys.exit("deltaweave needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $(STAMP)
