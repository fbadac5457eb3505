# The verbs of this repository. Each builds the environment it needs; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup lint test test-core test-chaos test-browser test-s3 test-platform bench soak demo clean

help:  ## List the verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed  ## Install everything for development into .venv

lint: .venv/.installed  ## Check style, formatting and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Tests of cca_core run once, where they prove most: without Ray, MLflow and pydantic.
test: lint test-core .venv/.installed  ## What CI runs: lint, and all quick tests
	$(BIN)/pytest tests/contract tests/integration

test-core: .venv-core/.installed  ## Test cca_core where Ray, MLflow and pydantic are not installed
	@.venv-core/bin/python -c 'import importlib.util as u, sys; \
	found = [name for name in ("ray", "mlflow", "pydantic") if u.find_spec(name)]; \
	sys.exit(f".venv-core must not hold {found}: remove .venv-core and try again" if found else 0)'
	.venv-core/bin/pytest tests/unit tests/invariant tests/parity

test-chaos: .venv/.installed  ## Kill workers and drivers, and check that the work survives
	$(BIN)/pytest tests/chaos

test-browser: .venv/.browser  ## Use the pages in a real Chromium, the installed one where there is one
	$(BIN)/pytest tests/browser

test-s3: .venv/.installed .venv-swift/.installed  ## Test storage on a real S3 server on loopback
	$(BIN)/pytest tests/s3

test-platform: .venv/.platform .venv-swift/.installed  ## Use a whole platform: Postgres, S3, MLflow, a Ray cluster (root)
	$(BIN)/pytest tests/platform

bench: .venv/.installed  ## Measure the published numbers: the digits over three training seeds
	$(BIN)/python benchmarks/digits_target.py

soak: .venv/.installed  ## Ask the service at half load for an hour (or MINUTES=10): memory, p95 and slots stay flat
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),60)

demo: .venv/.installed  ## Run the embedded default: digits in, an aligned model out
	$(BIN)/cca run

clean:  ## Remove the environments, caches and build leftovers (your runs in .cca stay)
	rm -rf .venv .venv-core .venv-swift build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments: remade when what they are made from changes.
define new_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Python 3.11 or newer is needed and '$(PYTHON)' is not it; name one: make PYTHON=python3.11" >&2; \
	exit 1; }
$(PYTHON) -m venv $(@D)
endef

.venv/.installed: pyproject.toml constraints.txt
	$(new_environment)
	$(@D)/bin/pip install -c constraints.txt -e ".[dev]"
	@touch $@

.venv/.browser: .venv/.installed
	$(@D)/bin/pip install -c constraints.txt -e ".[browser]"
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(@D)/bin/playwright install chromium
	@touch $@

.venv/.platform: .venv/.installed
	$(@D)/bin/pip install -c constraints.txt -e ".[platform]"
	@touch $@

.venv-core/.installed: pyproject.toml constraints.txt
	$(new_environment)
	$(@D)/bin/pip install -c constraints.txt -e ".[test]"
	@touch $@

.venv-swift/.installed: tests/s3/requirements.txt
	$(new_environment)
	$(@D)/bin/pip install -r tests/s3/requirements.txt
	@touch $@
