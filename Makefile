# Everything runs in .venv, which `make` fills on first use: SGLang is 9 GB and takes a minute or two.
UV := $(shell command -v uv || echo .uv/bin/uv)
PYTHON := .venv/bin/python

.PHONY: demo test-fast test test-full check docs bench gpu soak kernels-all clean

# It downloads its model once (94 MB), into the user's cache.
demo: .venv/.ready
	$(PYTHON) -m bench.demo $(ARGS)

# Two test processes: one waits for its server while the other works.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadgroup --durations 10

# No server is started.
test-fast: .venv/.ready
	$(PYTEST) -m "not server and not slow and not full" $(ARGS)

# What continuous integration runs.
test: check
	$(PYTEST) -m "not full" $(ARGS)

test-full: check
	$(PYTEST) $(ARGS)

check: .venv/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The tables that docs/flags.md and docs/refusals.md take from the code.
docs: .venv/.ready
	$(PYTHON) -m sglang_tri.patches.reference docs

bench: .venv/.ready
	$(PYTHON) -m bench.overhead $(ARGS)

# On a GPU: is it right, and what does it gain?
gpu: .venv/.ready
	$(PYTHON) -m bench.gpu $(ARGS)

# 10,000 requests, half of them to each of two servers.
soak: .venv/.ready
	FUZZ_REQUESTS=5000 $(PYTHON) -m pytest -s tests/test_fuzz.py -k random_requests

# All shapes that the kernels support, for four GPU architectures; no GPU is needed.
kernels-all: .venv/.ready
	$(PYTHON) -m tests.kernels.resources --all

clean:
	rm -rf .venv .uv .models results

.venv/.ready: pyproject.toml Makefile | $(UV)
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.13' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) -e '.[dev]'
	touch $@

.uv/bin/uv:
	(python3 -m venv .uv && .uv/bin/pip install --quiet uv) || python3 -m pip install --quiet --target .uv uv
