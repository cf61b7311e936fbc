# Set-up and the main jobs. A bare Debian machine needs Python >= 3.11 and make, nothing else:
# what is missing is installed into .venv, and as root Debian's own packages are installed too.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in so many processes at once: many of them wait for processes of their own.
TEST_PROCESSES ?= 3
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: sweep test test-slow dashboard lint format docs wheelhouse clean

sweep: $(VENV)/.core
	$(BIN)/harness sweep --methods gptq,smoothquant --for weights --lose 3%

test: $(VENV)/.all debian-services
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup

# Minutes of training and evaluation, for the claims that need them.
test-slow: $(VENV)/.all debian-services
	$(BIN)/python -m pytest -m "slow and not gpu"

dashboard: $(VENV)/.all
	$(BIN)/harness dashboard

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.all
	$(BIN)/python -m harness.docs docs

# Every wheel that an offline machine of the same kind needs; there:
#   pip install --no-index --find-links wheelhouse 'transformer-harness[all]'
wheelhouse: $(VENV)/.all
	$(BIN)/python -m pip wheel --disable-pip-version-check -c constraints.txt \
		--wheel-dir wheelhouse '.[all]'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory debian-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip

# torch comes first and alone: a later requirement must never choose another build of it.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) -e .
	touch $@

$(VENV)/.all: $(VENV)/.core
	$(PIP) -e '.[all]'
	touch $@

.PHONY: debian-venv debian-services
debian-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; \
	else echo "Python's venv module is missing; install it (Debian: apt install python3-venv)" >&2; exit 2; fi

# The browser tests need Chromium, the PostgreSQL tests a server; without root they are skipped, visibly.
debian-services:
	@missing=""; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$$missing postgresql"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

clean:
	rm -rf $(VENV) wheelhouse build dist .pytest_cache .mypy_cache .ruff_cache
