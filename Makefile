# `make help` lists the targets. Everything is installed into a virtual environment in this folder.
PYTHON ?= python3
DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
VENV ?= .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-$(TORCH))
NVCC ?= $(or $(wildcard $(or $(CUDA_HOME),$(CUDA_PATH))/bin/nvcc),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
OUT ?= build/gpu-check
WORKERS ?= 8

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
BUILT := build/.built
HEADERS := $(shell find csrc -name '*.h' -o -name '*.cuh')
CUDA_SOURCES := $(shell find csrc -name '*.cu')
CUDA_OBJECTS := $(CUDA_SOURCES:%.cu=build/gpu-check/%.o)
CPP_SOURCES := $(shell find csrc -name '*.cpp')
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
GPU = $(if $(findstring gpu-check,$(MAKECMDGOALS)),$(shell nvidia-smi -L 2>/dev/null))
SANITIZE = compute-sanitizer --error-exitcode 1
OURS = --kernel-name kns=gdbp
WARNINGS := -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-unused-parameter
# For kernels that are compiled and never run, a third of the time; an nvcc before 12.8 takes all of it.
QUICK = $(if $(NVCC),$(if $(findstring fast-compile,$(shell $(NVCC) --help)),--Ofast-compile=max))
ifdef COMPILE_ONLY
export NVCC_APPEND_FLAGS := $(WARNINGS) $(QUICK)
endif

# The binary lies in gdbp/, so it serves one environment at a time: built again when another one asks.
BUILT_FOR := $(VENV) GDBP_CUDA=$(GDBP_CUDA) CUDA_HOME=$(CUDA_HOME) ARCHS=$(GDBP_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST)
ifneq ($(file <$(BUILT)),$(BUILT_FOR))
.PHONY: $(BUILT)
endif

.PHONY: help train test gpu-compile gpu-simulate gpu-check gpu-run gpu-test gpu-memcheck gpu-racecheck gpu-initcheck bench lint \
  format build clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'
	@echo "TORCH=2.15.0 takes another torch (default $(DEFAULT_TORCH)), PYTHON=python3.12 VENV=.venv-3.12 another Python, ARGS=... adds arguments."

train: $(BUILT)  ## train a first network on handwritten digits; ARGS="--data FILE.csv" for other data
	$(PY) -m gdbp train $(ARGS)

# Threads that wait give their core to the simulator's compiler, which works beside the first tests.
test: export OMP_WAIT_POLICY = passive
test: $(BUILT)  ## run the tests
	$(PY) -m pytest $(ARGS)

gpu-compile: $(CUDA_OBJECTS)  ## compile the CUDA sources for sm_80 and sm_90
	@echo "gpu-compile: $(words $(CUDA_OBJECTS)) CUDA files compile for sm_80 and sm_90 without a warning"

gpu-simulate: $(BUILT)  ## run the kernels on the CPU, in a simulator
	$(PY) -m pytest tests/cudasim

gpu-check: gpu-compile gpu-simulate $(if $(GPU),gpu-run)  ## both, and all on a GPU where there is one; make -j16 takes minutes less
	@$(if $(GPU),:,echo "gpu-check: no GPU here, so nothing was run on one")

# Measured last, when nothing else runs.
gpu-run: gpu-compile gpu-simulate gpu-test gpu-memcheck gpu-racecheck gpu-initcheck
	mkdir -p $(OUT)
	$(PY) -m gdbp bench run --device cuda --budget 0.2 --save --json $(OUT)/gpu.json

gpu-test: $(BUILT)
	@$(PY) -c "import torch; torch.cuda.is_available() or exit('gpu-check: the torch in $(VENV) cannot use the GPU; install a CUDA build of torch')"
	$(PY) -m pytest -m cuda -n $(WORKERS)
gpu-memcheck: $(BUILT)
	$(SANITIZE) --tool memcheck $(OURS) $(PY) -m tests.cuda_cases
gpu-racecheck: $(BUILT)
	$(SANITIZE) --tool racecheck $(OURS) $(PY) -m tests.cuda_cases cuda float32 bfloat16
gpu-initcheck: $(BUILT)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool initcheck $(PY) -m tests.cuda_cases cuda bfloat16

bench: $(BUILT)  ## measure the kernels against their peers; ARGS="-k adam" for some
	$(PY) -m gdbp bench run $(ARGS)

lint: $(INSTALLED)  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES) && echo "clang-format: $(words $(CPP_FILES)) files are formatted"

format: $(INSTALLED)  ## format the sources in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

build: $(BUILT)  ## compile gdbp into this folder and say what was built
	$(PY) -m gdbp info

clean:  ## remove what was built, but not the environments
	rm -rf build dist *.egg-info gdbp/_C.*

$(INSTALLED): requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==$(TORCH)
	$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

$(BUILT): $(INSTALLED) setup.py pyproject.toml $(HEADERS) $(CUDA_SOURCES) $(CPP_SOURCES)
	@echo "Compiling gdbp; the first time takes a minute or two."
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@mkdir -p $(@D)
	@printf '%s' '$(BUILT_FOR)' > $@

build/gpu-check/%.o: %.cu $(HEADERS)
	@test -n "$(NVCC)" || { echo "gpu-compile: no nvcc in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit" >&2; exit 1; }
	@mkdir -p $(@D)
	$(NVCC) --threads 2 -std=c++17 --expt-relaxed-constexpr --extended-lambda $(WARNINGS) $(QUICK) -I csrc -c $< -o $@ \
	  -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90
