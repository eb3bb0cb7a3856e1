# `make` lists the targets. PYTHON, VENV and TORCH may be set: make demo TORCH="torch==2.13.0+cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format docs families-page api-page clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)-dev ## create the environment with everything the tests need

demo: $(INSTALLED) ## install, then draw a picture with the model inside the package
	$(BIN)/triptych generate "a red heart" -o demo.png
	@echo "The picture is in $(CURDIR)/demo.png"

# In the order of their names: otherwise files of few tests come last, and those that start processes take longest.
# A worker that dies ends the run, with a report: the tests it has left over would be waited for for ever.
test: lint ## lint, types, import contracts and the tests
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

test-slow: $(INSTALLED)-dev ## the tests that take longer
	$(BIN)/pytest -m slow

lint: $(INSTALLED)-dev ## lint, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)-dev ## sort imports and format
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format

docs: $(INSTALLED)-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

families-page: $(INSTALLED)-dev ## write docs/families.md anew from the code and docs/published/
	$(BIN)/python tools/published.py

api-page: $(INSTALLED)-dev ## write docs/api.md anew from the server's schema
	$(BIN)/python tools/api.py

clean: ## remove the environment and everything generated
	rm -rf $(VENV) site dist demo.png .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# PyTorch first and on its own, so that TORCH decides which build of it the rest is installed around.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e .
	touch $@

$(INSTALLED)-%: $(INSTALLED)
	$(PIP) install -e ".[$*]"
	touch $@
