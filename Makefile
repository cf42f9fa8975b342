# make demo        set up, then adapt the embedded model to a dialect (less than a minute on two cores)
# make test        set up, then all tests but those against other software (no torch)
# make fuzz        set up, then 10,000 damaged files of each of eight kinds, guided by the code that they reach (Linux)
# make vectors     set up, then make the conformance vectors anew from the definition, and check them
# make test-peers  set up an environment with torch, HF, PEFT and llama.cpp, then compare live

PYTHON ?= python3

demo: .venv/ready
	.venv/bin/deltanet-ref demo

test: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal

fuzz: .venv/fuzz-ready
	.venv/bin/python -m tests.fuzz

vectors: .venv/ready
	.venv/bin/deltanet-ref vectors --make deltanet_ref/oracle/vectors
	.venv/bin/deltanet-ref vectors --verify

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest tests/peers

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/fuzz-ready: .venv/ready
	.venv/bin/python -m pip install --quiet --editable '.[fuzz]'
	touch $@

.venv-peers/ready: pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --editable '.[test,peers]'
	touch $@

.PHONY: demo test fuzz vectors test-peers
