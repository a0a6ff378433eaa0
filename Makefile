# Needs Python 3.10 to 3.13 and GNU make. Everything else is installed into .venv, once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
HOME_PAGE := $(CURDIR)/_build/html/index.html
# one thread each, so that two notebooks do not compete for two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help book pdf lab test test-fast test-lab test-gpu bench execute clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 \2/p' Makefile | awk '{ printf "%s %-10s", $$1, $$2; $$1 = $$2 = ""; print }'

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 was found. Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up .venv (once; PyTorch is large, so this takes a minute or more)"
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

book: $(READY)  ## build the book, print where it is, and open it
	@$(BIN)/jupyter-book build . -W -n --keep-going --quiet
	@echo "The book: file://$(HOME_PAGE)"
	@if [ -z "$$CI" ] && { [ "$$(uname)" = Darwin ] || [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ]; }; then \
		$(BIN)/python -m webbrowser "file://$(HOME_PAGE)" >/dev/null 2>&1 || true; fi

pdf: $(READY)  ## build the book, and all of it as one PDF, linked from the front page; needs Chromium
	@$(BIN)/jupyter-book build . -W -n --keep-going --quiet
	@$(BIN)/python book/_ext/whole_book.py _build/html

FIRST := book/01_state_space_models.ipynb
# in a container one is often root, where JupyterLab wants to be told that this is meant
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

lab: $(READY)  ## open JupyterLab in the first chapter, and print where it is
	@$(BIN)/jupyter lab --config=book/_lab/jupyter_server_config.py $(AS_ROOT) --LabApp.default_url=/lab/tree/$(FIRST)

test: $(READY)  ## run everything: style, arrows, tests, all notebooks, the book
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(BIN)/lint-imports
	@$(PYTEST) tests book -m "not lab" --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg

test-fast: $(READY)  ## run the tests of the package alone, in under a minute
	@$(PYTEST) tests -m "not slow and not lab"

test-lab: $(READY)  ## run every notebook in JupyterLab, in a browser (make test does so with one); ten minutes
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/test_lab.py -m lab

test-gpu: $(READY)  ## run the tests of the kernels and of the model on an NVIDIA GPU
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "PyTorch sees no GPU here"; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 16 tests/test_kernels.py tests/test_lessons.py tests/test_mamba.py tests/test_generation.py tests/test_ops.py tests/test_training.py tests/test_packing.py tests/test_experiments.py tests/test_compat.py

.venv/bench: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench: .venv/bench  ## measure against others, on a GPU too if there is one; record in book/results
	@$(BIN)/python -m mamba_tutorial.benchmark --out book/results/cpu_selective_scan.json
	@! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
		|| { $(BIN)/python -m mamba_tutorial.benchmark.gpu --out book/results \
		&& $(BIN)/python -m mamba_tutorial.benchmark.distributed --out book/results; }

execute: $(READY)  ## execute every notebook in place and clean its metadata
	@cd book && ../$(BIN)/jupyter nbconvert --config nbconvert_config.py *.ipynb

clean:  ## remove the built book and all caches, but not .venv
	@rm -rf _build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
