# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python 3.11 or newer, gcc and cmake; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo
HEADERS := build/tensorrt-headers
MODELS := .models
# Tests run in processes of one thread each: two of them are done in half the time that two threads take. Each begins with
# its half of the files, since a file's tests share what its fixtures make; who is done first takes from the other.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: help setup demo test test-slow lint types examples models kernels check-kernels engine-example clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(READY)  ## install deltaweave and its tools into .venv

# TensorRT's public headers, for the plugin: a package that has them, unpacked and never committed.
$(HEADERS)/include/NvInferRuntime.h:
	@mkdir -p $(HEADERS)
	@if $(PYTHON) -m pip download --quiet --retries 5 --no-deps --dest $(HEADERS) kernel-lens==2.0.1; then \
	  $(PYTHON) -m zipfile -e $(HEADERS)/*.whl $(HEADERS) && ln -sfn kernel_lens/include/tensorrt $(HEADERS)/include; \
	else echo "TensorRT's headers cannot be had (above): its plugin is not built"; fi

$(READY): pyproject.toml constraints.txt CMakeLists.txt | $(HEADERS)/include/NvInferRuntime.h
	@$(PYTHON) -c 'import sys; sys.exit("deltaweave needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@TENSORRT_ROOT=$(CURDIR)/$(HEADERS) $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[test,lint,tensorrt]'
	@touch $(READY)

demo: $(READY)  ## train a pair, compress it, compare, and write demo/report.html (five minutes)
	@$(BIN)/python examples/demo/run.py --folder $(DEMO)

test: $(READY)  ## the fast tests, in two processes (WORKERS=8 for more)
	@$(PYTEST)

test-slow: $(READY)  ## the slow CPU tests
	@$(PYTEST) -m slow

models: $(READY)  ## fetch the real models that `pytest -m realmodel` needs (166 MB)
	@$(BIN)/python tests/fetch_models.py $(MODELS)

examples: $(READY)  ## run the examples
	@for script in $(filter-out examples/tiny_models.py,$(wildcard examples/*.py)); do echo "$$script" && $(BIN)/python $$script || exit 1; done

lint: $(READY)  ## style and spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror cuda/src/* cuda/include/* tests/cuda/emulation/* runtime_plugin/trt/plugin/*.h runtime_plugin/trt/plugin/*.cc examples/engine_cpp/*.cc
	@$(BIN)/codespell

# mypy knows packages by their path, so the rooms are shown to it where they live inside the package.
types: $(READY)  ## types
	@rm -rf build/types && mkdir -p build/types/deltaweave
	@ln -s $(CURDIR)/deltaweave/* build/types/deltaweave/
	@for room in formats converter runtime_plugin; do ln -sfn $(CURDIR)/$$room build/types/deltaweave/$$room; done
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p deltaweave

kernels:  ## libdeltaweave with kernels for sm_80, sm_89, sm_90 and sm_120, in build/cuda (needs nvcc; minutes)
	@cmake --preset cuda && cmake --build build/cuda --parallel 2

check-kernels:  ## whether the kernels compile for every GPU, in a fifth of the time: they are not optimized
	@cmake --preset check && cmake --build build/check --parallel 2

engine-example: $(READY)  ## compile the C++ example of an engine (needs the CUDA toolkit)
	@cmake -S examples/engine_cpp -B build/engine_cpp -DTENSORRT_ROOT=$(CURDIR)/$(HEADERS) && cmake --build build/engine_cpp

clean:  ## remove everything that was made here
	rm -rf $(VENV) build $(DEMO) $(MODELS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
