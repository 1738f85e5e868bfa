# make infer   two ranks generate from the demo model     make test       the tests, and ruff
# make bench   the numbers of README.md                    make test-all   the large grids too
# make bench-hosts   those between emulated hosts, as root    make gpu-check   kernels and models on a GPU
# make demo    train the demo model anew                   make wheel      build dist/*.whl
# Each sets up .venv first, with the exact versions of constraints.txt; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= 2
# DeepSpeed's own operators are not used; without the second line its launcher warns that it found no GPU.
export DS_BUILD_OPS := 0
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi > /dev/null 2>&1 && echo cuda || echo cpu)
ARGS ?=

.PHONY: infer test test-all lint bench bench-hosts gpu-check demo wheel setup clean

infer: $(READY)
	@$(BIN)/deepspeed --quiet --num_gpus $(RANKS) infer.py $(ARGS)

test: $(READY) lint
	$(BIN)/python -m pytest

test-all: $(READY) lint
	$(BIN)/python -m pytest -m "full or not full"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python tools/benchmark.py small --output out/small.json
	$(BIN)/python tools/bench_main_job.py $(ARGS)
	$(BIN)/python tools/bench_families.py
	$(BIN)/python tools/bench_training.py
	$(BIN)/python tools/bench_state_cache.py
	$(BIN)/python tools/bench_hybrid_training.py
	$(BIN)/python tools/bench_conversion.py

# Emulates hosts by network namespaces, which needs root.
bench-hosts: $(READY)
	$(BIN)/python tools/bench_all_reduce.py --rounds 5
	$(BIN)/python tools/bench_hosts.py --shapes 130M --prompt 1024 --rounds 4
	$(BIN)/python tools/bench_hosts.py --shapes 370M --rounds 2 --decode-steps 4 --output benchmarks/hosts_370m.json

gpu-check: $(READY)
	$(BIN)/python tools/gpu_check.py $(ARGS)

demo: $(READY)
	$(BIN)/python tools/train_demo.py $(ARGS)
	$(BIN)/python tools/plot_demo.py

wheel: $(READY)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

setup: $(READY)

# torch by its exact pin first: a range may pull a build for another accelerator.
$(READY): constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer as $(PYTHON); name another: make PYTHON=python3.11"; exit 1; }
	@echo "setting up $(VENV) (once, a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,tools]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
