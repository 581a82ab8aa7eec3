# `make demo`, `make test` and `make bench`. Each makes the environment it needs in $(VENV), once.
#
#   PYTHON=python3.12 make test     another Python, 3.10 or newer
#   TORCH=torch==2.12.0 make test   another torch, 2.10 or newer
#   make test ARGS="-k prefix"      options for pytest;  make demo ARGS="--seeds 3"  for the demo
#   make test JOBS=1                how many processes the tests are shared out among; by default one a core
#   make bench WHAT=bench/steps OUT=bench/out/steps.json     a part of the suite, and where its JSON goes
#   make gpu OUT=results WHEELS=wheels     where the results go, and a folder of wheels for a machine without a network
#   make gpu PARTS="launching decode"      these parts alone;  SECONDS=300  as many as fit;  PACK=folder  one file there

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SERVE_VENV ?= .venv-vllm
ARGS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
WHEELS ?=
PARTS ?=
PACK ?=
WHAT ?= bench
OUT ?= bench/out/$(SCALE).json

BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo demo-distill audit-demo serve-demo weights test test-slow test-all test-peft serve-test bench bench-quick bench-serving bench-avx2 bench-quality gpu gpu-rehearsal gpu-wheels lint format docs docs-serve clean

help:
	@echo "make demo    train a soft prompt and a prefix on a real model (about ten minutes on two cores)"
	@echo "make demo-distill   distill examples, labelled reviews and rules into prefixes of a twelfth of their tokens, on the same model;"
	@echo "             ARGS=\"--texts harbour shop\": a handbook, a system prompt"
	@echo "make audit-demo   audit the demo's adapters, trained first if need be, into bench/demo/out/audit/ (ten minutes on two"
	@echo "             cores); ARGS=--keep puts the page into bench/demo/"
	@echo "make serve-demo   three prefixes behind one unmodified vLLM, asked at once and validated (four minutes, and two more"
	@echo "             the first time)"
	@echo "make test    run the tests (a dozen minutes on two cores); make test-all: also those marked slow, which compile"
	@echo "             for GPUs, watch memory with sanitizers and try more random cases; make test-slow: these alone"
	@echo "make test-peft   run PEFT's own tests of its prompt-learning methods, from PyPI, on accelerated models (two minutes;"
	@echo "             ARGS=--plain: on PEFT alone, for comparison)"
	@echo "make serve-test  run the tests of serving in vLLM itself, on the CPU, in an environment of its own (seven minutes)"
	@echo "make bench   measure everything beside its references (under two hours); make bench-quick: the heart of it (five"
	@echo "             to twelve minutes); make bench-avx2: attention, with our kernels and PyTorch held to AVX2 (two minutes)"
	@echo "make bench-serving   throughput and time to first token in vLLM, beside text prompts and PEFT (ten minutes)"
	@echo "make bench-quality   what each method learns on real tasks, beside PEFT, LoRA and written prompts (hours; it goes on"
	@echo "             where it stopped); PARTS=capitals,dates: these tasks alone; ARGS=\"--minutes 30\": no new cell after that"
	@echo "make weights fetch SmolLM2-135M, which the demo trains on and some benchmarks use; make demo does it by itself"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, test and measure there (a quarter of an hour on an H200); PARTS="
	@echo "             and SECONDS= say what of it; PYTHON has to have torch, triton and transformers. make gpu-rehearsal: the"
	@echo "             same without a GPU, as far as that goes; make gpu-wheels WHEELS=folder: what a machine without a network needs"
	@echo "make lint    ruff, mypy and clang-format, changing nothing"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make docs    build the documentation into site/, warnings as errors; make docs-serve: show it while it is written"
	@echo "make clean   remove the environment and what was built"

demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo $(ARGS)

demo-distill: $(VENV)/.installed
	$(BIN)/python -m bench.demo_distill $(ARGS)

audit-demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo.audit $(ARGS)

serve-demo: $(VENV)/.installed $(SERVE_VENV)/.installed
	$(BIN)/python -m bench.serving.demo --python $(SERVE_VENV)/bin/python $(ARGS)

weights: $(VENV)/.installed
	$(BIN)/python -c "from bench.demo import base_model; base_model.converted_model()"

# A file's tests stay together, for the fixtures that they share, and those that start processes come early. At most eight
# processes: each has torch and transformers of its own in memory.
SHARED_OUT := --numprocesses=$(JOBS) --maxprocesses=8 --dist=loadfile
PYTEST := $(BIN)/python -m pytest $(SHARED_OUT) --no-loadscope-reorder

