# Everything needs only Python 3.10 or later, make and PyPI; each target sets up its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint conformance docs clean

demo: $(VENV)/.demo-installed
	$(BIN)/loratlas compare lora pissa srlora --demo

test: $(VENV)/.test-installed lint docs
	$(BIN)/python tests/conformance/run.py --one-of-each-kind
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov=loratlas --cov-report=term:skip-covered

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/.test-installed
	$(BIN)/python tests/conformance/run.py

docs: $(VENV)/.test-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .cache/site

$(VENV)/.torch-installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	touch $@

$(VENV)/.demo-installed: $(VENV)/.torch-installed pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.test-installed: $(VENV)/.torch-installed pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) .cache
