# Set-up: a virtual environment in .venv with the versions of constraints.txt, made once and again whenever
# pyproject.toml or constraints.txt changes. On Linux the registry's torch brings CUDA with it (several GB); for
# the CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

VENV := .venv
PY := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
STAMP := $(VENV)/.installed
STARTED := $(VENV)/.install-started
PYTEST_ARGS ?=
# Processes that share the tests; each takes about 1.5 GB. WORKERS=0: in this one, as a debugger needs it.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# What meets transformers, diffusers, accelerate, datasets and the Hub's client; the rest is our own maths.
OLDEST_TESTS ?= tests/test_package.py tests/test_modeling.py tests/test_serialization.py tests/test_dit.py \
	tests/test_pipelines.py tests/test_text_to_image.py tests/test_schedulers.py tests/test_causal_lm.py \
	tests/test_causal_lm_generation.py tests/test_masked_lm.py tests/test_image_classification.py \
	tests/test_recurrent.py tests/test_trainer.py tests/test_resume.py tests/test_hub.py tests/test_hub_push.py \
	tests/test_safety.py tests/data tests/metrics
# What trains, streams or resumes; these compare runs with each other, so they hold on any device.
GPU_TESTS ?= tests/test_gpu.py tests/test_battery.py tests/test_residency.py tests/test_exact_gradient.py tests/test_resume.py
BENCHMARKS ?= benchmarks/memory.py benchmarks/speed.py benchmarks/text_memory.py benchmarks/text_speed.py

# The first interpreter that is new enough (transformers and diffusers need 3.11); `make test PYTHON=...` overrides.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do \
	if "$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text demo-memory test test-slow test-gpu test-oldest coverage check-wheel lint types docs notebooks bench \
	clean

help: ## Print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Set up .venv (the other targets do it themselves)

# $(STARTED) lies in .venv while an install runs. A call that finds it was preceded by one that was killed or failed
# half-way, and throws the environment away, whose state is unknown. An install that ends before it changed a package
# (no network, Ctrl-C) takes the marker with it, so that the environment of before stays.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
		echo "error: Python 3.11 or newer is needed, found: $(or $(PYTHON),no python3.11 and no newer python3)." \
			"Install it, or name it: make $(or $(MAKECMDGOALS),help) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if [ -e $(STARTED) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(STARTED)
	@[ -x $(PY) ] || "$(PYTHON)" -m venv $(VENV) || { echo "error: no virtual environment could be made with" \
		"$(PYTHON) (on Debian: apt-get install python3-venv)." >&2; exit 1; }
	@unchanged() { [ -n "$$(find $(VENV)/lib -name '*.dist-info' -newer $(STARTED))" ] || rm -f $(STARTED); }; \
	trap 'unchanged; exit 130' HUP INT TERM; \
	echo "$(PY) -m pip install -c $(CONSTRAINTS) -e '.[dev]'"; \
	if $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'; \
	then touch $(STARTED) && mv $(STARTED) $@; \
	else unchanged; exit 1; fi

demo: $(STAMP) ## Train a blocked DiT on the digits data set and write its report to runs/digits-dit
	$(PY) -m hf_diffusionblocks train digits-dit --output-dir runs/digits-dit

demo-memory: $(STAMP) ## Train and sample a model under a memory limit that refuses it end to end (a few minutes)
	$(PY) benchmarks/limited_memory.py

demo-text: $(STAMP) ## Train a blocked Llama on Python's documentation and write its report to runs/pydoc-llama
	$(PY) -m hf_diffusionblocks train pydoc-llama --output-dir runs/pydoc-llama

test: $(STAMP) ## Run the tests (PYTEST_ARGS="tests/test_data.py -k digits" for some of them)
	$(PY) $(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the tests that take minutes
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

test-gpu: $(STAMP) ## Run GPU_TESTS with their trainers on the GPU (VENV may name an environment with a CUDA build of torch)
	TEST_DEVICE=cuda $(PY) $(PYTEST) $(GPU_TESTS) $(PYTEST_ARGS)

test-oldest: ## Run OLDEST_TESTS with the oldest supported versions (constraints-oldest.txt), in .venv-oldest
	$(MAKE) VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt test PYTEST_ARGS="$(OLDEST_TESTS) $(PYTEST_ARGS)"

coverage: $(STAMP) ## Run the tests and print which lines of src they do not reach (twice as long as make test)
	$(PY) -m pytest --cov --cov-report=term $(PYTEST_ARGS)

check-wheel: $(STAMP) ## Install the wheel into an empty environment and train, sample and score from there
	$(PY) -m pytest -m slow tests/test_packaging.py

lint: $(STAMP) types ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check src tests benchmarks

types: $(STAMP) ## Check the types
	$(PY) -m mypy

docs: $(STAMP) ## Build the documentation's site into site/
	$(PY) -m zensical build --clean --strict

notebooks: $(STAMP) ## Run the notebooks and keep their outputs (NOTEBOOKS="own_family" for some of them)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	$(PY) notebooks/execute.py $(NOTEBOOKS)

bench: $(STAMP) ## Memory and speed, or the scripts named: make bench BENCHMARKS=benchmarks/residency.py
	@[ -n "$(strip $(BENCHMARKS))" ] || { echo "error: no script in benchmarks/" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(PY) "$$script"; done

clean: ## Remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) $(VENV)-oldest build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