test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow $(ARGS)

test-all: $(VENV)/.installed
	$(PYTEST) -m "slow or not slow" $(ARGS)

# Nothing of PEFT's tests is kept here: they and what they import are downloaded into build/peft, once.
test-peft: $(VENV)/.installed
	$(BIN)/python -m tests.peft $(ARGS)

# A file starts engines of its own, one after the other, and each has one thread.
serve-test: $(SERVE_VENV)/.installed
	OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/python -m pytest $(SHARED_OUT) tests/serving/engine $(ARGS)

bench: SCALE := full
bench-quick bench-avx2: SCALE := quick
bench-avx2: OUT := bench/out/avx2.json
bench-avx2: WHAT := bench/ops/test_attention.py::test_rows
bench-avx2: export PREFIXCORE_ISA := avx2
bench-avx2: export ATEN_CPU_CAPABILITY := avx2
bench-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
bench-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench bench-quick bench-avx2: $(VENV)/.installed
	@mkdir -p $(dir $(OUT))
	PREFIXCORE_BENCH=$(SCALE) $(BIN)/python -m pytest $(WHAT) -rs -W ignore::FutureWarning -W ignore::UserWarning \
	    --benchmark-columns=min,median,rounds --benchmark-json=$(OUT) $(ARGS)
	$(BIN)/python -m bench.report show $(OUT)

bench-serving: $(VENV)/.installed $(SERVE_VENV)/.installed
	$(BIN)/python -m bench.serving.load --python $(SERVE_VENV)/bin/python $(ARGS)
	$(BIN)/python -m bench.serving.page

# With the torch that is there, and not one of our choosing: it has to fit the machine's driver.
# Cells that have been run are not run again; PARTS are tasks with commas between them.
bench-quality: $(VENV)/.installed
	$(BIN)/python -m bench.quality run $(if $(PARTS),--parts $(PARTS)) $(ARGS)
	$(BIN)/python -m bench.quality render

gpu gpu-rehearsal: OUT := bench/out/gpu
GPU_OPTIONS = --out "$(OUT)" $(if $(PARTS),--parts $(PARTS)) $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS)) $(ARGS)
# bash has a SECONDS of its own, which it may have exported: only one that was given here counts.
GPU_SECONDS := $(if $(filter command line,$(origin SECONDS)),$(SECONDS))

gpu:
	"$(PYTHON)" .ci/gpu.py $(GPU_OPTIONS) $(if $(WHEELS),--wheels "$(WHEELS)") $(if $(PACK),--pack "$(PACK)")

gpu-rehearsal: $(VENV)/.installed
	$(BIN)/python .ci/gpu.py --rehearsal $(GPU_OPTIONS)

# Of the Python and platform of the machine that they are for, and nothing that it has with its torch.
gpu-wheels:
	"$(PYTHON)" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    --abi cp312 --abi abi3 --abi none $(foreach n,17 24 27 28,--platform manylinux_2_$(n)_x86_64) \
	    --dest "$(or $(WHEELS),wheels)" --requirement bench/gpu/wheels.txt

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

clean:
	rm -rf site $(VENV) $(SERVE_VENV) build *.egg-info prefixcore/*.so

# Installed again whenever what is built, or what is depended on, has changed. The package is compiled against
# the torch that stands in the environment, so torch and the build tools come first and there is no build
# isolation; naming torch again in the second call keeps pip from trading it for another.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install "$(TORCH)" "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --no-build-isolation "$(TORCH)" -e ".[hf,bench,dev]"
	@touch $@

# The compiled library in it is the one of $(VENV), whose Python it has; it is not made anew when that is.
$(SERVE_VENV)/.installed: .ci/serve_env.sh | $(VENV)/.installed
	TORCH="$(TORCH)" .ci/serve_env.sh $(SERVE_VENV) $(BIN)/python
	@touch $@

# The extra of the package that is installed: nothing is built again.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install "$(TORCH)" "prefixcore[docs]"
	@touch $@

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "prefixcore: '$(PYTHON)' was not found. Install Python 3.10 or newer, or name one: make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "prefixcore: Python 3.10 or newer is needed; '$(PYTHON)' is $$("$(PYTHON)" -V). Name another: make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "prefixcore: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	    echo "prefixcore: '$(PYTHON)' has no C headers. On Debian and Ubuntu: apt-get install python3-dev"; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || command -v clang++ >/dev/null || command -v c++ >/dev/null || { \
	    echo "prefixcore: no C++ compiler was found. On Debian and Ubuntu: apt-get install g++; elsewhere point CXX at one"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@
