# Everything happens in .venv, made on first use. PIP_ARGS goes to pip: point it at a CPU-only torch, a mirror, a cache.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
PYTEST_ARGS ?= -n 2 --dist loadfile
# The interpreter's tests share nothing, and few files hold most of their time.
INTERPRETER_ARGS ?= -n 2 --dist worksteal
.DEFAULT_GOAL = help
.PHONY: setup quickstart test test-slow lint types aot gpu bench results docs help

setup: $(VENV)/.setup ## install Trine into .venv (PIP_ARGS="..." is passed to pip)
quickstart: setup ## train a small code model here and generate from it
	$(BIN)/trine quickstart
test: lint types ## lint, types and the fast tests; kernels in the interpreter and compiled in processes of their own
	$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest -m "not slow" $(INTERPRETER_ARGS) tests/interpreter
	$(BIN)/python -m trine.kernels.aot --check
test-slow: $(VENV)/.develop $(VENV)/triton-3.6 $(VENV)/lm-eval/datasets ## the wide and long tests; kernels compiled for sm_90 with the oldest triton too
	$(BIN)/pytest -m slow $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest -m slow $(INTERPRETER_ARGS) tests/interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -k every_pair $(INTERPRETER_ARGS) tests/kernels/test_attention_support.py
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m trine.kernels.aot --targets sm_90
lint: $(VENV)/.develop ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: $(VENV)/.develop ## mypy, strict: the rooms and the tests
	$(BIN)/mypy && $(BIN)/mypy tests
aot: $(VENV)/.develop ## compile every kernel for four GPUs, without one, and rewrite kernels/aot.json
	$(BIN)/python -m trine.kernels.aot --write
gpu: ## on a GPU machine: doctor, training and generation against the CPU, GPU tests (GPU_ARGS="--bench --tune": speed)
	PYTHONPATH=.typing $(or $(wildcard $(BIN)/python),$(PYTHON)) -m trine.benchmarks.gpu_pass $(GPU_ARGS)
bench: $(VENV)/.develop ## training speed against the transformers Trainer
	$(BIN)/trine bench train
results: setup ## train the recipes of docs/results.md for three seeds (WIKITEXT=folder with wikitext2-valid.txt and -test.txt)
	$(BIN)/python -m trine.benchmarks.recipes --wikitext $(WIKITEXT)
docs: $(VENV)/.develop ## check every command and link in the documents
	$(BIN)/pytest -q tests/repo/test_documents.py
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Trine needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
$(VENV)/.setup: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@
$(VENV)/.develop: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $(VENV)/.setup $@
# The oldest triton that Trine runs on, beside the pinned one: PYTHONPATH puts it first.
$(VENV)/triton-3.6: | $(VENV)/.develop
	$(BIN)/pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --quiet --target $@ triton==3.6.0
# lm-evaluation-harness with what asking a server and running a task import; all it could need is far more.
$(VENV)/lm-eval/datasets: | $(VENV)/.develop
	$(BIN)/pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --quiet --upgrade --target $(@D) lm-eval==0.4.13 \
		colorama==0.4.6 datasets==5.2.0 dill==0.4.1 lxml==6.1.3 multiprocess==0.70.19 pandas==3.1.1 portalocker==4.4.2 \
		sacrebleu==2.6.0 tabulate==0.10.0 xxhash==4.1.0
	$(PIP_INSTALL) --quiet --upgrade --target $(@D) requests aiohttp tenacity
