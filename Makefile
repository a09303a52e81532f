# make demo   set everything up, fetch the demo model, train, evaluate, show the routing
# make test   the tests, after the same set-up
# make portable   the same tests as a CPU without AVX-512 runs them
# make kills      the tests of durability at length
# make slow      several processes at length
# make sandbox    hostile programs, and all canonical solutions of HumanEval with busy cores
# make lm-eval     lm-evaluation-harness on a live run, which must give what it gives on the exported folder
# make agreement  scores against lm-evaluation-harness; DATA=FOLDER holds gsm8k/ and arc_challenge/
PYTHON ?= python3
# The CPU build of torch. On a machine with a GPU: make TORCH=torch demo
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
KILLS ?= 2000
SIGNALS ?= 200
MODEL := models/SmolLM2-135M-Instruct
RUN := runs/quickstart
export HF_HUB_OFFLINE ?= 1

.PHONY: setup model demo test portable kills slow sandbox lm-eval agreement lint types check bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(VENV)/.done
	$(BIN)/python scripts/fetch_demo_model.py $(MODEL)

demo: setup model
	$(BIN)/remix train configs/quickstart.yaml --overwrite
	$(BIN)/remix eval $(RUN) --base
	$(BIN)/remix eval $(RUN)
	$(BIN)/remix route-stats $(RUN)

# two processes of one thread each; a file's tests share fixtures, so they stay together
test: setup model
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the same tests as a CPU without AVX-512 runs them
portable: setup model
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n 2 --dist loadfile

# kills, every file-changing call killed and refused, signals: about twenty minutes on one core
kills: setup
	$(BIN)/python tests/faults/faultlab.py kills $(KILLS)
	$(BIN)/python tests/faults/faultlab.py points
	$(BIN)/python tests/faults/faultlab.py errors
	$(BIN)/python tests/faults/faultlab.py signals $(SIGNALS)

# launches of several processes, for every estimator; the real model at length: about twenty minutes
slow: setup model
	$(BIN)/python -m pytest -m slow

sandbox: setup
	REMIX_CANONICAL_STEP=1 REMIX_CANONICAL_REPEATS=3 $(BIN)/python -m pytest tests/sandbox/test_sandbox.py tests/sandbox/test_sandbox_values.py

# the harness is installed here and not by `make setup`: it brings some thirty packages that nothing else needs
lm-eval: setup
	$(BIN)/pip install --quiet --editable '.[lm-eval]'
	$(BIN)/python -m pytest -m agreement tests/evaluation/test_harness.py

agreement: setup model
	$(BIN)/pip install --quiet --editable '.[lm-eval]'
	REMIX_DATA=$(DATA) $(BIN)/python -m pytest -s -m agreement tests/test_agreement.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: test lint types

bench: setup model
	$(BIN)/python scripts/bench_step.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
