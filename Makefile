# Everything runs in .venv, which `make` fills on first use: SGLang is 9 GB and takes a minute or two.
UV := $(shell command -v uv || echo .uv/bin/uv)
PYTHON := .venv/bin/python

.PHONY: demo test check bench gpu soak kernels-all clean

# It downloads its model once (94 MB), into the user's cache.
demo: .venv/.ready
	$(PYTHON) -m bench.demo $(ARGS)

# Kernel tests wait for compilers and interpreters, all others for servers that stand once.
test: check
	$(PYTHON) -m pytest -n auto tests/kernels
	$(PYTHON) -m pytest --ignore tests/kernels

check: .venv/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

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
	$(PYTHON) -m bench.kernel_resources --all

clean:
	rm -rf .venv .uv .models results

.venv/.ready: pyproject.toml Makefile | $(UV)
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.13' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) -e '.[dev]'
	touch $@

.uv/bin/uv:
	(python3 -m venv .uv && .uv/bin/pip install --quiet uv) || python3 -m pip install --quiet --target .uv uv
