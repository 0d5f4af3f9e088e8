# One word each: `make help` lists them. Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LAB := $(VENV)/.lab
DEV := $(VENV)/.dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(LAB) ## see it on handwritten digits in a few minutes; writes demo/report.html
	$(BIN)/flatminima demo

# With bytecode, whatever the environment says: else every worker compiles every test anew, a tenth of the time.
test: $(DEV) ## run the test suite
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n logical --maxprocesses 8 --dist loadgroup

test-slow: $(DEV) ## run the tests that are too slow for the suite
	$(BIN)/pytest -m slow

lint: $(DEV) ## check style, formatting, types and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, the demo's report and caches (runs/ stays)
	rm -rf $(VENV) demo dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last and removed first: an interrupted installation starts over with an empty environment.
$(LAB): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("flatminima needs Python >= 3.10: make PYTHON=/path/to/python3")'
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(LAB) $(DEV)
	$(PIP) install -c constraints.txt -e '.[lab]'
	@touch $(LAB)

$(DEV): $(LAB) tests/oracles.txt
	@rm -f $(LAB) $(DEV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -r tests/oracles.txt
	@touch $(LAB) $(DEV)
