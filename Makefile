# Two commands do everything: `make serve` and `make test`. Both set up what they need, once.
#
#   make serve ARGS="--port 8123"     pass flags on to `guanaco serve`
#   make clients ARGS="--only openai" run real clients against a demo server
#   make install CONSTRAINTS=my.txt   other versions (a CUDA build of torch, say)
#   make install TORCH_CPU="…"        another version or index of torch's CPU build

VENV        ?= .venv
PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
ARGS        ?=
# More than the server needs: make install EXTRAS=loadtest (locust and plots).
EXTRAS      ?=
WORKERS     ?= 2
# Asked for on a machine without an NVIDIA GPU: PyPI's own torch brings gigabytes of CUDA.
TORCH_CPU   ?= torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

BIN     := $(VENV)/bin
DEPS    := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard kernels/cpu/native/*)
RUNTIME := $(VENV)/.installed
TESTING := $(VENV)/.installed-test

.PHONY: serve install links test lint typecheck accept clients browser bench asan image image-gpu clean

serve: $(RUNTIME)
	exec $(BIN)/guanaco serve $(ARGS)

install: $(RUNTIME) links
	@$(if $(EXTRAS),$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]")
	@echo "== . $(VENV)/bin/activate    puts the guanaco command on the PATH"

# pytest comes last, so that its summary is the last thing said. Never `python -m pytest`: that would put the
# repository's root on sys.path, and with it the bare folder names that other packages use as well.
test: lint typecheck
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

accept: $(TESTING)
	$(BIN)/python loadtest/accept.py --out loadtest/results --workers $(WORKERS)

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(TESTING) links
	$(BIN)/mypy -p guanaco.kernels -p guanaco.models -p guanaco.adapters -p guanaco.server

# Editors and mypy do not follow the map of folders that setuptools installs; a folder of links gives them the same names.
links:
	@mkdir -p .typing/guanaco
	@for p in adapters kernels models server; do ln -sfn ../../$$p .typing/guanaco/$$p; done

# Real clients, each in an environment of its own below build/clients, against a demo server that this starts.
clients: $(TESTING)
	$(BIN)/python tests/clients/run.py $(ARGS)

# The page in Debian's Chromium. Gets Playwright and axe-core, and where it is run by root Chromium too; says so where it can't.
browser: $(TESTING)
	@PYTHONPATH=tests/importable $(BIN)/python tests/browser/prepare.py $(PREPARE) || { [ $$? = 3 ] && exit 0; exit 1; }; \
	$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) playwright || \
	  { echo "BROWSER TESTS SKIPPED: Playwright could not be installed"; exit 0; }; \
	$(BIN)/pytest --browser $(or $(ARGS),tests/browser)

bench: $(RUNTIME)
	$(BIN)/guanaco bench engine --json $(ARGS)

# The kernel tests over a native library that notices any read or write outside its memory.
asan: $(TESTING)
	GUANACO_SANITIZE=address $(BIN)/python setup.py -q build_ext --build-lib build/asan --build-temp build/asan-objects
	@plain=$$(ls kernels/cpu/_native*.so) && cp $$plain build/plain.so && trap "cp build/plain.so $$plain" EXIT && \
	  cp build/asan/guanaco/kernels/cpu/_native*.so $$plain && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  $(BIN)/pytest -s tests/kernels/cpu/test_cpu_ops.py tests/kernels/test_ops.py tests/kernels/test_attention.py \
	    tests/kernels/test_draw.py tests/kernels/test_draw_edges.py

# guanaco:cpu and guanaco:gpu, with docker, podman or buildah: whichever works here. docker/build.sh lists the variables.
image:
	sh docker/build.sh cpu

image-gpu:
	sh docker/build.sh gpu

clean:
	rm -rf $(VENV) kernels/cpu/_native*.so .typing build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "missing: Python 3.11 or newer as '$(PYTHON)' (Debian: apt install python3; or make PYTHON=…)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "missing: Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "missing: a C++ compiler (Debian: apt install g++)"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "missing: Python's headers (Debian: apt install python3-dev)"; exit 1; }
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/pip
	@if command -v nvidia-smi >/dev/null; then echo "== an NVIDIA driver is here: torch comes from PyPI, with CUDA"; else \
	  echo "== no NVIDIA GPU: installing torch's CPU build"; \
	  $(BIN)/pip install --no-deps --retries 1 $(TORCH_CPU) || \
	  { echo "torch's CPU build could not be installed: name another source with make TORCH_CPU=\"torch==… --index-url …\""; exit 1; }; fi
	@touch $@

$(RUNTIME): $(DEPS) $(VENV)/.torch
	@echo "== installing guanaco into $(VENV)"
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(TESTING): $(DEPS) $(VENV)/.torch
	@echo "== installing guanaco and its test tools into $(VENV)"
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.[test,loadtest]'
	@touch $(RUNTIME) $@
