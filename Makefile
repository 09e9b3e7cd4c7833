# make demo   the main job on real input, a few minutes on two cores
# make test   every test; those that need a GPU run where one is present
# make bench  the benchmark tables (BENCH="losses" by default)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BENCH ?= losses
TEST_JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/cpu/*) setup.py pyproject.toml $(CONSTRAINTS)

.PHONY: demo test bench clean

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run $(BENCH)

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[test,demo,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info demo-output
