# The front doors. Each makes .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: the demo's nodes and the tests' processes share few cores.
THREADS := OMP_NUM_THREADS=1
# Two at a time, a whole file each: tests/conftest.py says who gets what.
TESTS := $(THREADS) $(BIN)/python -m pytest -q -n 2

.PHONY: demo test check format types bench bench-wire kills soak interop clean

demo: $(READY)
	@$(BIN)/petalnode demo

test: $(READY)
	$(TESTS)

check: $(READY) types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TESTS)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mypy wants to see the package under its import name; links are enough.
types: $(READY)
	@rm -rf .types && mkdir -p .types/petalnode
	@ln -s $(CURDIR)/node/* $(CURDIR)/p2p $(CURDIR)/routing $(CURDIR)/models $(CURDIR)/simnet .types/petalnode/
	MYPYPATH=.types $(BIN)/mypy -p petalnode

bench: $(READY)
	$(BIN)/python -m benchmarks

kills: $(READY)
	$(THREADS) $(BIN)/python -m benchmarks.kills --kills $(or $(KILLS),100)
	PETALNODE_TEST_SEEDS=10 $(TESTS) tests/simnet/test_recovery.py \
	  tests/simnet/test_random_schedules.py

soak: $(READY)
	$(THREADS) $(BIN)/python -m benchmarks.soak --seconds $(or $(SECONDS),600)

interop: $(READY)
	$(BIN)/python -m pytest -q tests/interop

clean:
	rm -rf $(VENV) .types build *.egg-info .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "petalnode needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@sh .ci/check-system $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
