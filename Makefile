# Commands that do everything on a fresh machine with Python, git and make. Each makes .venv, installs what it needs and goes.
# pip honours PIP_CONSTRAINT, for example to choose torch's CPU build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two tests at a time keep two cores busy; with three, tests that measure time fail.
TEST_PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES)

.PHONY: train test test-fast lint docs floors newest wheel gpu

train: $(VENV)/.recipes  ## The main job: two workers, slow momentum, real images.
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/configs/cpu_two_processes.yaml \
		recipes/image/train.py $(ARGS)

test: lint  ## Linter, types and all tests. ARGS="tests/test_core.py -k two_rounds" runs some of them.
	$(PYTEST) $(ARGS)

test-fast: lint  ## The same without the tests that take long or start a script as a user does.
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.test  ## Linter and types.
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.docs  ## The docs as a site, in site/: open site/index.html. Neither the build nor a page asks a network.
	$(BIN)/mkdocs build --strict $(ARGS)

floors: $(VENV)-floors/.ready  ## Tests with the oldest torch, accelerate and transformers that pyproject.toml allows.
	$(VENV)-floors/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow" $(ARGS)

newest: $(VENV)-newest/.ready  ## Tests with the newest ones, pre-releases too.
	$(VENV)-newest/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow" $(ARGS)

wheel:  ## Builds the wheel, installs it as a user does, and trains with it outside the checkout.
	PYTHON=$(PYTHON) .ci/wheel

# GPU_PYTHON=python3 takes a Python that has torch, transformers, accelerate and pytest already, and installs nothing.
gpu: $(if $(GPU_PYTHON),,$(VENV)/.test)  ## All that wants a CUDA device. ARGS="--minutes 9"; the next call goes on.
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e ".[recipes]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e ".[dev]"
	touch $@ $(VENV)/.recipes $(VENV)/.docs

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e ".[docs]"
	touch $@

# Not the extra "test": current releases of trl want newer libraries than the oldest ones.
$(VENV)-floors/.ready: pyproject.toml .ci/floors
	$(PYTHON) -m venv $(VENV)-floors
	.ci/floors > $(VENV)-floors/floors.txt
	$(VENV)-floors/bin/pip install -r $(VENV)-floors/floors.txt -e ".[recipes,docs]" \
		pytest pytest-timeout pytest-xdist hypothesis peft schedulefree hatchling \
		nbclient ipykernel
	touch $@

$(VENV)-newest/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install -e ".[dev]"
	$(VENV)-newest/bin/pip install --upgrade --pre torch accelerate transformers
	touch $@
