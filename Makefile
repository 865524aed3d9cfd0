# make demo and make test do all of their own set-up: they need Python 3.10 or newer, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint format freeze pictures setup clean

demo: setup
	$(BIN)/rewind demo

test: setup
	$(BIN)/python tests/run.py

test-all: setup
	$(BIN)/python tests/run.py --slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Before a release: keep this version's workflows as fixtures, so that later versions still load them.
freeze: setup
	$(BIN)/python tests/support/freeze.py

# The pictures of the README and of the help pages, and the thumbnails under Templates. Needs a ComfyUI and Chromium.
pictures: setup
	$(BIN)/python docs/help_pictures.py
	$(BIN)/python docs/workflow_pictures.py

setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml requirements.txt
	$(BIN)/pip install --quiet -r requirements.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venvs build *.egg-info .pytest_cache .ruff_cache output
