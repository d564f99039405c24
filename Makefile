# Everything needs only Python 3.11, make and PyPI; each target sets up its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test lint conformance clean

test: $(VENV)/.test-installed lint
	$(BIN)/lint-imports
	$(BIN)/python tests/conformance/run.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest --cov=loratlas --cov-report=term

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.test-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

conformance: $(VENV)/.test-installed
	$(BIN)/python tests/conformance/run.py

clean:
	rm -rf $(VENV) .cache
