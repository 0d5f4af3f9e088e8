# One word each: `make help` lists them. Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LAB := $(VENV)/.lab
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
OLDEST := .venv-oldest
TEXTS := $(wildcard *.md .github/*.md docs/*.md docs/*/*.md results/*.md)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest lint format numbers docs clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(LAB) ## see it on handwritten digits in a few minutes; writes demo/report.html
	$(BIN)/flatminima demo

# With bytecode, whatever the environment says: else every worker compiles every test anew, a tenth of the time.
test: $(DEV) ## run the test suite
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n logical --maxprocesses 8 --dist loadgroup

test-slow: $(DEV) ## run the tests that are too slow for the suite
	$(BIN)/pytest -m slow

# The measuring and training half: what touches PyTorch.
test-oldest: $(OLDEST)/.done ## run the library's tests with the oldest PyTorch, in an environment of its own
	$(OLDEST)/bin/pytest -n logical --maxprocesses 8 --dist loadgroup tests/gramian tests/measures tests/network \
		tests/regularizer tests/test_exact.py tests/test_losses.py tests/test_theory.py tests/test_torch_compat.py

lint: $(DEV) ## check style, formatting, types, the layers, and the texts' spelling, tone and links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/proselint check $(TEXTS)
	$(BIN)/rumdl check .

format: $(DEV) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS) ## build the site into docs/_build; warnings are errors
	$(BIN)/sphinx-build -b html -n -W --keep-going docs docs/_build

numbers: $(DEV) ## rewrite the README's tables and picture from the committed records
	cd docs && $(abspath $(BIN))/python -m extensions.readme

clean: ## remove the environment, the site, the demo's report and caches (runs/ stays)
	rm -rf $(VENV) $(OLDEST) demo dist docs/_build docs/gallery .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last and removed first: an interrupted installation starts over with an empty environment.
$(LAB): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("flatminima needs Python >= 3.10: make PYTHON=/path/to/python3")'
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(LAB) $(DEV) $(DOCS)
	$(PIP) install -c constraints.txt -e '.[lab]'
	@touch $(LAB)

$(DEV): $(LAB) tests/oracles.txt
	@rm -f $(LAB) $(DEV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -r tests/oracles.txt
	@touch $(LAB) $(DEV)

# The environment for the site is that of the tests with more in it; the stamp that all stand on keeps its time.
$(DOCS): $(LAB)
	@$(BIN)/python -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the site is built with Python >= 3.11")'
	@rm -f $(DOCS) && mv $(LAB) $(LAB).before
	$(PIP) install -c constraints.txt -e '.[docs]'
	@mv $(LAB).before $(LAB) && touch $(DOCS)

# Without pins: those are of what the newest torch goes with.
$(OLDEST)/.done: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install 'torch==2.6.*' -e '.[lab]' \
		hypothesis mpmath 'pytest<9.2' pytest-timeout pytest-xdist
	@touch $@
