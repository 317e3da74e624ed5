# `make demo` and `make test` set up all they need: a virtual environment with pinned packages, then the data.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What one command compiled the next one reads.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2

.PHONY: demo demo-detection test lint docs bench clean

demo: $(VENV)/.demo
	@echo 'training 12 small networks, about 3 minutes on two quiet cores'
	$(BIN)/python -m experiments.compare --out runs/demo

demo-detection: $(VENV)/.scenes
	$(BIN)/python -m experiments.scenes --out runs/data/scenes
	$(BIN)/python -m experiments.train scenes_mask_rcnn_tiny_bcn_ws --batch.micro 1 --data.data-dir runs/data --out runs/detection
	$(BIN)/python -m experiments.detect runs/detection runs/data/scenes/val/00000[1-8].jpg --threshold 0.4 --figure runs/detection/detections.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build
	@echo 'open site/index.html; its search needs: $(BIN)/mkdocs serve'

bench: $(VENV)/.demo
	$(BIN)/python -m experiments.bench layers --json runs/bench_layers.json

clean:
	rm -rf $(VENV) .cache runs site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wsbcn_flax needs Python 3.11 or later, $(PYTHON) is `$(PYTHON) --version 2>&1`; try: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; a change of the pins or of the requirements installs again.
$(VENV)/.demo $(VENV)/.scenes $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@
