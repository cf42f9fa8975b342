# Each target sets up its own environment first. Budgets are wall time on two cores, set-up not counted.
#
# make demo           adapt the embedded model to a dialect (under 1 minute; 2 more where kernels compile for the first time)
# make lint           ruff: style, unused names, order of imports, format (seconds)
# make test           all tests but the long ones and those against other software, no torch (6 minutes, compiling included)
# make test-fast      for daily work: no training runs, no programs started per case (60 s once kernels are compiled)
# make test-long      what is too long for `make test`: every mutant of the conformance kit (5 minutes)
# make test-machines  the numeric tests under each OpenBLAS kernel, numba target and number of threads that this
#                     processor can run (30 minutes; ARGS=--short: three machines, fewer tests, 6 minutes)
# make test-peers     compare live with HF, PEFT and llama.cpp (10 minutes)
# make test-cuda      the CUDA kernels on this CPU: numbers, races, bounds, each barrier switched off (8 minutes; needs g++)
# make test-wheel     all tests against a wheel built from the sdist, outside the checkout (8 minutes; ARGS="-m 'not slow'": 2)
# make fuzz           10,000 damaged files of each kind, guided by the code that they reach (Linux)
# make vectors        make the conformance vectors anew from the definition, and check them

PYTHON ?= python3
ARGS ?=

demo: .venv/ready
	.venv/bin/deltanet-ref demo

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not long"

test-fast: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not long and not slow"

test-long: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal -m long

test-machines: .venv/ready
	.venv/bin/python -m tests.machines $(ARGS)

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest tests/peers

test-cuda: .venv-cuda/ready
	.venv-cuda/bin/python -m pytest -n 2 --dist worksteal tests/cuda $(ARGS)

test-wheel:
	PYTHON=$(PYTHON) .ci/test-wheel $(ARGS)

fuzz: .venv/fuzz-ready
	.venv/bin/python -m tests.fuzz

vectors: .venv/ready
	.venv/bin/deltanet-ref vectors --make deltanet_ref/oracle/vectors
	.venv/bin/deltanet-ref vectors --verify

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test,lint]'
	touch $@

.venv/fuzz-ready: .venv/ready
	.venv/bin/python -m pip install --quiet --editable '.[fuzz]'
	touch $@

.venv-cuda/ready: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --editable '.[test,cuda13]'
	touch $@

.venv-peers/ready: pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --editable '.[test,peers]'
	touch $@

.PHONY: demo lint test test-fast test-long test-machines test-peers test-cuda test-wheel fuzz vectors
