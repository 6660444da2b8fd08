# `make train`: from a clean machine to a small MiniMax-M2 trained on real text. `make test`: the proofs.
# Both set up .venv when needed; a second time they start at once.
PYTHON ?= python3
# Which torch to install where none is in .venv yet; any build from 2.11 on will do.
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
DATA ?= data/quickstart
# Hydra overrides: make train ARGS="stage.steps=100 run.dir=runs/short"
ARGS ?=

.PHONY: train test lint bench clean
train: $(VENV)/installed
	$(PY) tools/prepare_data.py --out $(DATA) --vocab-size 2048
	$(PY) -m megatron_m2.train data.path=$(DATA) $(ARGS)

test: $(VENV)/installed-test
	$(PY) -m pytest --cov --cov-report=term --cov-fail-under=90 $(ARGS)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

bench: $(VENV)/installed-test
	$(PY) tools/bench/train_step.py
	$(PY) tools/bench/ops.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"megatron_m2 needs Python 3.11 or later, {sys.executable} is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.py pyproject.toml $(SOURCES)
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) setuptools wheel ninja pybind11 numpy "$(TORCH)"
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info megatron_m2/*.so
