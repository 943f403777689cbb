# The one way to do each chore; CI calls these targets and nothing else. `make help` lists them.

# Any Python from 3.11 on, with venv.
PYTHON ?= python3
# The build of torch that the export stage runs on, passed to pip as it is. The locks hold everything torch needs, but not torch:
# which build fits is the machine's matter. README tells how to choose one; an environment that exists keeps its own.
TORCH ?= $(TORCH_PIN)
# What `make test` runs, with any options of pytest's.
TESTS ?= tests
# How many processes share the tests out among them, a file at a time; 0 runs them in pytest's own, as a debugger needs it.
TEST_PROCESSES ?= auto
# int8 or fp32: the precision in which the bundled checkpoint is exported.
PRECISION ?= int8
# Further options of `onnxlate serve` and of `uv pip compile` (for example --upgrade).
SERVE_FLAGS ?=
LOCK_FLAGS ?=
# Options of `python -m benchmarks`, for example --full or --only offline,bound; its --help lists them.
BENCH_FLAGS ?= --quick

TORCH_PIN := torch==2.13.0
UV_PIN := uv==0.13.8

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CHECKPOINT := examples/multi30k/checkpoint
BUNDLE := bundles/multi30k-en-de-$(PRECISION)

PROTOS := $(patsubst protos/%,serving/pb/%,$(wildcard protos/*.proto))
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iserving/pb=protos

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
# Written whole or not at all; make, interrupted, would take it from the rest of its bundle.
.PRECIOUS: $(BUNDLE)/manifest.json
.DEFAULT_GOAL := help
.PHONY: help install protos format lint types test test-gpu test-large test-peers test-all bench bench-gpu demo serve lock clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

install: $(INSTALLED)  ## Make .venv with everything in it; TORCH chooses the build of torch.

# Locked packages first, so that pip finds torch's own dependencies already there, at the locked versions, and adds only torch.
$(INSTALLED): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or later is needed; {sys.executable} is {sys.version}")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements/dev.txt
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	touch $@

protos: $(INSTALLED)  ## Generate the stubs in serving/pb from protos/.
	$(PROTOC) --python_out=. --grpc_python_out=. --pyi_out=. $(PROTOS)

format: $(INSTALLED)  ## Sort imports, fix what can be fixed, format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(INSTALLED)  ## Check style, format, generated stubs and Dockerfiles.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/*.Dockerfile
	@mkdir -p build && stubs=$$(mktemp -d build/stubs.XXXXXX) && trap 'rm -rf "$$stubs"' EXIT && \
	$(PROTOC) --python_out="$$stubs" --grpc_python_out="$$stubs" --pyi_out="$$stubs" $(PROTOS) && \
	diff -ru -x __init__.py -x __pycache__ "$$stubs/serving/pb" serving/pb || { echo 'serving/pb is not what protos/ says: run make protos' >&2; exit 1; }

types: $(INSTALLED)  ## Check types, strictly.
	$(BIN)/mypy

test: $(INSTALLED)  ## Run the tests; TESTS narrows them down.
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(TESTS)

# They need onnxruntime-gpu (requirements/serve-gpu.txt) in place of onnxruntime in the environment; -rs says why they were skipped.
test-gpu: $(INSTALLED)  ## Run the tests that need a CUDA device; without one they are skipped.
	$(BIN)/python -m pytest -rs tests/gpu

# In minutes and gigabytes: 1.37 billion parameters, 11 GB of memory, 20 GB of disk in the directory for temporary files (TMPDIR).
test-large: $(INSTALLED)  ## Export a model of 1.37 billion parameters and measure the memory that it takes.
	$(BIN)/python -m pytest -m large -rP tests/export/test_large.py

# Not locked and not part of test: the newest peers are the ones to compare with. -rP prints the figures that were measured.
test-peers: $(INSTALLED)  ## Compare with Hugging Face transformers and CTranslate2, which are installed first.
	$(BIN)/pip install --quiet --no-build-isolation -e '.[peers]'
	$(BIN)/python -m pytest -rP --show-capture=stdout tests/peers

# Not locked, as the peers of test-peers are not. Models and bundles are made once, in build/bench.
bench: $(INSTALLED)  ## Measure beside other libraries, which are installed first; BENCH_FLAGS=--full measures everything.
	$(BIN)/pip install --quiet --no-build-isolation -e '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

# Like test-gpu, it needs onnxruntime-gpu in place of onnxruntime.
bench-gpu: $(INSTALLED)  ## The same on a CUDA device, in fp16.
	$(BIN)/pip install --quiet --no-build-isolation -e '.[bench]'
	$(BIN)/python -m benchmarks --device cuda --only offline,growth $(BENCH_FLAGS)

test-all: lint types test  ## Everything that CI checks.

# A bundle is one directory, written whole or not at all; its manifest stands for it.
$(BUNDLE)/manifest.json: $(wildcard $(CHECKPOINT)/* export/*.py export/*/*.py) serving/manifest.py | $(INSTALLED)
	$(BIN)/onnxlate export $(CHECKPOINT) $(BUNDLE) --precision $(PRECISION) --overwrite

demo: $(BUNDLE)/manifest.json  ## Export the bundled model, serve it, translate a few sentences, stop.
	$(BIN)/python -m examples.demo $(BUNDLE)

serve: $(BUNDLE)/manifest.json  ## Export the bundled model and serve it until interrupted; SERVE_FLAGS are the server's.
	exec $(BIN)/onnxlate serve $(BUNDLE) $(SERVE_FLAGS)

# The locks hold for every Python from 3.11 on and for the CPUs that have wheels. dev.txt comes first and holds the others to its versions.
# torch, and what only its CUDA build asks for, stay out (see TORCH).
NOT_LOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
COMPILE = build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
  --custom-compile-command 'make lock' $(LOCK_FLAGS)
WITHOUT_TORCH = --constraints build/torch.in $(NOT_LOCKED:%=--no-emit-package %)

lock: build/uv/bin/uv  ## Resolve requirements/*.txt anew; LOCK_FLAGS=--upgrade moves to newer versions.
	echo '$(TORCH_PIN)' > build/torch.in
	$(COMPILE) pyproject.toml --extra cpu --extra tokenizers --extra train --extra dev $(WITHOUT_TORCH) -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra cpu --extra tokenizers --extra export $(WITHOUT_TORCH) -c requirements/dev.txt -o requirements/export.txt
	$(COMPILE) pyproject.toml --extra cpu --extra tokenizers -c requirements/dev.txt -o requirements/serve-cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra tokenizers -c requirements/dev.txt -o requirements/serve-gpu.txt
	$(COMPILE) --group pyproject.toml:build -c requirements/dev.txt -o requirements/build.txt

build/uv/bin/uv: Makefile
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet $(UV_PIN)
	touch $@

clean:  ## Remove what the targets above made, the bundles and .venv included.
	rm -rf $(VENV) build bundles *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
