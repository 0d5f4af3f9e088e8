# One word each: `make help` lists them. Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## see it on handwritten digits in a few minutes; writes demo/report.html
	$(BIN)/flatminima demo

test: $(INSTALLED) ## run the test suite
	$(BIN)/pytest

test-slow: $(INSTALLED) ## run the tests that are too slow for the suite
	$(BIN)/pytest -m slow

lint: $(INSTALLED) ## check style, formatting, types and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, the demo's report and caches (runs/ stays)
	rm -rf $(VENV) demo dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and removed first: an interrupted installation starts over with an empty environment.
$(INSTALLED): pyproject.toml constraints.txt tests/oracles.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("flatminima needs Python >= 3.10: make PYTHON=/path/to/python3")'
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r tests/oracles.txt
	@touch $@
